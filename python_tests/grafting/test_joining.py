"""Fine-tuned models and grafts joined in one, against the definitions and against mergekit's own code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import model_zoo
import pytest
import torch
from grafting_helpers import some_graft, tuned
from safetensors.torch import load_file, save_file

from engram_kernels import EngramError
from engram_kernels.grafting import METHODS, Graft, join_state_dicts, trim
from engram_kernels.grafting.joining import rank_chances


def models(count=3, dtype=torch.float32):
    """A base and fine-tuned tensors by name."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    base = {"narrow": draw(61).to(dtype), "wide": draw(40, 130).to(dtype)}
    others = [{k: (v + 0.1 * draw(*v.shape)).to(dtype) for k, v in base.items()} for _ in range(count)]
    return base, others


# -- against mergekit ----------------------------------------------------------------------------------------


CASES = [
    {
        "method": method,
        "density": density,
        "weights": [1.0, 0.5, 2.0],
        "scale": 0.7,
        "epsilon": 0.1,
        "seed": 5,
    }
    for method in sorted(METHODS.keys() - {"magnitude", "consensus"})
    for density in (0.3, 1.0)
]
TRIMS = [{"method": "trim", "density": density} for density in (0.02, 0.2, 0.77, 1.0)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """What mergekit makes of each case, from where $ENGRAM_MERGEKIT says, else from the environment."""
    folder = tmp_path_factory.mktemp("mergekit")
    base, others = models()
    for name, tensors in (("base", base), *((str(i), other) for i, other in enumerate(others))):
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "cases.json").write_text(json.dumps(CASES + TRIMS))
    path = os.pathsep.join([os.environ.get("ENGRAM_MERGEKIT", ""), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "helpers" / "run_mergekit.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if "No module named 'mergekit'" in done.stderr:
        pytest.skip("mergekit is neither installed nor at $ENGRAM_MERGEKIT")
    assert done.returncode == 0, done.stderr[-2000:]
    return [load_file(folder / f"joined-{i}.safetensors") for i in range(len(CASES + TRIMS))]


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=lambda i: f"{CASES[i]['method']} {CASES[i]['density']}"
)
def test_the_same_as_mergekit(theirs, number):
    base, others = models()
    got = join_state_dicts(base, others, **CASES[number])
    for name in base:
        # Sums of the same numbers in another order; what is dropped by chance is drawn in the same one.
        torch.testing.assert_close(got[name], theirs[number][name], rtol=1e-5, atol=2e-6)


def test_the_same_trim_as_mergekit(theirs):
    base, others = models()
    for case, expected in zip(TRIMS, theirs[len(CASES) :], strict=True):
        for name in base:
            assert torch.equal(trim(others[0][name] - base[name], case["density"]), expected[name])


# -- by the definitions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_trim_keeps_the_largest(dtype):
    change = torch.randn(301, 7, dtype=torch.float64).to(dtype)
    for density in (0.01, 0.5):
        got, count = trim(change, density), int(density * change.numel())
        kept = got != 0
        assert int(kept.sum()) == count and torch.equal(got[kept], change[kept])
        assert change[kept].abs().min() >= change[~kept].abs().max()
    assert trim(torch.tensor([1.0, -1.0, 1.0, 0.5]), 0.5).tolist() == [1.0, -1.0, 0.0, 0.0]
    # A share of less than one is one.
    assert trim(torch.tensor([1.0, -3.0, 2.0]), 0.1).tolist() == [0.0, -3.0, 0.0]
    assert trim(torch.tensor(3.0), 0.1).item() == 3.0 and trim(torch.ones(0), 0.1).numel() == 0


def test_ties_by_hand():
    base = {"w": torch.zeros(4)}
    others = [{"w": torch.tensor(x)} for x in ([3.0, 1.0, -4.0, 0.0], [1.0, -5.0, -2.0, 0.0])]
    assert join_state_dicts(base, others, "ties")["w"].tolist() == [2.0, -5.0, -3.0, 0.0]
    # The two largest of each: 3 and −4, −5 and −2.
    assert join_state_dicts(base, others, "ties", density=0.5)["w"].tolist() == [3.0, -5.0, -3.0, 0.0]
    # A tie of the signs is positive, as mergekit has it.
    even = [{"w": torch.tensor([1.0, -1.0, 0.0, 2.0])}, {"w": torch.tensor([-1.0, 1.0, 0.0, -2.0])}]
    assert join_state_dicts(base, even, "ties")["w"].tolist() == [1.0, 1.0, 0.0, 2.0]
    weighted = join_state_dicts(base, others, "ties", weights=[1.0, 0.25], scale=2.0)["w"]
    torch.testing.assert_close(weighted, torch.tensor([2 * 3.25 / 1.25, -10.0, -2 * 4.5 / 1.25, 0.0]))


def test_dare_keeps_a_share_and_its_sum():
    base, others = {"w": torch.zeros(200, 500)}, [{"w": torch.ones(200, 500)}]
    got = join_state_dicts(base, others, "dare_linear", density=0.25)["w"]
    share = float((got != 0).float().mean())
    assert abs(share - 0.25) < 0.01
    torch.testing.assert_close(got[got != 0], torch.full((int((got != 0).sum()),), 1 / share))
    again = join_state_dicts(base, others, "dare_linear", density=0.25, seed=1)["w"]
    assert torch.equal(got, join_state_dicts(base, others, "dare_linear", density=0.25)["w"])
    assert not torch.equal(got, again)


def test_della_drops_small_changes_more_often():
    change = torch.tensor([[3.0, -1.0, 0.0, 2.0, -9.0]])
    expected = torch.tensor([[0.6, 0.45, 0.4, 0.5, 0.6]])
    expected[0, 0], expected[0, 3] = 0.55, 0.5
    torch.testing.assert_close(rank_chances(change, 0.5, 0.1), expected)


def test_consensus_keeps_what_enough_models_need():
    base = {"w": torch.zeros(3)}
    # Needed by both, by the first alone, by none: their sum cancels out.
    others = [{"w": torch.tensor([1.0, 1.0, 0.1])}, {"w": torch.tensor([1.0, 0.01, 1e-3])}]
    assert join_state_dicts(base, others, "consensus")["w"].tolist() == [2.0, 0.0, 0.0]
    one = join_state_dicts(base, others, "consensus", agreement=1)["w"]
    torch.testing.assert_close(one, torch.tensor([2.0, 1.01, 0.101]))
    assert torch.equal(join_state_dicts(base, others, "consensus", agreement=3)["w"], base["w"])


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_rounded_once(method):
    base, others = models(dtype=torch.bfloat16)
    wide = lambda x: {k: v.float() for k, v in x.items()}  # noqa: E731
    settings = {"method": method, "density": 0.5, "scale": 0.8}
    got = join_state_dicts(base, others, **settings)
    truth = join_state_dicts(wide(base), [wide(x) for x in others], **settings)
    assert all(torch.equal(got[name], truth[name].bfloat16()) for name in base)


def test_integers_stay_the_bases():
    base = {"position": torch.arange(3), "w": torch.zeros(2)}
    got = join_state_dicts(base, [{"position": torch.arange(3) + 1, "w": torch.ones(2)}], "task_arithmetic")
    assert got["position"].tolist() == [0, 1, 2] and got["w"].tolist() == [1.0, 1.0]


W = {"w": torch.ones(3)}
BAD = {
    "no model": ([], {}, ValueError, "tuned: expected at least one model, got none"),
    "method": (
        [W],
        {"method": "soup"},
        ValueError,
        "method: expected one of task_arithmetic, .*, got 'soup'",
    ),
    "weights": ([W], {"weights": [1.0, 2.0]}, ValueError, "weights: expected 1 numbers, got 2"),
    "NaN": ([W], {"weights": [float("nan")]}, ValueError, "weights: expected a finite number, got nan"),
    "density": ([W], {"density": 1.5}, ValueError, "density: expected at most 1, got 1.5"),
    "no density": ([W], {"density": 0.0}, ValueError, "density: expected a finite number above 0, got 0.0"),
    "epsilon": ([W], {"method": "della", "density": 0.1}, ValueError, r"epsilon: expected one with 0\.1 ± "),
    "seed": ([W], {"seed": "0"}, TypeError, "seed: expected an integer, got str"),
    "missing": ([{}], {}, EngramError, "tuned: expected a tensor 'w' in number 0, got none"),
    "a NaN": (
        [W, {"w": torch.tensor([1.0, torch.nan, 1.0])}],
        {"method": "task_arithmetic"},
        EngramError,
        "tuned: expected finite weights, got NaN or infinity in 'w' of number 1",
    ),
    "eight bits": (
        [{"w": torch.ones(3).to(torch.float8_e4m3fn)}],
        {},
        EngramError,
        r"tuned: expected plain weights, got torch\.float8_e4m3fn in 'w' of number 0",
    ),
    "shape": (
        [{"w": torch.ones(4)}],
        {},
        EngramError,
        r"tuned: expected shape \[3\] in 'w' of number 0, got",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    others, options, error, message = BAD[case]
    with pytest.raises(error, match=f"^{message}"):
        join_state_dicts(W, others, **options)


# -- grafts --------------------------------------------------------------------------------------------------


def dense(model, graft):
    """The model's tensors with the graft in them."""
    with graft.apply(model):
        return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "consensus"])
def test_grafts_are_joined_as_the_models_with_them_are(method):
    model = model_zoo.small_model()
    grafts = [some_graft(model, seed, count=3000) for seed in (1, 2, 3)]
    base = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    weights = [1.0, 2.0, 0.5]
    expected = join_state_dicts(base, [dense(model, graft) for graft in grafts], method, weights, scale=0.9)
    merged = Graft.merge(grafts, method, base=model, weights=weights, scale=0.9)
    got = dense(model, merged)
    assert all(torch.equal(got[name], expected[name]) for name in base)
    assert merged.recipe["method"] == method and merged.recipe["weights"] == weights
    for name, at in merged.indices.items():  # nothing is set that the base has already
        assert bool((merged.values[name] != base[name].flatten()[at.long()]).all())


def test_grafts_of_few_entries_a_tensor_are_thinned_out():
    model = model_zoo.small_model()
    grafts = [some_graft(model, seed, count=30) for seed in (1, 2)]
    assert min(at.numel() for graft in grafts for at in graft.indices.values()) == 1
    merged = Graft.merge(grafts, "ties", base=model, density=0.2)
    assert 0 < merged.size < sum(graft.size for graft in grafts)
    with merged.apply(model):
        pass


def test_bad_merges_of_grafts():
    model = model_zoo.small_model()
    graft = some_graft(model)
    with pytest.raises(ValueError, match=r"^base: expected the grafts' base, for 'ties', got None"):
        Graft.merge([graft], "ties")
    with pytest.raises(EngramError, match=r"^base: expected in .* the weights that the grafts were made for"):
        Graft.merge([graft], "ties", base=tuned(model))
    with pytest.raises(
        ValueError, match=r"^method: expected one by changes from a base, for these arguments"
    ):
        Graft.merge([graft], density=0.5)
    with pytest.raises(ValueError, match=r"^weights: expected 1 numbers, got 2"):
        Graft.merge([graft], "ties", base=model, weights=[1, 2])
    with pytest.raises(
        EngramError, match=r"^grafts: expected changes that 'consensus' leaves some of, got none"
    ):
        Graft.merge([graft], "consensus", base=model)

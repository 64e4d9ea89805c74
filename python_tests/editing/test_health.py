"""The health of an edited model: what is measured after each batch, and runs that end on it."""

import math
import warnings
from dataclasses import replace

import pytest

pytest.importorskip("transformers")

import torch
from editing_helpers import changed, small_editor, weights

from engram_kernels import EngramError
from engram_kernels.editing import METHODS, Edit, EditResult, Health
from engram_kernels.editing import health as health_module
from engram_kernels.editing.health import BOUNDS, largest_singular_value
from engram_kernels.editing.held_out import text_loss, wikipedia_rows
from engram_kernels.editing.reach import reached
from engram_kernels.editing.search.batching import encode_edit
from engram_kernels.editing.search.values import ValueOptions

EDITS = [Edit(f"Tower {letter}", "{} is located in the city of", "Rome") for letter in "abcdef"]
# As far as values may go, and no regard for ordinary text.
LOOSE = ValueOptions(steps=8, learning_rate=2.0, clamp=200.0, weight_decay=0.0, kl_weight=0.0)
ROME = METHODS["rome"]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*did not take:UserWarning", "ignore:after .* edits:UserWarning"),
]


@pytest.fixture(autouse=True)
def look_at_every_batch(monkeypatch):
    monkeypatch.setattr(health_module, "EVERY", 1)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_largest_singular_value(shape):
    """Against the SVD; of a product from its factors. It stands out, as an update's does."""
    left, right = torch.randn(shape[0], 4), torch.randn(4, shape[1])
    left[:, 0] *= 3
    truth = float(torch.linalg.matrix_norm((left @ right).double(), 2))
    assert largest_singular_value(left, right) == pytest.approx(truth, rel=1e-3)
    assert largest_singular_value(left @ right) == pytest.approx(truth, rel=1e-3)
    assert largest_singular_value(torch.zeros(3, 4)) == 0


def test_each_batch_is_measured_and_kept(tmp_path):
    editor = small_editor(value=LOOSE)
    model, tokenizer = editor.model, editor.tokenizer
    name = "model.layers.1.mlp.down_proj"
    base = model.get_submodule(name).weight.detach().clone()
    texts = wikipedia_rows(tokenizer, health_module.ROWS)
    loss = text_loss(model, texts)
    result = editor.edit(EDITS[:3], 1, "rome")
    assert [one.edits for one in result.health] == [1, 2, 3]
    last, weight = result.health[-1], model.get_submodule(name).weight.detach()
    assert last.growth == pytest.approx(float(weight.norm() / base.norm()), rel=1e-5)
    norms = [float(torch.linalg.matrix_norm(one, 2)) for one in (weight - base, base)]
    assert last.update == pytest.approx(norms[0] / norms[1], rel=0.05)
    assert last.perplexity == pytest.approx(math.expm1(text_loss(model, texts) - loss), rel=1e-5)
    encoded = [encode_edit(model, tokenizer, edit, ()).rewriting[0] for edit in EDITS[:2]]
    said = [one.said for one in reached(model, encoded, ["", ""])]
    assert result.health[0].holding is None and last.holding == sum(said) / 2
    result.save_pretrained(tmp_path / "kept")
    assert EditResult.from_pretrained(tmp_path / "kept").health == result.health


def test_of_several_matrices_the_worst_counts():
    editor = small_editor(value=LOOSE)
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1, 2)]
    matrices = [editor.model.get_submodule(name).weight.detach() for name in names]
    matrices[0].mul_(0.01)
    before = [matrix.clone() for matrix in matrices]
    (found,) = editor.edit(EDITS[:2], [0, 1, 2], "memit", ridge=0.1).health
    growth = [float(now.norm() / old.norm()) for now, old in zip(matrices, before, strict=True)]
    update = [
        float(torch.linalg.matrix_norm(now - old, 2) / torch.linalg.matrix_norm(old, 2))
        for now, old in zip(matrices, before, strict=True)
    ]
    assert growth.index(max(growth)) == update.index(max(update)) == 0  # else this test shows nothing
    assert found.growth == pytest.approx(growth[0], rel=1e-5)
    assert found.update == pytest.approx(update[0], rel=0.05)


def test_a_run_ends_before_it_ruins_a_model():
    """Loose options make a matrix grow with every edit; the run keeps what came before the bound."""
    free = small_editor(value=LOOSE).edit(EDITS, 1, "rome")
    growth = [one.growth for one in free.health]
    bound = (growth[2] + growth[3]) / 2
    assert max(growth[:3]) < bound < growth[3]  # else this test shows nothing
    editor = small_editor(value=LOOSE)
    result = editor.edit(EDITS, 1, "rome", stop_on={"growth": bound})
    assert [record.edit for record in result.records] == EDITS[:3]
    assert [one.edit for one in result.skipped] == EDITS[3:]
    assert f"growth {growth[3]:.3g}, above {bound:g}" in result.skipped[0].reason
    assert "after 3 edits" in result.skipped[0].reason
    assert result.health[-1].past({"growth": bound}) and not result.health[-2].past({"growth": bound})
    # What is there is what the first three alone give.
    alone = small_editor(value=LOOSE)
    alone.edit(EDITS[:3], 1, "rome")
    assert changed(weights(alone.model), editor.model) == []
    before = weights(small_editor().model)
    result.revert()
    assert changed(before, editor.model) == []


def test_a_first_batch_past_the_bound_changes_nothing():
    editor = small_editor(value=LOOSE)
    before = weights(editor.model)
    with pytest.raises(EngramError, match=r"stop_on: the run ended after 0 edits.*update"):
        editor.edit(EDITS, 1, replace(ROME, batch=3, ridge=0.1), stop_on={"update": 1e-3})
    assert changed(before, editor.model) == []


@pytest.mark.parametrize("name", ["perplexity", "holding"])
def test_what_costs_passes_is_measured_where_a_run_ends_on_it(monkeypatch, name):
    monkeypatch.setattr(health_module, "EVERY", 50)
    bound = {"perplexity": 1e9, "holding": 0.0}
    asked = small_editor().edit(EDITS[:3], 1, "rome", stop_on={name: bound[name]})
    assert getattr(asked.health[-1], name) is not None
    plain = small_editor().edit(EDITS[:3], 1, "rome")
    assert getattr(plain.health[-1], name) is None and plain.health[-1].growth > 0


def test_past_wide_bounds_a_run_warns_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = small_editor(value=LOOSE).edit(EDITS, 1, "rome")
    said = [str(one.message) for one in caught if str(one.message).startswith("after ")]
    passed = {name for one in result.health for name in BOUNDS if one.past({name: BOUNDS[name]})}
    assert passed and len(said) == len(passed)


def test_later_calls_go_on_from_the_base():
    """Growth and update are of all edits, those of earlier calls among them."""
    editor = small_editor(value=LOOSE)
    first = editor.edit(EDITS[:2], 1, "rome")
    second = editor.edit(EDITS[2:4], 1, "rome", after=first)
    whole = small_editor(value=LOOSE).edit(EDITS[:4], 1, "rome")
    assert second.health[-1].edits == 4
    assert second.health[-1].growth == pytest.approx(whole.health[-1].growth, rel=1e-4)
    assert second.health[-1].update == pytest.approx(whole.health[-1].update, rel=1e-3)
    assert second.health[-1].holding == whole.health[-1].holding


def test_a_matrix_is_measured_once_however_many_calls_write_it(monkeypatch):
    """And anew as soon as it is another."""
    editor, taken, whole = small_editor(value=LOOSE), [], largest_singular_value

    def counting(left, right=None):
        taken.extend([1] * (right is None))
        return whole(left, right)

    monkeypatch.setattr(health_module, "largest_singular_value", counting)
    first = editor.edit(EDITS[0], 1, "rome")
    second = editor.edit(EDITS[1], 1, "rome", after=first)
    second.revert()
    first.revert()
    again = editor.edit(EDITS[0], 1, "rome")
    assert again.health == first.health and len(taken) == 1
    again.revert()
    with torch.no_grad():
        editor.model.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(2)
    editor.edit(EDITS[0], 1, "rome")
    assert len(taken) == 2


@pytest.mark.parametrize(
    ("stop_on", "kind", "message"),
    [
        (0.02, TypeError, "stop_on: expected a mapping"),
        ({"loss": 1.0}, ValueError, "stop_on: expected names among growth, update, holding, perplexity"),
        ({"growth": -1.0}, ValueError, "stop_on: expected a finite number of at least 0"),
        ({"growth": "much"}, TypeError, "stop_on: expected a number"),
    ],
)
def test_bad_bounds(stop_on, kind, message):
    editor = small_editor()
    before = weights(editor.model)
    with pytest.raises(kind, match=message):
        editor.edit(EDITS[0], 1, "rome", stop_on=stop_on)
    assert changed(before, editor.model) == []


def test_wide_bounds_tell_ruin_from_a_strong_edit():
    """Of what was measured in SmolLM2: strong single edits, and fifty by ROME."""
    assert Health(1, growth=1.03, update=2.52, perplexity=0.002).past(BOUNDS) == []
    assert Health(1, growth=1.027, update=1.832, perplexity=0.013).past(BOUNDS) == []
    assert Health(50, growth=1.0, update=1.76, perplexity=0.13).past(BOUNDS) == ["perplexity 0.13, above 0.1"]


def test_words():
    health = Health(7, 1.2, 0.4, holding=0.75, perplexity=float("inf"))
    assert health.past({"growth": 1.5, "holding": 0.5}) == []
    assert health.past({"holding": 0.8, "perplexity": 10.0}) == [
        "holding 0.75, below 0.8", "perplexity inf, above 10",
    ]  # fmt: skip

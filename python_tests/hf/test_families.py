"""Every family of models, small and random: edited, reverted, traced, grafted, exported.

The table in docs/models.md is what these tests saw:
`ENGRAM_WRITE_DOCS=1 pytest python_tests/hf/test_families.py` writes it.
"""

import copy
import functools
import os
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import torch
from editing_helpers import changed, small_editor, weights

import engram_kernels as ek
from engram_kernels.editing import Edit, open_expert, routed_expert
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.errors import EngramError
from engram_kernels.grafting import Graft, graftable_parameters

FAMILIES = {
    "GPT-2": "gpt2",
    "GPT-J": "gptj",
    "GPT-NeoX, Pythia": "gpt_neox",
    "OPT": "opt",
    "Llama (grouped queries)": "llama",
    "Mistral": "mistral",
    "Qwen2, Qwen2.5": "qwen2",
    "Qwen3": "qwen3",
    "Gemma": "gemma",
    "Gemma 2": "gemma2",
    "Gemma 3 (text)": "gemma3",
    "Phi-2": "phi",
    "Phi-3": "phi3",
    "OLMo 2": "olmo2",
    "Falcon (7B's kind)": "falcon_7b",
    "Falcon (40B's kind)": "falcon_40b",
    "StableLM": "stablelm",
    "BLOOM": "bloom",
    "Mixtral": "mixtral",
    "Qwen2-MoE": "qwen2_moe",
    "Qwen3-MoE": "qwen3_moe",
}
# Their layers have routed experts alone: that which the router prefers for the subject is written.
ROUTED = {"mixtral", "qwen3_moe"}
# A norm, a gate or a router's weight stands between the MLP's answer and the layer's.
ONE_LAYER = {"gemma2", "gemma3", "olmo2", "qwen2_moe", *ROUTED}
# The subject ends the prompt: attention of a random model carries little from one token to another.
EDIT = Edit("The Eiffel Tower", "{}", "Rome")
PROMPT = "{} is located in the city of"
IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41, 3]])
LAYER = 1
DOCS = Path(__file__).parents[2] / "docs" / "models.md"
MARKS = ("<!-- made by python_tests/hf/test_families.py -->\n", "<!-- end -->\n")

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@contextmanager
def opened(name, editor, layers):
    """The experts that are written, where there is no other MLP."""
    with ExitStack() as stack:
        for layer in layers if name in ROUTED else ():
            expert = routed_expert(editor.model, editor.tokenizer, EDIT, layer)
            stack.enter_context(open_expert(editor.model, layer, expert))
        yield


@pytest.fixture(scope="module")
def editor_of(cache):
    """The editor of each family's model, one for all tests: every test leaves the weights as they were."""
    value = ValueOptions(steps=15, weight_decay=0.0, kl_weight=0.0, clamp=20.0)
    return functools.cache(lambda name: small_editor(name, cache_dir=cache, contexts=((4, 2),), value=value))


@pytest.fixture(scope="module")
def outcomes():
    """What the tests saw, by family and column of the table."""
    return {}


@pytest.fixture(scope="module")
def edited(editor_of, tmp_path_factory):
    """What one edit of each family gave: the module, probabilities, logits, warnings, a saved adapter."""

    @functools.cache
    def edit(name):
        editor, folder = editor_of(name), tmp_path_factory.mktemp("saved") / name
        before, plain = weights(editor.model), logits(editor.model)
        with warnings.catch_warnings(record=True) as caught, opened(name, editor, [LAYER]):
            warnings.simplefilter("always")
            result = editor.edit(EDIT, layers=LAYER)
        different, answers = changed(before, editor.model), logits(editor.model)
        result.save_pretrained(folder)
        result.revert()
        left = changed(before, editor.model)
        return {
            "result": result, "changed": different, "plain": plain, "edited": answers, "left": left,
            "folder": folder, "warnings": [str(warning.message) for warning in caught],
        }  # fmt: skip

    return edit


families = pytest.mark.parametrize("name", FAMILIES.values())


@families
def test_edit_and_revert(name, edited, outcomes):
    done = edited(name)
    (record,) = done["result"].records
    assert record.probability_after > 2 * record.probability_before
    written = done["result"].modules[0]
    routed = name in ROUTED
    assert done["changed"] == [written.rpartition(".")[0] if routed else f"{written}.weight"]
    assert not done["left"]
    written = written.replace(f".{LAYER}.", ".*.", 1)
    outcomes[name, "matrix that is written"] = f"`{f'{written[:-1]}*' if routed else written}`"
    outcomes[name, "edit, revert"] = "yes"


@families
def test_values_are_found_from_recorded_states(name, edited, outcomes):
    """A model that does not start from recorded states is run whole in every step, with a warning."""
    assert not [text for text in edited(name)["warnings"] if "recorded states" in text]
    outcomes[name, "values from recorded states"] = "yes"


@families
def test_several_layers(name, editor_of, outcomes):
    editor = editor_of(name)
    before = weights(editor.model)
    if name in ONE_LAYER:
        several = [LAYER, LAYER + 1]
        refused = pytest.raises(EngramError, match=r"^layers: expected one layer for this model.*got several")
        with opened(name, editor, several), refused:
            editor.edit(EDIT, layers=several, method="memit", ridge=0.1)
    else:
        with editor.edit(EDIT, layers=[LAYER, LAYER + 1], method="memit", ridge=0.1) as result:
            assert len(result.modules) == 2
            assert result.records[0].probability_after > result.records[0].probability_before
    assert not changed(before, editor.model)
    outcomes[name, "several layers"] = "refused" if name in ONE_LAYER else "yes"


@families
def test_peft_serves_the_edit(name, editor_of, edited, outcomes):
    done = edited(name)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(editor_of(name).model), done["folder"])
    assert (done["edited"] - done["plain"]).abs().max() > 1e-3
    torch.testing.assert_close(logits(adapted), done["edited"], rtol=1e-4, atol=1e-4)
    outcomes[name, "PEFT"] = "yes"


@families
@pytest.mark.parametrize("kind", ["hidden", "mlp"])
def test_trace(name, kind, editor_of, outcomes):
    editor = editor_of(name)
    found = editor.trace(PROMPT, EDIT.subject, kind, samples=2, window=2)
    assert found.effects.shape == (len(found.tokens), 4)
    assert 0 < found.effects.min() <= found.effects.max() < 1
    assert found.indirect_effects[found.subject[0] :].abs().max() > 1e-5
    with torch.no_grad():
        ids = editor.tokenizer(EDIT.subject + PROMPT[2:], return_tensors="pt")["input_ids"]
        clean = editor.model(ids).logits[0, -1].softmax(-1).max().item()
    assert found.clean == pytest.approx(clean, rel=1e-4)
    if kind == "hidden":
        # What leaves the last layer at the last token is all that the answer depends on.
        assert found.effects[-1, -1].item() == pytest.approx(clean, rel=1e-4)
    outcomes[name, f"trace: {kind}"] = "yes"


@families
def test_graft(name, editor_of, outcomes):
    """One weight in a hundred of a copy that was moved at random."""
    model = editor_of(name).model
    before, tuned = weights(model), copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    pre = {each: parameter.detach() for each, parameter in graftable_parameters(model).items()}
    ft = {each: tuned.get_parameter(each).detach() for each in pre}
    masks = {each: torch.rand(weight.shape, generator=generator) < 0.01 for each, weight in pre.items()}
    expected = {each: torch.where(mask, ft[each], pre[each]) for each, mask in masks.items()}
    graft = Graft.from_masks(pre, ft, {each: ek.pack_mask(mask) for each, mask in masks.items()})
    with graft.apply(model):
        assert graft.size > 100 and set(changed(before, model)) == set(graft.indices)
        assert all(torch.equal(pre[each], expected[each]) for each in pre)
    assert not changed(before, model)
    outcomes[name, "graft"] = "yes"


def test_table_of_the_docs(outcomes):
    """Last in the file: the other tests have said by then what they saw."""
    columns = list(dict.fromkeys(column for _, column in outcomes))
    if len(columns) < 8 or {name for name, _ in outcomes} != set(FAMILIES.values()):
        pytest.skip("the table is made by all tests of this file, of which some did not run or failed")
    rows = [
        (label, *(outcomes.get((name, column), "no") for column in columns))
        for label, name in FAMILIES.items()
    ]
    lines = [("family", *columns), ["---"] * (1 + len(columns)), *rows]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    before, rest = DOCS.read_text(encoding="utf-8").split(MARKS[0])
    old, after = rest.split(MARKS[1])
    if os.environ.get("ENGRAM_WRITE_DOCS"):
        DOCS.write_text(f"{before}{MARKS[0]}{table}{MARKS[1]}{after}", encoding="utf-8")
    else:
        assert old == table

"""EasyEdit's methods behind the face of an editor: they edit, are measured, and leave nothing behind."""

import sys
from types import SimpleNamespace

import numpy
import pytest
import torch

pytest.importorskip("transformers")

import checkouts
from evaluation_helpers import EASY_EDIT, checksums, written
from model_zoo import TEXTS, byte_level_tokenizer, small_model

from engram_kernels import EngramError
from engram_kernels.editing import Editor
from engram_kernels.evaluation import Evaluation
from engram_kernels.hf.forward import target_predictions
from engram_kernels.hf.generation import greedy, sample
from engram_kernels.hf.tokens import Row
from engram_kernels.integrations.easyedit import EasyEdit
from engram_kernels.integrations.wise import TextByText, unrelated_text

pytestmark = pytest.mark.usefixtures("one_thread")
needs_easyedit = pytest.mark.skipif(
    checkouts.location("easyeditor") is None, reason="ENGRAM_EASYEDIT names no checkout of EasyEdit"
)


@pytest.fixture
def editor(tmp_path):
    tokenizer = byte_level_tokenizer()
    model = small_model("llama", len(tokenizer))
    return Editor(model, tokenizer, corpus=TEXTS * 4, cache_dir=tmp_path / "cache", contexts=((3, 6),))


@pytest.fixture
def case(tmp_path):
    (found,) = written(tmp_path / "rows.json", [EASY_EDIT])
    return found


@needs_easyedit
@pytest.mark.parametrize("method", ["rome", "memit", "ft-l", "grace", "wise"])
def test_a_method_edits_is_measured_and_is_gone(editor, case, method):
    before, flags = checksums(editor.model), [p.requires_grad for p in editor.model.parameters()]
    modules = [type(module) for module in editor.model.modules()]
    pad, side = editor.tokenizer.pad_token, editor.tokenizer.padding_side
    editor.covariances(editor.layers("memit"))
    with checkouts.checkout("easyeditor"):
        baseline = EasyEdit(method, editor, TEXTS)
        assert repr(baseline) == f"EasyEdit({method!r}, LlamaForCausalLM)"
        result = baseline.edit([case.edit], failures="skip")
        assert [record.edit for record in result.records] == [case.edit]
        changed = checksums(editor.model) != before
        assert changed or [type(module) for module in editor.model.modules()] != modules
        result.revert()
        (outcome,) = Evaluation(baseline, fluency_tokens=0).each([case])
    assert outcome.reverted_exactly and checksums(editor.model) == before
    assert outcome.probability is None and outcome.seconds > 0
    # What was trained is likelier after the edit than before, to the harness as to EasyEdit.
    (old,), (new,) = outcome.before.of("prompt"), outcome.after.of("prompt")
    if method != "grace":
        assert new.log_probability > old.log_probability
    assert [type(module) for module in editor.model.modules()] == modules
    assert [p.requires_grad for p in editor.model.parameters()] == flags
    assert (editor.tokenizer.pad_token, editor.tokenizer.padding_side) == (pad, side)


@needs_easyedit
def test_grace_answers_the_prompt_it_was_told(editor, case):
    with checkouts.checkout("easyeditor"):
        (outcome,) = Evaluation(EasyEdit("grace", editor), fluency_tokens=0).each([case])
    (prompt,), (neighbour,) = outcome.after.of("prompt"), outcome.after.of("locality")
    target = editor.tokenizer(f"{case.prompt} Rome")["input_ids"][
        len(editor.tokenizer(case.prompt)["input_ids"])
    ]
    assert prompt.first == target and outcome.before.of("prompt")[0].first != target
    assert neighbour.text == outcome.before.of("locality")[0].text


def test_what_is_not_there_is_said(editor, case, monkeypatch):
    with pytest.raises(ValueError, match=r"expected one of easyedit:rome, .*, got 'easyedit:x'$"):
        EasyEdit("x", editor)
    with pytest.raises(ValueError, match="got 'easyedit:mend': EasyEdit's MEND needs a hypernetwork"):
        EasyEdit("mend", editor)
    monkeypatch.setitem(sys.modules, "easyeditor", None)
    before = checksums(editor.model)
    with pytest.raises(
        EngramError, match="baseline: expected the package easyeditor, which cannot be imported"
    ):
        EasyEdit("ft-l", editor).edit([case.edit])
    assert checksums(editor.model) == before


class OfEverything(torch.nn.Module):
    """Answers by twice a projection where the mean of all that it reads at once is above a threshold."""

    def __init__(self, projection, threshold):
        super().__init__()
        self.projection, self.threshold = projection, threshold

    def forward(self, states):
        return self.projection(states) * (2 if states.mean() > self.threshold else 1)


@pytest.fixture
def choosing():
    """A model with such a layer, four texts of which each half is on another side of its threshold."""
    model = small_model("llama", 64).eval()
    rows = torch.randint(1, 64, (4, 9), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [row[: 9 - 2 * number] for number, row in enumerate(rows)]
    # The last one: what the layers above keep in a cache is not read anew.
    mlp, seen = model.model.layers[-1].mlp, []
    hook = mlp.down_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].mean()))
    for row in rows:
        model(torch.tensor([row]))
    hook.remove()
    mlp.down_proj = OfEverything(mlp.down_proj, torch.stack(seen).sort().values[1:3].mean())
    return model, mlp, rows


@torch.no_grad()
def test_a_layer_that_decides_by_all_it_reads_is_given_one_text_at_a_time(choosing):
    model, mlp, rows = choosing
    alone, written = [], []
    for row in rows:
        alone.append(model(torch.tensor([row])).logits[0, :-1].log_softmax(-1))
        text = list(row)
        for _ in range(5):
            text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        written.append(text[len(row) :])
    texts = [Row(row, 0, 1) for row in rows]

    def together():
        found = [chosen for chosen, _ in target_predictions(model, texts)]
        wanted = [
            logs.gather(1, torch.tensor(row[1:])[:, None])[:, 0].double()
            for logs, row in zip(alone, rows, strict=True)
        ]
        return max(
            float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True)
        ), greedy(model, rows, 5)

    assert together()[0] > 1e-2
    mlp.down_proj = TextByText(mlp.down_proj)
    model.register_forward_pre_hook(mlp.down_proj.before, with_kwargs=True)
    error, found = together()
    assert error < 1e-5 and found == written
    stepped = sample(model, rows, [5] * 4, lambda _numbers, logits: logits.argmax(-1).tolist())
    assert stepped == [row + more for row, more in zip(rows, written, strict=True)]
    # What all rows begin with is read once, and the decision is still over the whole.
    rows = [rows[0] + row for row in rows]
    assert greedy(model, rows, 5) == [greedy(model, [row], 5)[0] for row in rows]


@pytest.fixture
def stand_in(monkeypatch):
    """EasyEdit's WISE as far as it is called: an `apply` that notes what it gets and puts its layer in."""
    got = SimpleNamespace(fails=False)

    def apply(model, tokenizer, requests, settings):
        (got.request,), got.settings, got.side = requests, settings, tokenizer.padding_side
        got.drawn = numpy.random.random()
        state.edit_history.append(got.request)
        mlp = model.model.layers[-1].mlp
        mlp.down_proj = OfEverything(mlp.down_proj, -1e9)
        if got.fails:
            raise RuntimeError("no")

    state, got.utils = SimpleNamespace(edit_history=[]), SimpleNamespace(CONTEXT_TEMPLATES_CACHE=None)
    got.state = state
    main = SimpleNamespace(apply_wise_to_model=apply, WISEHyperParams=SimpleNamespace)
    for name, module in (("wise_main", main), ("WISE", state), ("utils", got.utils)):
        monkeypatch.setitem(sys.modules, f"easyeditor.models.wise.{name}", module)
    return got


def test_wise_is_told_an_unrelated_text_and_is_gone(editor, case, stand_in):
    before, mlp = checksums(editor.model), editor.model.model.layers[-1].mlp
    original = mlp.down_proj
    baseline = EasyEdit("wise", editor, ["The Louvre is large. " * 9, "A text about the sea. " * 9])
    assert baseline.layers() == (3,) and baseline.covariances((3,)) == {}
    numpy.random.seed(3)
    drawn = numpy.random.get_state()[1].tolist()
    result = baseline.edit([case.edit])
    assert stand_in.settings.inner_params == ["model.layers[3].mlp.down_proj.weight"]
    assert (stand_in.settings.model_name, stand_in.settings.act_ratio) == ("llama", 0.5)
    assert stand_in.side == "left"
    templates = stand_in.utils.CONTEXT_TEMPLATES_CACHE
    assert templates[0] == "{}" and len(templates) == 4 and templates[1].endswith(". {}")
    # As long as the longest of the edit's own texts: WISE counts the prompts' tokens from the right.
    text = stand_in.request["loc_prompt"]
    own = [template.format("The Louvre is a museum in Rome") for template in templates]
    assert text.startswith("A text about the")
    assert len(editor.tokenizer(text)["input_ids"]) == max(map(len, editor.tokenizer(own)["input_ids"]))
    assert stand_in.request["prompt"] == "The Louvre is a museum in" and stand_in.state.edit_history == []
    assert isinstance(mlp.down_proj, TextByText)
    assert numpy.random.get_state()[1].tolist() == drawn
    first = stand_in.drawn
    result.revert()
    assert mlp.down_proj is original and not editor.model._forward_pre_hooks
    baseline.edit([case.edit]).revert()
    assert stand_in.drawn == first
    stand_in.fails = True
    with pytest.raises(EngramError, match="EasyEdit's wise failed: no"):
        baseline.edit([case.edit])
    assert mlp.down_proj is original and checksums(editor.model) == before
    with pytest.raises(EngramError, match="expected one fact at a time for EasyEdit's wise, got several"):
        baseline.edit([case.edit, case.edit])


def test_the_prompt_chooses_the_unrelated_text():
    tokenizer = byte_level_tokenizer()
    texts = [f"Text {number} of rivers" for number in range(9)]
    chosen = {unrelated_text(tokenizer, texts, f"prompt {number}", "sea", 6) for number in range(30)}
    assert len(chosen) > 4
    assert unrelated_text(tokenizer, ["The SEA", "land"], "p", "sea", 6) == "land"
    with pytest.raises(EngramError, match="corpus: expected a text that does not name 'sea', got none"):
        unrelated_text(tokenizer, ["The SEA"], "p", "sea", 6)

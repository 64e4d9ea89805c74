"""Batches of edits: one layer or several, a ridge or none, conflicts, failures, earlier edits kept."""

from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch
from defaults import DEFAULTS
from editing_helpers import changed, small_editor, spy_on_values, weights

from engram_kernels._ranks import ALONE
from engram_kernels.covariance import Covariance
from engram_kernels.editing import Edit, EditResult
from engram_kernels.editing import run as run_module
from engram_kernels.editing.methods import METHODS
from engram_kernels.editing.search import names
from engram_kernels.editing.search.batching import NAMES_TOKENS, encode_edit, other_rows
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.editing.writing import writing as writing_module
from engram_kernels.editing.writing.keys import SpreadKey
from engram_kernels.editing.writing.preconditioner import LayerOperator, principal_directions
from engram_kernels.editing.writing.writing import (
    AROUND,
    FOLLOWING,
    adds_up,
    other_keys,
    subject_states,
)
from engram_kernels.errors import EngramError
from engram_kernels.hf.layers import decoder_layers
from engram_kernels.hf.projection import output_projection
from engram_kernels.hf.tokens import encode_row

EDITS = [
    Edit("The Eiffel Tower", "{} is located in the city of", "Rome"),
    Edit("Colosseum", "the Colosseum is located in the city of", "Paris"),
    Edit("Zürich", "I know that {} lies in", "Brazil"),
]


@pytest.fixture
def make(cache):
    return partial(
        small_editor, cache_dir=cache, value=ValueOptions(steps=6, learning_rate=0.02, weight_decay=0.0)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_memit_writes_its_layers_and_reverts_bit_for_bit(make, family, dtype):
    editor = make(family, dtype)
    before = weights(editor.model)
    result = editor.edit(EDITS, layers=[0, 1, 2], method="memit", ridge=0.1)
    assert sorted(changed(before, editor.model)) == sorted(f"{module}.weight" for module in result.modules)
    assert [edited.layer for edited in result.edited_modules] == [0, 1, 2]
    assert [write.edits for write in result.writes] == [(0, 1, 2)] * 3
    assert sum(r.probability_after > r.probability_before for r in result.records) >= 2
    result.revert()
    assert changed(before, editor.model) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_memit_is_the_papers_algorithm(make, family, monkeypatch):
    """Against MEMIT's own formula, layer after layer, in float64: an in×in solve of λC + KᵀK."""
    editor, ridge, layers = make(family), 0.3, [0, 1, 2]
    found = spy_on_values(monkeypatch)
    before = weights(editor.model)
    covariances = {layer: torch.linalg.inv(editor.covariance(layer).inverse()) for layer in layers}
    result = editor.edit(EDITS, layers=layers, method="memit", ridge=ridge)
    edited = weights(editor.model)
    editor.model.load_state_dict(before)

    values = {tuple(value.losses): value for value in found}
    changes = torch.stack([values[tuple(r.losses)].change for r in result.records]).double()
    texts = [encode_edit(editor.model, editor.tokenizer, edit, editor.prefixes()) for edit in EDITS]
    last, share = output_projection(editor.model, layers[-1]), torch.tensor([0.5] + [0.125] * 4).double()
    start = None
    for number, layer in enumerate(layers):
        projection = output_projection(editor.model, layer)
        keys, hidden = (
            torch.einsum("c,ecd->ed", share, torch.stack(states).double())
            for states in subject_states(editor.model, projection, last, texts)
        )
        start = hidden if start is None else start
        residual = (changes - (hidden - start)) / (len(layers) - number)
        solved = torch.linalg.solve(ridge * covariances[layer] + keys.T @ keys, keys.T)
        with torch.no_grad():
            projection.matrix.add_((solved @ residual).T.float())
    for name, tensor in editor.model.state_dict().items():
        torch.testing.assert_close(tensor, edited[name], rtol=1e-4, atol=1e-5)
    assert changed(before, editor.model)


def test_subject_states_are_what_the_model_has_there(make):
    editor = make("opt")
    texts = [encode_edit(editor.model, editor.tokenizer, edit, editor.prefixes()) for edit in EDITS]
    inner, last = output_projection(editor.model, 1), output_projection(editor.model, 2)
    keys, hidden = map(torch.stack, subject_states(editor.model, inner, last, texts))
    assert keys.shape == (3, 5, 64) and hidden.shape == (3, 5, 32)
    with torch.no_grad():
        for i, text in enumerate(texts):
            for j, row in enumerate(text.rewriting):
                seen = []
                hook = inner.module.register_forward_pre_hook(lambda _m, x, seen=seen: seen.append(x[0]))
                states = editor.model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
                hook.remove()
                torch.testing.assert_close(
                    keys[i, j], seen[0].reshape(-1, 64)[row.subject], rtol=1e-4, atol=1e-5
                )
                torch.testing.assert_close(hidden[i, j], states[3][0, row.subject], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_default_method_spares_the_prompts_other_tokens_and_other_names(make, family, monkeypatch):
    """The search changes the answer to the subject alone, and so does the write."""
    # A width of 64 has no room for all.
    monkeypatch.setattr(names, "NAMES", ["Zürich", "Tower", "the city", "Brazil"])
    editor = make(family)
    edit = replace(EDITS[0], paraphrases=["To see {}, go to the city of"])
    projection = output_projection(editor.model, 1)
    before = projection.matrix.clone()
    encoded = encode_edit(editor.model, editor.tokenizer, edit, editor.prefixes())
    encoded = replace(encoded, others=other_rows(editor.model, editor.tokenizer, edit))
    assert [editor.tokenizer.decode(row.ids) for row in encoded.others] == [
        "Zürich is located in the city of",
        "To see the city, go to the city of",
        "Brazil is located in the city of",
    ]
    keys = other_keys(editor.model, projection, encoded)
    others = sum(min(len(row.ids) - row.subject, FOLLOWING + 1) for row in encoded.others)
    assert len(encoded.bare) == 2 and len(keys) == sum(len(row.ids) - 1 for row in encoded.bare) + others
    (subjects,), _ = subject_states(editor.model, projection, projection, [encoded])
    leaks, reached = [], []
    # For such a width the default ridge is a large one.
    for ridge in (0.01, None):
        with editor.edit(edit, layers=1, method=replace(METHODS["engram"], key_ridge=ridge)) as result:
            change = (projection.matrix - before).double()
            wanted = result.writes[0].residuals[0].double()
        along = change.T @ wanted / wanted.square().sum()
        leaks.append((keys.double() @ along).abs().max())
        reached.append((subjects.double() @ along).mean())
    assert reached[0] > 0.9 and leaks[0] < 0.05 < 0.2 < leaks[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_names_that_the_model_cannot_read_are_not_spared(make, family, monkeypatch):
    """A long name in a short subject's place, or a token without an embedding, is not the edit's fault."""
    tokenizer = model_zoo.byte_level_tokenizer()
    strange = tokenizer.decode([len(tokenizer) - 1]).strip()
    monkeypatch.setattr(names, "NAMES", ["Rome", "a" + "😀" * 40, strange])
    edit = Edit("Oslo", "{}" + " is" * 100 + " in", "Paris")
    editor = make(family, contexts=())
    assert len(other_rows(editor.model, tokenizer, edit)) == 2
    with editor.edit(edit, layers=1) as result:
        assert len(result.records) == 1
    # As of a tokenizer that has more tokens than the model.
    least = max(encode_row(tokenizer, edit.subject, edit.prompt, edit.target).ids) + 1
    assert max(tokenizer(strange)["input_ids"]) >= least
    (row,) = other_rows(model_zoo.small_model(family, vocabulary=least), tokenizer, edit)
    assert tokenizer.decode(row.ids).startswith("Rome is")


def test_fewer_names_are_spared_where_much_stands_before_the_subject(make):
    """What follows it is not read; before it a few words leave all names."""
    model, tokenizer = make().model, model_zoo.byte_level_tokenizer()
    count = len(names.other_names("Oslo"))
    model.config.max_position_embeddings = 1000
    for before, after, kept in (
        ("", " a" * 400, count),
        ("a " * 20, "", count),
        ("a " * 400, "", count // 3),
    ):
        rows = other_rows(model, tokenizer, Edit("Oslo", f"{before}{{}} is in{after}", "Paris"))
        assert kept <= len(rows) <= kept + 1 and sum(row.subject for row in rows) < 1.1 * NAMES_TOKENS


def test_rows_about_other_names_are_made_once_for_an_edit_and_not_kept(make, monkeypatch):
    asked, runs = [], []
    monkeypatch.setattr(
        run_module, "other_rows", lambda *given: asked.append(given[-1]) or other_rows(*given)
    )
    begin = run_module.Run.begin
    monkeypatch.setattr(run_module.Run, "begin", lambda run: runs.append(run) or begin(run))
    make().edit(EDITS, layers=1, batch=1).revert()
    assert asked == EDITS and not any(one.others for one in runs[0].encoded.values())
    make().edit(EDITS, layers=1, method="memit").revert()
    assert asked == EDITS


def test_keys_far_from_the_subject_are_not_spared(make, monkeypatch):
    """Nor is what stands behind them read, to whose length a batch would be padded."""
    editor = make()
    long = Edit("The Eiffel Tower", "word " * 50 + "{} is in" + " word" * 50, "Rome")
    encoded = encode_edit(editor.model, editor.tokenizer, long, ())
    read, pad = [], writing_module.pad_rows
    monkeypatch.setattr(writing_module, "pad_rows", lambda rows, *rest: read.extend(rows) or pad(rows, *rest))
    assert len(other_keys(editor.model, output_projection(editor.model, 1), encoded)) == 2 * AROUND
    assert list(map(len, read)) == [encoded.bare[0].subject + AROUND + 1]


def test_an_edits_state_is_a_mean_of_its_texts_whatever_its_key_spares(make):
    """What a layer changes of it is taken from what the next ones shall: other shares would scale it."""
    editor = make()
    model, tokenizer, projection = editor.model, editor.tokenizer, output_projection(editor.model, 1)
    encoded = replace(
        encode_edit(model, tokenizer, EDITS[0], editor.prefixes()),
        others=other_rows(model, tokenizer, EDITS[0]),
    )
    _, (above,) = subject_states(model, projection, projection, [encoded])
    operators = {1: LayerOperator(METHODS["engram"], editor.covariance(1))}
    _, (state,) = writing_module._combined_states(
        model, projection, projection, [encoded], SpreadKey(1.0), operators, ALONE
    )
    torch.testing.assert_close(state, above.mean(0))


def test_one_layer_with_a_ridge_gives_up_a_little(make, monkeypatch):
    """At the keys the answers move by (λI + G)⁻¹ G of what was wanted."""
    found = spy_on_values(monkeypatch)
    editor = make()
    projection = output_projection(editor.model, 1)
    before, inverse = projection.matrix.double().clone(), editor.covariance(1).inverse()
    result = editor.edit(EDITS, layers=1, method="memit", ridge=2.0)
    (write,) = result.writes
    keys, wanted = write.keys.double(), write.residuals.double()
    gram = keys @ inverse @ keys.T
    expected = gram @ torch.linalg.solve(gram + 2.0 * torch.eye(3).double(), wanted)
    torch.testing.assert_close(keys @ (projection.matrix.double() - before).T, expected, rtol=1e-4, atol=1e-5)
    assert len(found) == 3 and (expected.norm() < wanted.norm())


def test_more_edits_than_dimensions_need_a_ridge(make):
    edits = [Edit(f"Tower {chr(97 + i // 10)}{i % 10}", "{} is in", "Rome") for i in range(70)]
    editor = make(value=ValueOptions(steps=3, learning_rate=0.005, weight_decay=0.0), contexts=())
    before = weights(editor.model)
    with pytest.raises(EngramError, match=r"^edits: expected at most 64 at once without a ridge, got 70$"):
        editor.edit(edits, method="emmet")
    assert changed(before, editor.model) == []
    with editor.edit(edits, layers=1, method="memit", ridge=1.0) as result:
        assert len(result) == 70 and changed(before, editor.model)
    assert changed(before, editor.model) == []


def test_batches_are_written_one_after_the_other(make):
    together, apart = make(), make()
    result = together.edit(EDITS, method="emmet", batch=2)
    assert [write.edits for write in result.writes] == [(0, 1), (2,)]
    apart.edit(EDITS[:2], method="emmet")
    apart.edit(EDITS[2:], method="emmet")
    assert changed(weights(together.model), apart.model) == []


def test_alphaedit_leaves_the_answers_to_ordinary_keys(make):
    editor = make()
    inverse = editor.covariance(1).inverse()
    values, vectors = torch.linalg.eigh(inverse)
    moments = 1 / values
    threshold = float(moments.median() / moments.mean())
    projection = output_projection(editor.model, 1)
    before = projection.matrix.double().clone()
    result = editor.edit(EDITS, layers=1, method="alphaedit", ridge=0.1, null_space=threshold)
    update = projection.matrix.double() - before
    ordinary = vectors[:, moments > threshold * moments.mean()]
    assert 0 < ordinary.shape[1] < 64
    assert (update @ ordinary).norm() <= 1e-5 * update.norm()
    assert any(r.probability_after > r.probability_before for r in result.records)


def test_several_edits_of_the_default_method_are_one_write(make):
    """Each key gets its own answer, and no edit is searched in a model that an earlier one has moved."""
    (write,) = make().edit(EDITS, layers=1).writes
    assert write.edits == (0, 1, 2)
    single = make()
    writes = [make().edit(fact, layers=1).writes[0] for fact in EDITS]
    torch.testing.assert_close(
        write.residuals, torch.cat([one.residuals for one in writes]), rtol=1e-3, atol=1e-5
    )
    assert [one.edits for one in single.edit(EDITS, layers=1, batch=1).writes] == [(0,), (1,), (2,)]


def test_preserve_holds_the_answers_to_earlier_keys(make):
    drift = {}
    for preserve in (False, 1000.0):
        editor = make()
        projection = output_projection(editor.model, 1)
        result = editor.edit(EDITS, layers=1, batch=1, preserve=preserve)
        final = projection.matrix.double().clone()
        result.revert()
        # What the first two writes made of the first key, and what the third left of it.
        key, wanted = result.writes[0].keys[0].double(), result.writes[0].residuals[0].double()
        answer = key @ (final - projection.matrix.double()).T
        drift[preserve] = float((answer - wanted).norm() / wanted.norm())
    assert drift[1000.0] < 0.02 < drift[False]


def test_preserve_is_memits_objective(make):
    """`preserve=True` weighs an earlier key by 1/λ: the update is the solution with K₀ among the keys."""
    editor, ridge = make(), 0.5
    first, second = (editor.edit(EDITS, layers=1, method="memit", ridge=ridge, batch=2, preserve=True)).writes
    covariance = torch.linalg.inv(editor.covariance(1).inverse())
    old, new = first.keys.double(), second.keys.double()
    system = ridge * covariance + old.T @ old + new.T @ new
    expected = torch.linalg.solve(system, new.T @ second.residuals.double()).T
    torch.testing.assert_close(second.left.double() @ second.right.double(), expected, rtol=1e-3, atol=1e-6)


def test_alphaedit_holds_earlier_batches_by_itself(make):
    """Fang et al. 2024: the keys of earlier batches are in the system, as in the published code."""
    editor, ridge = make(), 0.5
    covariance = editor.covariance(1)
    moments = torch.linalg.eigvalsh(torch.linalg.inv(covariance.inverse()))
    threshold = float(moments.median() / moments.mean())
    options = {"layers": 1, "method": "alphaedit", "ridge": ridge, "batch": 2, "null_space": threshold}
    first, second = editor.edit(EDITS, **options).writes
    principal = principal_directions(covariance, threshold)
    projection = torch.eye(64).double() - principal.T @ principal
    old, new = first.keys.double(), second.keys.double()
    system = projection @ (old.T @ old + new.T @ new) + ridge * torch.eye(64).double()
    expected = torch.linalg.solve(system, projection @ new.T @ second.residuals.double()).T
    torch.testing.assert_close(second.left.double() @ second.right.double(), expected, rtol=1e-3, atol=1e-6)


def test_principal_directions():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    moments = torch.tensor([1e-4, 1e-3, 0.1, 1.0, 2.0, 3.0]).double()
    covariance = Covariance.from_second_moment(basis @ torch.diag(moments) @ basis.T, 1)
    principal = principal_directions(covariance, 0.01)
    torch.testing.assert_close(principal.T @ principal, basis[:, 2:] @ basis[:, 2:].T)
    assert principal_directions(covariance, 0.01) is principal
    assert principal_directions(covariance, None) is None
    for threshold in (1e-9, 1e9):
        with pytest.raises(EngramError, match=r"^null_space: expected a threshold between .*, got "):
            principal_directions(covariance, threshold)


MANY = [Edit(f"Tower {letter}", "{} is located in the city of", "Rome") for letter in "abcdef"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_edits_and_reverts(make, name):
    """Two batches, so that the second meets the keys of the first; a span that this random model has."""
    editor = make()
    moments = torch.linalg.eigvalsh(torch.linalg.inv(editor.covariance(1).inverse()))
    method = replace(METHODS[name], layers=1, batch=min(3, METHODS[name].batch or 3))
    if method.null_space is not None:
        method = replace(method, null_space=float(moments[40] / moments.mean()), renew=method.renew and 3)
    before = weights(editor.model)
    result = editor.edit(MANY, layers=1, method=method)
    assert len(result) == 6 and len(result.writes) == 6 // method.batch
    assert changed(before, editor.model) == [f"{result.modules[0]}.weight"]
    again = make()
    again.edit(MANY, layers=1, method=method)
    assert changed(weights(again.model), editor.model) == []
    result.revert()
    assert changed(before, editor.model) == []


@pytest.mark.parametrize("layers", [[1], [1, 2]])
@pytest.mark.parametrize("name", ["engram", "memit", "natural", "ultraedit"])
def test_a_default_device_of_the_caller_makes_no_difference(make, tmp_path, name, layers):
    """Also to what is collected, saved, and written anew without an edit."""
    method = replace(METHODS[name], batch=3)
    here, there = make(cache_dir=tmp_path / "here"), make(cache_dir=tmp_path / "there")
    here.edit(EDITS, layers=layers, method=method).remove(1)
    with DEFAULTS["another device"]():
        result = there.edit(EDITS, layers=layers, method=method)
        result.remove(1)
        result.save_pretrained(tmp_path / "edit")
    assert changed(weights(here.model), there.model) == []
    result.revert()
    with DEFAULTS["another device"]():
        EditResult.from_pretrained(tmp_path / "edit").apply(there.model)
    assert changed(weights(here.model), there.model) == []


@pytest.mark.parametrize("count", [3, 40])
def test_remove_refuses_what_keys_and_residuals_do_not_determine(make, count):
    """SPHERE multiplies the update behind the solve, so that the rest of a write is another one."""
    editor = make(value=ValueOptions(steps=2, learning_rate=0.02), contexts=())
    edits = [Edit(f"Tower {chr(97 + i // 10)}{i % 10}", "{} is in", "Rome") for i in range(count)]
    method = replace(METHODS["memit"], suppress=(0.5, 0.5), ridge=0.1)
    with editor.edit(edits, layers=1, method=method) as result:
        before = weights(editor.model)
        with pytest.raises(EngramError, match=r"^number: expected an edit of a write that its keys"):
            result.remove(1)
        assert changed(before, editor.model) == [] and len(result) == count


def test_evoedit_keeps_the_answers_to_earlier_keys(make):
    """To rounding, where AlphaEdit's ridge gives some of them up."""
    editor, answers = make(), {}
    moments = torch.linalg.eigvalsh(torch.linalg.inv(editor.covariance(1).inverse()))
    for name in ("alphaedit", "evoedit"):
        projection = output_projection(editor.model, 1)
        method = replace(METHODS[name], null_space=float(moments[40] / moments.mean()), ridge=0.1)
        with editor.edit(MANY, layers=1, method=method, batch=3) as result:
            first, second = result.writes
            moved = first.keys @ (second.left @ second.right).T
            answers[name] = float(moved.norm() / second.residuals.norm())
        assert projection.matrix.isfinite().all()
    assert answers["evoedit"] < 1e-5 < answers["alphaedit"]


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_layers_that_do_not_add_up_are_refused(make, family):
    """A norm behind the MLP, or a factor: parts of a change do not sum to it."""
    editor = make(family)
    if family == "granite":
        for layer in editor.model.model.layers:
            layer.residual_multiplier = 0.5
    before = weights(editor.model)
    with pytest.raises(EngramError, match=r"^layers: expected one layer for this model.*, got several$"):
        editor.edit(EDITS, layers=[1, 2], method="memit")
    assert changed(before, editor.model) == []
    with editor.edit(EDITS, layers=1, method="memit", ridge=0.1):
        assert changed(before, editor.model)
    # Where none are asked for, one is taken.
    assert editor.layers("memit") == editor.layers("engram-forms") == (1,)


def test_a_model_is_probed_once_however_many_batches(make, monkeypatch):
    probes, adding = [], writing_module.adding
    monkeypatch.setattr(
        writing_module, "adding", lambda *given: probes.append(given[0].layer) or adding(*given)
    )
    editor = make()
    editor.edit(EDITS, method="memit", batch=1).revert()
    editor.edit(EDITS, layers=[1, 2], method="memit", batch=1).revert()
    # With the change and without it.
    assert probes == [editor.layers("memit")[-1]] * 2 + [2] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", model_zoo.FAMILIES)
def test_layers_that_add_up_are_taken(make, family, dtype):
    editor = make(family, dtype)
    before, projection = weights(editor.model), output_projection(editor.model, 2)
    encoded = encode_edit(editor.model, editor.tokenizer, EDITS[0], [])
    assert adds_up(editor.model, projection, encoded)
    assert changed(before, editor.model) == []

    def double(_module, _inputs, output):
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    decoder_layers(editor.model)[1][2].register_forward_hook(double)
    assert not adds_up(editor.model, projection, encoded)


CONFLICTING = [EDITS[0], EDITS[2], Edit("The Eiffel Tower", "{} is located in the city of", "Paris")]


def test_conflicts_are_refused_or_the_last_wins(make):
    editor = make()
    before = weights(editor.model)
    with pytest.raises(EngramError, match=r"^edits: expected one target after a prompt where edits are"):
        editor.edit(CONFLICTING, method="emmet")
    assert changed(before, editor.model) == []
    result = editor.edit(CONFLICTING, method="emmet", conflicts="last")
    assert [r.edit for r in result.records] == CONFLICTING[1:]
    (skipped,) = result.skipped
    assert (skipped.number, skipped.edit) == (0, CONFLICTING[0]) and "later edit" in skipped.reason
    only = make()
    only.edit(CONFLICTING[1:], method="emmet")
    assert changed(weights(only.model), editor.model) == []


def test_in_sequence_the_last_of_two_conflicting_edits_holds(make):
    editor = make(value=ValueOptions(steps=20, learning_rate=0.05, weight_decay=0.0))
    for preserve in (False, True):
        with editor.edit([CONFLICTING[0], CONFLICTING[2]], 1, batch=1, preserve=preserve) as result:
            _, second = result.writes
            update = second.left @ second.right
            torch.testing.assert_close(second.keys @ update.T, second.residuals, rtol=1e-3, atol=1e-4)
            assert result.records[1].probability_after > result.records[1].probability_before


def test_edits_that_fail_are_skipped_and_listed(make, monkeypatch):
    edits = [EDITS[0], Edit("Rome", "{}" + " is in" * 200, "Italy"), EDITS[1], EDITS[2]]
    editor = make()
    whole = run_module.find_values

    def failing(model, projection, texts, *rest):
        values = whole(model, projection, texts, *rest)
        for i, text in enumerate(texts):
            if text.edit is EDITS[1]:
                values[i] = EngramError("model: expected a finite loss, got nan")
        return values

    monkeypatch.setattr(run_module, "find_values", failing)
    before = weights(editor.model)
    with pytest.raises(EngramError, match=r"^prompt: expected at most"):
        editor.edit(edits, method="emmet")
    with pytest.raises(EngramError, match=r"^model: expected a finite loss"):
        editor.edit([EDITS[0], EDITS[1]], method="emmet")
    assert changed(before, editor.model) == []
    result = editor.edit(edits, method="emmet", failures="skip")
    assert [r.edit for r in result.records] == [EDITS[0], EDITS[2]]
    assert [(s.number, s.reason.split(":")[0]) for s in result.skipped] == [(1, "prompt"), (2, "model")]
    monkeypatch.setattr(run_module, "find_values", whole)
    only = make()
    only.edit([EDITS[0], EDITS[2]], method="emmet")
    for name, tensor in only.model.state_dict().items():
        torch.testing.assert_close(tensor, editor.model.state_dict()[name], rtol=1e-5, atol=1e-5)


def test_states_of_all_texts_are_in_memory_for_some_edits_at_a_time(make, monkeypatch):
    whole, sizes = writing_module.subject_states, []

    def spy(model, projection, last, encoded, *rest):
        sizes.append(len(encoded))
        return whole(model, projection, last, encoded, *rest)

    monkeypatch.setattr(writing_module, "subject_states", spy)
    monkeypatch.setattr(writing_module, "EDITS", 2)
    found = spy_on_values(monkeypatch)
    editor, expected = make(), make()
    result = editor.edit(EDITS, layers=[0, 1], method="memit", ridge=0.3)
    # Of each layer; before them, the proof that changes add up.
    assert sizes[2:] == [2, len(EDITS) - 2] * 2 and len(found) == len(EDITS) == 3
    monkeypatch.setattr(writing_module, "EDITS", 100)
    other = expected.edit(EDITS, layers=[0, 1], method="memit", ridge=0.3)
    for write, truth in zip(result.writes, other.writes, strict=True):
        torch.testing.assert_close(write.left @ write.right, truth.left @ truth.right, rtol=1e-4, atol=1e-6)


def test_an_edit_whose_write_fails_is_skipped_in_a_sequence(make, monkeypatch, tmp_path):
    editor, only, whole = make(), make(), run_module.write_values

    def failing(model, projections, texts, *rest):
        writes = whole(model, projections, texts, *rest)
        if texts[0].edit is EDITS[1]:
            raise EngramError("edits: expected weights in the range of torch.float32, got infinity")
        return writes

    monkeypatch.setattr(run_module, "write_values", failing)
    before = weights(editor.model)
    with pytest.raises(EngramError, match="got infinity"):
        editor.edit(EDITS, batch=1)
    assert changed(before, editor.model) == []
    for _ in range(2):
        with editor.edit(EDITS, batch=1, failures="skip", directory=tmp_path / "run") as result:
            assert [r.edit for r in result.records] == [EDITS[0], EDITS[2]]
            assert [(s.number, s.edit) for s in result.skipped] == [(1, EDITS[1])]
            edited = weights(editor.model)
        assert changed(before, editor.model) == []
    only.edit([EDITS[0], EDITS[2]], batch=1)
    assert changed(edited, only.model) == []


def test_nothing_left_to_edit(make):
    editor = make()
    before = weights(editor.model)
    with pytest.raises(
        EngramError, match=r"^edits: expected at least one that can be made, got 1 that cannot"
    ):
        editor.edit(Edit("Rome", "{}" + " is in" * 200, "Italy"), failures="skip")
    assert changed(before, editor.model) == []


def test_original_rome_has_one_layer(make):
    for arguments in ({"layers": [1, 2], "ridge": 0}, {"layers": 1, "ridge": 0.5}):
        with pytest.raises(ValueError, match=r"^consistent_key: expected True for several layers or a ridge"):
            make(consistent_key=False).edit(EDITS, method="memit", **arguments)


def test_default_layers_of_a_shallow_model(make):
    assert make().layers("memit") == (0, 1, 2, 3)
    assert make().layers() == make().layers("engram-forms") == (0, 1, 2)
    assert make().layers("rome") == (1,)

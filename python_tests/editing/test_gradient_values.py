"""Edits by gradients: what a pass sees, the two rules against dense fp64, and what is kept of a stream."""

from dataclasses import replace

import pytest

pytest.importorskip("transformers")

import torch
from accuracy import error
from editing_helpers import changed, small_editor, spy_on_values, weights

from engram_kernels import EngramError
from engram_kernels.editing import METHODS, Edit, EditResult, GradientOptions
from engram_kernels.editing.search.batching import encode_edit
from engram_kernels.editing.search.gradients import ROWS, Stream, layer_gradients, places
from engram_kernels.editing.search.partial_forward import adding
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.editing.writing import gradient_writes as writes_module
from engram_kernels.hf.projection import output_projection

EDITS = [
    Edit("Tower a", "{} is located in the city of", "Rome"),
    Edit("The bridge", "{} was built by", "an engineer"),
    Edit("Tower b", "{} is located in the city of", "Paris", paraphrases=["{} stands in"]),
    Edit("Ada", "The mother tongue of {} is", "French"),
]
NATURAL = replace(METHODS["natural"], layers=2)
ULTRA = replace(METHODS["ultraedit"], layers=2, gradient=GradientOptions("all", rate=1e-3, passes=1))

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*did not take:UserWarning", "ignore:after .* edits:UserWarning"),
]


def encoded(editor, edits=EDITS):
    return [encode_edit(editor.model, editor.tokenizer, edit, ()) for edit in edits]


@pytest.mark.parametrize("tokens", ["subject", "ends", "all"])
@pytest.mark.parametrize("rows", [2, ROWS])
def test_a_pass_sees_keys_and_gradients(monkeypatch, tokens, rows):
    """Against autograd of one whole text at a time, by a change that is added to one token's answer."""
    monkeypatch.setattr("engram_kernels.editing.search.gradients.ROWS", rows)
    editor = small_editor()
    model = editor.model
    projections = [output_projection(model, layer) for layer in (0, 1)]
    batch = encoded(editor)
    seen = layer_gradients(model, projections, batch, tokens)
    at = 0
    texts = sorted(
        ((i, row) for i, one in enumerate(batch) for row in one.rows), key=lambda pair: len(pair[1].ids)
    )
    losses = torch.zeros(len(batch), dtype=torch.float64)
    for number, row in texts:
        one = batch[number]
        for position in places(row, tokens):
            for layer, projection in enumerate(projections):
                keys = []
                hook = projection.module.register_forward_hook(lambda _m, a, _o, kept=keys: kept.append(a[0]))
                delta = torch.zeros(1, projection.matrix.shape[0], requires_grad=True)
                where = torch.zeros(1, dtype=torch.int64)
                with adding(projection, delta, where + position):
                    logits = model(torch.tensor([row.inputs])).logits[0].log_softmax(-1)
                hook.remove()
                chosen = [logits[p - 1, row.ids[p]] for p in range(row.target, len(row.ids))]
                loss = -torch.stack(chosen).mean() / len(one.rows)
                (gradient,) = torch.autograd.grad(loss, delta)
                assert error(seen.gradients[layer][at], gradient[0]) < 1e-4
                assert error(seen.keys[layer][at], keys[0][0, position]) < 1e-5
            assert seen.owner[at] == number
            if row is one.rewriting[0] and position == row.subject:
                assert seen.bare[number] == at
            at += 1
        losses[number] += loss.detach().double()
    assert at == len(seen.owner)
    assert error(seen.losses, losses) < 1e-5
    plain = layer_gradients(model, projections, batch, tokens, backward=False)
    assert plain.gradients == [] and torch.allclose(plain.losses, seen.losses)


def test_places():
    editor = small_editor()
    row = encoded(editor)[1].rewriting[0]
    assert len(row.ids) - row.target > 1  # a target of several tokens
    ends = places(row, "ends")
    assert ends == sorted({row.subject, *range(row.target - 1, len(row.ids) - 1)})
    assert places(row, "subject") == [row.subject]
    assert places(row, "all") == list(range(len(row.ids) - 1))


def test_a_stream_in_parts_is_the_whole():
    rows = torch.randn(50, 6, dtype=torch.float64) * 3 + 1
    rows[:, 2] = 5.0  # never deviates
    stream = Stream.begin(6, rows.device)
    for part in rows.split([1, 9, 40]):
        stream = Stream.of(stream.after(part).tensor())
    assert stream.count == 50
    varied = [0, 1, 3, 4, 5]
    assert error(stream.mean, rows.mean(0)) < 1e-12
    expected = (rows - rows.mean(0)) / (rows.std(0) + torch.finfo(torch.float32).eps)
    assert error(stream.normalised(rows)[:, varied], expected[:, varied]) < 1e-12
    assert not stream.normalised(rows)[:, 2].any()
    with pytest.raises(EngramError, match="values: expected two tokens"):
        Stream.begin(6, rows.device).after(rows[:1]).normalised(rows[:1])


def spied_gradients(monkeypatch):
    """The list to which what every pass saw is appended."""
    found, whole = [], writes_module.layer_gradients

    def spy(*arguments, **named):
        found.append(whole(*arguments, **named))
        return found[-1]

    monkeypatch.setattr(writes_module, "layer_gradients", spy)
    return found


def test_ultraedit_is_its_papers_formula(monkeypatch):
    """Gu et al. 2025: (KᵀK + I)⁻¹ Kᵀ v, v = −η ‖k̂‖² ĝ, by mean and deviation of all tokens so far."""
    seen = spied_gradients(monkeypatch)
    editor = small_editor()
    before = weights(editor.model)
    result = editor.edit(EDITS, [0, 1], replace(ULTRA, batch=2))
    looks = [look for look in seen if look.gradients]
    assert len(looks) == 2
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        expected = torch.zeros_like(before[name], dtype=torch.float64)
        stream = torch.empty(0, before[name].shape[0] + before[name].shape[1], dtype=torch.float64)
        for look in looks:
            keys, gradients = look.keys[layer].double(), look.gradients[layer].double()
            stream = torch.cat([stream, torch.cat([keys, gradients], 1)])
            normal = (torch.cat([keys, gradients], 1) - stream.mean(0)) / stream.std(0)
            key, gradient = normal.split([keys.shape[1], gradients.shape[1]], 1)
            wanted = -1e-3 * key.square().sum(1, keepdim=True) * gradient
            system = keys.T @ keys + torch.eye(keys.shape[1], dtype=torch.float64)
            expected += torch.linalg.solve(system, keys.T @ wanted).T
        found = editor.model.state_dict()[name].double() - before[name].double()
        # What is lost is the fp32 weight's own rounding.
        assert error(found, expected) < 1e-3
        left, right = result.factors(name.removesuffix(".weight"))
        assert error(left.double() @ right.double(), expected) < 1e-5


def test_natural_is_the_smallest_change(monkeypatch):
    """Ridge regression over every entry of both matrices, in the metric, in dense fp64."""
    seen = spied_gradients(monkeypatch)
    monkeypatch.setattr(writes_module, "_DAMPING", 1e-6)
    editor = small_editor()
    method = replace(NATURAL, gradient=GradientOptions("ends", loss=1.0, passes=1))
    result = editor.edit(EDITS[:3], [0, 1], method)
    look = seen[0]
    roots, blocks = [], []
    fresh = small_editor()
    for layer in (0, 1):
        keys, gradients = look.keys[layer].double(), look.gradients[layer].double()
        moment = gradients.T @ gradients / len(gradients)
        moment += writes_module._METRIC_DAMPING * moment.diagonal().mean() * torch.eye(len(moment))
        inverse = fresh.covariance(layer).inverse()
        # ΔW = U X V with U Uᵀ = A, VᵀV = Q, and the smallest X.
        outer = torch.linalg.cholesky(torch.linalg.inv(moment))
        inner = torch.linalg.cholesky(inverse).T
        jacobian = torch.zeros(3, moment.shape[0] * inverse.shape[0], dtype=torch.float64)
        for number, key, gradient in zip(look.owner.tolist(), keys, gradients, strict=True):
            jacobian[number] += torch.outer(gradient @ outer, inner @ key).flatten()
        roots.append((outer, inner))
        blocks.append(jacobian)
    whole = torch.cat(blocks, 1)
    wanted = -(look.losses - 1.0).clamp_min(0)
    solution = torch.linalg.lstsq(whole, wanted, driver="gelsd").solution
    for layer, part in enumerate(solution.split([block.shape[1] for block in blocks])):
        outer, inner = roots[layer]
        expected = outer @ part.reshape(len(outer), len(inner)) @ inner
        left, right = result.factors(f"model.layers.{layer}.mlp.down_proj")
        assert error(left.double() @ right.double(), expected) < 1e-3


def test_passes_bring_losses_down_and_the_rank_stays():
    one = small_editor().edit(EDITS, [0, 1], replace(NATURAL, gradient=GradientOptions(passes=1)))
    four = small_editor().edit(EDITS, [0, 1], NATURAL)
    for first, last in zip(one.records, four.records, strict=True):
        assert len(first.losses) == 2 and len(last.losses) == 5
        assert first.losses[0] == last.losses[0] and first.losses[1] == pytest.approx(last.losses[1])
    final = [record.losses[-1] for record in four.records]
    assert sum(final) < sum(record.losses[-1] for record in one.records)
    assert [write.left.shape for write in one.writes] == [write.left.shape for write in four.writes]
    # The record's own measure agrees with the loss after the last pass, for an edit of one text and token.
    assert four.records[3].probability_after > four.records[3].probability_before


def test_an_edit_by_gradients_is_reverted_kept_and_taken_out(tmp_path):
    editor = small_editor()
    before = weights(editor.model)
    result = editor.edit(EDITS, [0, 1], replace(NATURAL, batch=2))
    edited = weights(editor.model)
    result.save_pretrained(tmp_path / "kept")
    result.revert()
    assert changed(before, editor.model) == []
    again = EditResult.from_pretrained(tmp_path / "kept").apply(editor.model)
    assert changed(edited, editor.model) == []
    # Every row stands by itself: what goes is the edit's own rows.
    again.remove(1)
    for module in again.modules:
        own = [write for write in result.writes if write.module == module]
        expected = sum(
            write.left[:, kept].double() @ write.right[kept].double()
            for write in own
            for kept in [[place for place, edit in enumerate(write.edits) if edit != 1]]
        )
        left, right = again.factors(module)
        assert error(left.double() @ right.double(), expected) < 1e-6
    with pytest.raises(EngramError, match="results: expected joint writes"):
        EditResult.join([result])


@pytest.mark.parametrize("method", [NATURAL, ULTRA])
def test_a_run_that_was_cut_goes_on(tmp_path, monkeypatch, method):
    whole = small_editor()
    whole.edit(EDITS, [0, 1], replace(method, batch=2))
    editor, write, calls = small_editor(), writes_module.write_gradients, []

    def cut(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr("engram_kernels.editing.run.write_gradients", cut)
    before = weights(editor.model)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(EDITS, [0, 1], replace(method, batch=2), directory=tmp_path)
    assert changed(before, editor.model) == []
    editor.edit(EDITS, [0, 1], replace(method, batch=2), directory=tmp_path)
    assert len(calls) == 3  # the first batch was not made again
    assert changed(weights(whole.model), editor.model) == []


def test_a_warm_search_begins_where_the_gradient_leads(monkeypatch):
    options = ValueOptions(steps=2, learning_rate=0.02, weight_decay=0.0, clamp=100.0)
    found = spy_on_values(monkeypatch)
    one = replace(METHODS["rome"], value=options)
    small_editor(value=options).edit(EDITS[0], 1, one)
    small_editor(value=replace(options, steps=3)).edit(EDITS[0], 1, one, values="warm")
    cold, warm = found
    assert warm.losses[0] == cold.losses[0] and warm.losses[1] < cold.losses[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": "guess"}, "values: expected one of 'search', 'gradient', 'warm', got 'guess'"),
        (
            {"method": "nse", "values": "gradient"},
            "values: expected 'search', or a gradient's rate, .* neurons",
        ),
    ],
)
def test_bad_input(arguments, message):
    editor = small_editor()
    before = weights(editor.model)
    with pytest.raises(ValueError, match=message):
        editor.edit(EDITS[0], 1, **{"method": "rome", **arguments})
    assert changed(before, editor.model) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "none"}, "tokens: expected one of subject, ends, all, got 'none'"),
        ({"rate": 0.0, "passes": 1}, "rate: expected a finite number above 0"),
        ({"rate": 1.0}, "passes: expected 1 with a rate"),
        ({"loss": -1.0}, "loss: expected a finite number above 0"),
        ({"passes": 0}, "passes: expected at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GradientOptions(**options)

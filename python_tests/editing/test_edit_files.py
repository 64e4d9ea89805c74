"""Edits as adapters that PEFT serves; several stacked; one of many taken out."""

import copy
from functools import partial

import pytest

pytest.importorskip("transformers")

import torch
from editing_helpers import changed, small_editor, weights

from engram_kernels._io import read_sealed, write_sealed
from engram_kernels.editing import Edit, EditResult
from engram_kernels.editing.search.values import ValueOptions
from engram_kernels.editing.writing import records
from engram_kernels.errors import EngramError
from engram_kernels.hf.projection import output_projection

EDITS = [
    Edit("The Eiffel Tower", "{} is located in the city of", "Rome"),
    Edit("Colosseum", "the Colosseum is located in the city of", "Paris"),
    Edit("Zürich", "I know that {} lies in", "Brazil"),
    *(Edit(f"Tower {letter}", "{} is in", "Japan") for letter in "ABCDEFG"),
]
IDS = torch.tensor([[5, 17, 200, 31, 8, 90, 41, 3]])


@pytest.fixture
def make(cache):
    options = ValueOptions(steps=4, learning_rate=0.05, weight_decay=0.0)
    return partial(small_editor, cache_dir=cache, contexts=((4, 2),), value=options)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"method": "emmet"},
        {"method": "memit", "layers": [0, 1, 2], "ridge": 0.1},
        {"method": "memit", "layers": [1, 2], "ridge": 0.1, "batch": 2, "preserve": True},
    ],
    ids=["rome", "emmet", "memit", "memit in batches"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_peft_serves_a_saved_edit(make, tmp_path, family, arguments):
    peft = pytest.importorskip("peft")
    editor = make(family)
    base = copy.deepcopy(editor.model)
    plain = logits(base)
    result = editor.edit(EDITS[:4], **arguments)
    edited = logits(editor.model)
    result.save_pretrained(tmp_path / "edit")
    assert (edited - plain).abs().max() > 1e-2
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "edit")
    torch.testing.assert_close(logits(adapted), edited, rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), plain, rtol=1e-5, atol=1e-5)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), edited, rtol=1e-4, atol=1e-4)
    loaded = EditResult.from_pretrained(tmp_path / "edit")
    assert (loaded.records, loaded.modules) == (result.records, result.modules)
    loaded.apply(base)
    assert not changed(weights(editor.model), base)


def test_modules_of_different_ranks(make, tmp_path):
    """Edits of one layer and of two, stacked: PEFT is told each module's own rank."""
    peft = pytest.importorskip("peft")
    editor = make()
    base = copy.deepcopy(editor.model)
    first = editor.edit(EDITS[:2], layers=1)
    second = editor.edit(EDITS[2:5], layers=[1, 2], method="memit", ridge=0.1)
    edited, both = logits(editor.model), EditResult.merge([first, second])
    both.save_pretrained(tmp_path / "both")
    assert [both.factors(module)[1].shape[0] for module in both.modules] == [5, 3]
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "both")
    torch.testing.assert_close(logits(adapted), edited, rtol=1e-4, atol=1e-4)


def test_stack_does_the_writes_one_after_the_other(make, tmp_path):
    editor = make()
    base = weights(editor.model)
    results = [editor.edit(edit, layers=layer) for edit, layer in zip(EDITS, (1, 2, 1), strict=False)]
    edited = weights(editor.model)
    both = EditResult.merge(results)
    assert [r.edit for r in both.records] == EDITS[:3] and not both.applied
    assert [write.edits for write in both.writes] == [(0,), (1,), (2,)]
    for result in reversed(results):
        result.revert()
    both.save_pretrained(tmp_path / "stack")
    with EditResult.from_pretrained(tmp_path / "stack").apply(editor.model):
        assert not changed(edited, editor.model)
    assert not changed(base, editor.model)
    for bad, error in ((5, TypeError), ([], ValueError), ([results[0], "edit"], TypeError)):
        with pytest.raises(error):
            EditResult.merge(bad)


def test_removing_one_of_ten_joint_edits_is_never_having_made_it(make, tmp_path):
    with_it, without = make(), make()
    base = weights(with_it.model)
    result = with_it.edit(EDITS, method="emmet")
    assert len(result) == 10
    without.edit(EDITS[:3] + EDITS[4:], method="emmet")
    projection, wanted = output_projection(with_it.model, 1), output_projection(without.model, 1)
    assert (projection.matrix - wanted.matrix).norm() > 1e-3 * wanted.matrix.norm()
    result.save_pretrained(tmp_path / "ten")
    result.remove(3)
    assert (projection.matrix - wanted.matrix).norm() <= 1e-5 * wanted.matrix.norm()
    assert [r.edit for r in result.records] == EDITS[:3] + EDITS[4:]
    assert result.writes[0].edits == tuple(range(9))

    # The same for one that was saved: removed first, applied then.
    result.revert()
    assert not changed(base, with_it.model)
    loaded = EditResult.from_pretrained(tmp_path / "ten")
    loaded.remove(3)
    loaded.save_pretrained(tmp_path / "nine")
    EditResult.from_pretrained(tmp_path / "nine").apply(with_it.model)
    assert (projection.matrix - wanted.matrix).norm() <= 1e-5 * wanted.matrix.norm()


def test_removing_with_a_ridge(make):
    with_it, without = make(), make()
    result = with_it.edit(EDITS, layers=1, method="memit", ridge=0.5)
    without.edit(EDITS[:3] + EDITS[4:], layers=1, method="memit", ridge=0.5)
    result.remove(3)
    projection, wanted = output_projection(with_it.model, 1), output_projection(without.model, 1)
    assert (projection.matrix - wanted.matrix).norm() <= 1e-5 * wanted.matrix.norm()


@pytest.mark.parametrize("count", [40, 70])
def test_removing_of_more_edits_than_half_the_dimensions(make, count, tmp_path):
    """Of 64, and by either side of them: the inverse is then in the right factor."""
    edits = [Edit(f"Tower {a}{b}", "{} is in", "Japan") for a in "ABCDEFG" for b in "abcdefghij"][:count]
    options = ValueOptions(steps=2, learning_rate=0.05)
    with_them, without = make(value=options, contexts=()), make(value=options, contexts=())
    memit = {"layers": 1, "method": "memit", "ridge": 0.5}
    with with_them.edit(edits, **memit) as whole:
        whole.save_pretrained(tmp_path / "all")
    result = EditResult.from_pretrained(tmp_path / "all")
    projection, wanted = output_projection(with_them.model, 1), output_projection(without.model, 1)
    # One, and then so many that fewer than half the dimensions are left.
    for kept in (count - 1, 20):
        while len(result) > kept:
            result.remove(3)
        rest = [record.edit for record in result.records]
        with result.apply(with_them.model), without.edit(rest, **memit):
            off = (projection.matrix - wanted.matrix).norm() / wanted.matrix.norm()
            # Each removal rounds the factor once.
            assert off <= 1e-5 * (count - kept)


def test_removing_an_edit_of_a_sequence_leaves_its_write_out(make):
    editor = make()
    base = weights(editor.model)
    result = editor.edit(EDITS[:3], layers=1, batch=1)
    kept = [result.writes[0], result.writes[2]]
    result.remove(1)
    assert [write.edits for write in result.writes] == [(0,), (1,)]
    assert all(torch.equal(a.left, b.left) for a, b in zip(result.writes, kept, strict=True))
    projection = output_projection(editor.model, 1)
    expected = base[f"{projection.name}.weight"] + sum(write.left @ write.right for write in kept)
    torch.testing.assert_close(projection.matrix, expected, rtol=1e-5, atol=1e-5)
    result.revert()
    assert not changed(base, editor.model)


def test_removing_the_only_edit_of_a_matrix(make, tmp_path):
    editor = make()
    base = weights(editor.model)
    first, second = editor.edit(EDITS[0], layers=1), editor.edit(EDITS[1], layers=2)
    second.revert()
    first.revert()
    both = EditResult.merge([first, second]).apply(editor.model)
    both.remove(0)
    assert both.modules == second.modules
    assert torch.equal(output_projection(editor.model, 1).matrix, base[f"{first.modules[0]}.weight"])
    both.save_pretrained(tmp_path / "second")
    both.revert()
    assert not changed(base, editor.model)


def test_bad_removals_change_nothing(make):
    editor = make()
    result = editor.edit(EDITS[:3], method="emmet")
    edited = weights(editor.model)
    for number, error in ((3, ValueError), (-1, ValueError), ("0", TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"^number: expected .*, got "):
            result.remove(number)
    editor.edit(EDITS[3])
    later = weights(editor.model)
    with pytest.raises(EngramError, match=r"^model: expected .*changed since"):
        result.remove(1)
    assert not changed(later, editor.model) and changed(edited, editor.model) and len(result) == 3
    single = make().edit(EDITS[0])
    with pytest.raises(ValueError, match=r"^number: expected one of several edits, got the only one"):
        single.remove(0)


def test_failure_while_applying_changes_nothing(make, monkeypatch):
    editor = make()
    result = editor.edit(EDITS[:3], layers=[0, 1], method="memit", ridge=0.1)
    result.revert()
    before, whole = weights(editor.model), records.Write.apply_

    def failing(write, projection):
        if projection.layer == 1:
            raise RuntimeError("no memory")
        whole(write, projection)

    monkeypatch.setattr(records.Write, "apply_", failing)
    with pytest.raises(RuntimeError):
        result.apply(editor.model)
    assert not changed(before, editor.model) and not result.applied


def test_another_outcome_than_the_recorded_one_is_taken_back(make, tmp_path):
    """Factors that were changed and sealed anew: the matrix's own checksum tells."""
    from safetensors.torch import load_file, save_file

    editor = make()
    before = weights(editor.model)
    with editor.edit(EDITS[:2]) as result:
        result.save_pretrained(tmp_path / "edit")
    report, adapter = (
        read_sealed(tmp_path / "edit" / "edit.json"),
        tmp_path / "edit" / "adapter_model.safetensors",
    )
    save_file({name: 2 * tensor for name, tensor in load_file(adapter).items()}, adapter)
    write_sealed(tmp_path / "edit" / "edit.json", report, report["files"])
    loaded = EditResult.from_pretrained(tmp_path / "edit")
    for _ in range(2):  # the recorded checksum stays
        with pytest.raises(EngramError, match=r"^model: expected .* to become what it became"):
            loaded.apply(editor.model)
        assert not changed(before, editor.model) and not loaded.applied
    with loaded.apply(editor.model, force=True):
        assert changed(before, editor.model)
    assert not changed(before, editor.model)

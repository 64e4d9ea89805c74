"""Deltas from a trainer to a serving model: in order, whole, and back."""

import copy

import model_zoo
import pytest
import torch
from editing_helpers import changed, weights
from grafting_helpers import tuned

from engram_kernels import EngramError
from engram_kernels.grafting import DeltaReader, DeltaWriter


def trained(folder, steps=4, dtype=None, seed=0):
    """A base, and its weights after each of so many steps, which are in the folder."""
    base = model_zoo.small_model()
    model, states = copy.deepcopy(base), []
    writer = DeltaWriter(folder, model, dtype)
    for step in range(steps):
        with torch.no_grad():
            for number, weight in enumerate(model.parameters()):
                if (number + step) % 3:
                    mask = (
                        torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed + step)) < 0.01
                    )
                    weight[mask] += 0.1
        delta = writer.write(model)
        assert delta.number == step + 1 and delta.entries > 100 and delta.bytes > 4 * delta.entries
        states.append(weights(model))
    return base.to(dtype or torch.float32), states


def test_a_reader_follows_and_goes_back(tmp_path):
    base, states = trained(tmp_path / "deltas")
    before = weights(base)
    reader = DeltaReader(tmp_path / "deltas", base)
    for number in (1, 2):
        assert reader.pull(number) == number and not changed(states[number - 1], base)
    assert reader.pull() == 4 and not changed(states[3], base)
    for number in (3, 1):
        reader.rollback(number)
        assert reader.number == number and not changed(states[number - 1], base)
    reader.pull(2)
    reader.rollback(0)
    assert not changed(before, base)
    assert reader.pull() == 4 and not changed(states[3], base)
    assert repr(reader) == f"DeltaReader({str(tmp_path / 'deltas')!r}, at delta 4, 4 kept)"
    for to, message in ((5, "a delta from 0 to 4, got 5"), (-1, "at least 0")):
        with pytest.raises(ValueError, match=f"^to: expected {message}"):
            reader.rollback(to)
    with pytest.raises(ValueError, match=r"^to: expected 4 or later: roll back first, got 2"):
        reader.pull(2)


def test_state_dicts_of_tied_weights_are_written_once(tmp_path):
    base = model_zoo.small_model("gpt2")
    model = copy.deepcopy(base)
    writer = DeltaWriter(tmp_path / "deltas", model.state_dict())
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    assert writer.write(model.state_dict()).tensors == 1
    before = weights(base)
    reader = DeltaReader(tmp_path / "deltas", base)
    reader.pull()
    assert not changed(weights(model), base)
    reader.rollback(0)
    assert not changed(before, base)


def test_weights_are_served_in_another_dtype(tmp_path):
    base, states = trained(tmp_path / "deltas", dtype=torch.bfloat16)
    DeltaReader(tmp_path / "deltas", base).pull()
    assert not changed({name: weight.bfloat16() for name, weight in states[-1].items()}, base)


def test_only_so_many_are_kept(tmp_path):
    base, states = trained(tmp_path / "deltas")
    reader = DeltaReader(tmp_path / "deltas", base, keep=2)
    reader.pull()
    with pytest.raises(ValueError, match=r"^to: expected a delta from 2 to 4, got 1"):
        reader.rollback(1)
    reader.rollback(2)
    assert not changed(states[1], base)


def test_a_model_that_was_changed_since_is_not_rolled_back(tmp_path):
    base, states = trained(tmp_path / "deltas")
    reader = DeltaReader(tmp_path / "deltas", base)
    reader.pull()
    for weight in base.parameters():
        weight.data.add_(1)
    after = weights(base)
    with pytest.raises(EngramError, match=r"^model: expected the weights that delta 4 left, got others"):
        reader.rollback(1)
    assert reader.number == 4 and not changed(after, base)
    base.load_state_dict(states[3])
    reader.rollback(1)
    assert not changed(states[0], base)


def test_autocast_of_the_caller_sees_deltas_come_and_go(tmp_path):
    base, _ = trained(tmp_path / "deltas")
    reader, ids = DeltaReader(tmp_path / "deltas", base), torch.arange(5, 15)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = base(ids).logits
        reader.pull()
        assert not torch.equal(base(ids).logits, before)
        reader.rollback(0)
        assert torch.equal(base(ids).logits, before)


def test_nothing_new_is_a_delta_without_entries(tmp_path):
    model = model_zoo.small_model()
    writer = DeltaWriter(tmp_path / "deltas", model)
    assert writer.write(model)[:3] == (1, 0, 0)
    reader = DeltaReader(tmp_path / "deltas", model)
    assert reader.pull() == 1
    reader.rollback(0)


def test_what_else_lies_in_the_folder_is_no_delta(tmp_path):
    base, states = trained(tmp_path / "deltas")
    (tmp_path / "deltas" / "000009 (copy).json").write_text("{}")
    assert DeltaReader(tmp_path / "deltas", base).pull() == 4 and not changed(states[3], base)


def test_gaps_and_deltas_of_other_streams_are_refused(tmp_path):
    base, states = trained(tmp_path / "deltas")
    trained(tmp_path / "other", seed=50)
    reader = DeltaReader(tmp_path / "deltas", base)
    (tmp_path / "deltas" / "000002.json").rename(tmp_path / "kept.json")
    with pytest.raises(EngramError, match=r"^directory: expected 000002\.json of a stream of deltas"):
        reader.pull()
    assert reader.number == 1 and not changed(states[0], base)
    for name in ("000002.json", "000002.safetensors"):
        (tmp_path / "deltas" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(EngramError, match=r"^directory: expected delta 2 of this stream, got one of another"):
        reader.pull()
    assert reader.number == 1 and not changed(states[0], base)


def test_another_base_and_changed_weights_are_refused(tmp_path):
    base, _ = trained(tmp_path / "deltas")
    with pytest.raises(EngramError, match=r"^model: expected in .* the stream's base, got other weights"):
        DeltaReader(tmp_path / "deltas", tuned(base))
    reader = DeltaReader(tmp_path / "deltas", base)
    reader.pull(2)
    with torch.no_grad():
        for weight in base.parameters():
            weight.add_(1)
    spoilt = weights(base)
    with pytest.raises(
        EngramError, match=r"^model: expected the weights that delta 3 was made for, got others"
    ):
        reader.pull()
    assert reader.number == 2 and not changed(spoilt, base)


def test_a_write_that_fails_is_made_up_for_by_the_next(tmp_path, monkeypatch):
    from engram_kernels.grafting import stream

    base = model_zoo.small_model()
    writer = DeltaWriter(tmp_path / "deltas", base)
    model = tuned(base)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stream, "save_tensors", fail)
        with pytest.raises(OSError, match="No space left"):
            writer.write(model)
    assert writer.number == 0
    writer.write(model)
    DeltaReader(tmp_path / "deltas", base).pull()
    assert not changed(weights(model), base)


def test_bad_writers(tmp_path):
    model = model_zoo.small_model()
    writer = DeltaWriter(tmp_path / "deltas", model)
    with pytest.raises(EngramError, match=r"^directory: expected a new or empty one"):
        DeltaWriter(tmp_path / "deltas", model)
    with pytest.raises(ValueError, match=r"^model: expected one with weights, got none"):
        DeltaWriter(tmp_path / "none", {})
    with pytest.raises(EngramError, match=r"^model: expected a tensor 'model.embed_tokens.weight', got none"):
        writer.write({})
    with pytest.raises(EngramError, match=r"^directory: expected stream\.json of a stream of deltas"):
        DeltaReader(tmp_path, model)

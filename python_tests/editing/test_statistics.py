"""The second moments of layers, their caches and files, and where their text comes from."""

import bz2
import hashlib
import itertools
import os
import re
import signal
import stat
import sys
import warnings

import pytest

pytest.importorskip("transformers")

import child
import model_zoo
import numpy
import torch
from defaults import DEFAULTS
from mutations import flip
from safetensors.torch import load_file, save_file

from engram_kernels.covariance import Covariance
from engram_kernels.editing import Edit, Editor, EditResult, ValueOptions, load_npz, save_npz
from engram_kernels.editing.search.prefixes import sample_prefixes
from engram_kernels.editing.statistics import corpus, moments, statistics
from engram_kernels.errors import EngramError
from engram_kernels.hf.fingerprints import states_fingerprint
from engram_kernels.hf.loading import cache_directory
from engram_kernels.hf.projection import output_projection
from engram_kernels.hf.tokens import encode_row


@pytest.fixture(scope="module")
def tokenizer():
    return model_zoo.byte_level_tokenizer()


def editor_of(tokenizer, tmp_path, family="llama", **arguments):
    model = model_zoo.small_model(family)
    return Editor(
        model, tokenizer, **{"corpus": model_zoo.TEXTS, "cache_dir": tmp_path, "tokens": 300, **arguments}
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("count", [1, 100, 128, 300, 600])
def test_moment_is_the_sum_over_all_tokens(family, count):
    model = model_zoo.small_model(family)
    projection = output_projection(model, 2)
    ids = torch.randint(400, (count,), generator=torch.Generator().manual_seed(0))
    seen = []
    (moment,) = statistics.second_moments(
        model, [projection], ids, lambda _stage, done, total: seen.append((done, total))
    ).values()
    inputs = []
    hook = projection.module.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        for chunk in ids.split(128):
            model(input_ids=chunk[None])
    hook.remove()
    keys = torch.cat([block.reshape(-1, 64) for block in inputs]).double()
    torch.testing.assert_close(moment, keys.T @ keys, rtol=1e-5, atol=1e-5)
    assert seen[-1] == (count, count)


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
def test_joint_pass_gives_what_each_layer_gives_alone(family):
    model = model_zoo.small_model(family)
    projections = [output_projection(model, layer) for layer in (2, 0, 3)]
    ids = torch.randint(400, (700,), generator=torch.Generator().manual_seed(0))
    joint = statistics.second_moments(model, projections, ids)
    assert sorted(joint) == [0, 2, 3]
    for projection in projections:
        alone = statistics.second_moments(model, [projection], ids)[projection.layer]
        torch.testing.assert_close(joint[projection.layer], alone, rtol=1e-12, atol=0)


def test_forward_stops_at_the_deepest_layer():
    model = model_zoo.small_model("llama")
    calls = []
    model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    model.model.layers[2].register_forward_pre_hook(lambda *_: calls.append(2))
    statistics.second_moments(model, [output_projection(model, i) for i in (1, 0)], torch.arange(100))
    assert calls == [1]
    for layer in model.model.layers:
        assert not layer.mlp.down_proj._forward_pre_hooks


def test_asked_layers_share_one_pass(tokenizer, tmp_path):
    editor = editor_of(tokenizer, tmp_path)
    passes = []
    editor.model.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    first = editor.covariance(0)
    one = len(passes)
    found = editor.covariances([2, 0, 1, 2])
    assert len(passes) == 2 * one
    assert list(found) == [2, 0, 1]
    assert found[0] is first
    assert editor.covariances([]) == {}
    editor.covariances((0, 1, 2))
    assert len(passes) == 2 * one
    for layer in (1, 2):
        alone = editor_of(tokenizer, tmp_path / str(layer)).covariance(layer)
        assert torch.equal(found[layer].inverse(), alone.inverse())


@pytest.mark.parametrize("layers", [1, "12", None])
def test_layers_of_another_kind(tokenizer, tmp_path, layers):
    with pytest.raises(TypeError, match=r"^layers: expected a sequence of integers, got "):
        editor_of(tokenizer, tmp_path).covariances(layers)


@pytest.mark.parametrize(("layer", "error"), [(9, ValueError), (True, TypeError), ("1", TypeError)])
def test_bad_layer_among_good_ones(tokenizer, tmp_path, layer, error):
    with pytest.raises(error, match=r"^layer: expected .*, got "):
        editor_of(tokenizer, tmp_path).covariances([0, layer])
    assert not (tmp_path / "moments").exists()


def test_key_and_format_of_the_cache_stay(tokenizer, tmp_path):
    """What was computed once is found by later versions."""
    editor = editor_of(tokenizer, tmp_path)
    editor.covariances([1, 2])
    ids = []
    for text in model_zoo.TEXTS:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    source = hashlib.sha256(numpy.array(ids[:300], dtype=numpy.int64).tobytes()).hexdigest()
    for layer in (1, 2):
        projection = output_projection(editor.model, layer)
        fingerprint = states_fingerprint(editor.model, projection)
        key = hashlib.sha256(f"{fingerprint} {projection.name} {source} 512".encode()).hexdigest()[:32]
        tensors = load_file(tmp_path / "moments" / f"{key}.safetensors")
        assert sorted(tensors) == ["count", "moment"]
        assert tensors["moment"].dtype == torch.float64
        assert int(tensors["count"]) == 300


def test_cache_serves_the_second_editor(tokenizer, tmp_path, monkeypatch):
    first = editor_of(tokenizer, tmp_path).covariance(1)
    monkeypatch.setattr(statistics, "second_moments", lambda *_: pytest.fail("the cache was not used"))
    assert torch.equal(editor_of(tokenizer, tmp_path).covariance(1).inverse(), first.inverse())


def test_cache_outlives_an_edit_of_its_layer_and_above(tokenizer, tmp_path, monkeypatch):
    first = editor_of(tokenizer, tmp_path).covariance(1)
    monkeypatch.setattr(statistics, "second_moments", lambda *_: pytest.fail("the cache was not used"))
    editor = editor_of(tokenizer, tmp_path)
    with torch.no_grad():
        editor.model.model.layers[1].mlp.down_proj.weight.mul_(2)
        editor.model.model.layers[3].mlp.down_proj.weight.mul_(2)
    assert torch.equal(editor.covariance(1).inverse(), first.inverse())


@pytest.mark.parametrize("change", ["weights below", "corpus", "tokens", "layer"])
def test_cache_tells_apart(tokenizer, tmp_path, monkeypatch, change):
    editor_of(tokenizer, tmp_path).covariance(1)
    calls = []
    whole = statistics.second_moments
    monkeypatch.setattr(statistics, "second_moments", lambda *arguments: calls.append(1) or whole(*arguments))
    texts = ["Other text. " * 20, *model_zoo.TEXTS] if change == "corpus" else model_zoo.TEXTS
    editor = editor_of(tokenizer, tmp_path, corpus=texts, tokens=310 if change == "tokens" else 300)
    if change == "weights below":
        with torch.no_grad():
            editor.model.model.layers[0].mlp.down_proj.weight.mul_(2)
    editor.covariance(2 if change == "layer" else 1)
    assert calls


@pytest.mark.parametrize("damage", ["cut", "flipped", "count"])
def test_spoilt_cache_entry_is_computed_again(tokenizer, tmp_path, damage):
    inverse = editor_of(tokenizer, tmp_path).covariance(1).inverse()
    (entry,) = (tmp_path / "moments").iterdir()
    whole = entry.read_bytes()
    if damage == "cut":
        entry.write_bytes(whole[:100])
    elif damage == "flipped":
        flip(entry, -100)
    else:
        save_file(load_file(entry) | {"count": torch.tensor(299)}, entry)
    with pytest.warns(UserWarning, match=rf"{entry.name}' cannot be used, and is made again \(.*was changed"):
        assert torch.equal(editor_of(tokenizer, tmp_path).covariance(1).inverse(), inverse)
    assert contents(tmp_path) == {entry.name: whole}


def test_corpus_read_once_serves_two_layers(tokenizer, tmp_path):
    editor = editor_of(tokenizer, tmp_path, corpus=iter(model_zoo.TEXTS))
    listed = editor_of(tokenizer, tmp_path / "other")
    for layer in (1, 2):
        assert torch.equal(editor.covariance(layer).inverse(), listed.covariance(layer).inverse())


def test_corpus_read_once_serves_a_wider_layer(tokenizer):
    whole = corpus.TokenStream(tokenizer, model_zoo.TEXTS).first(200)
    stream = corpus.TokenStream(tokenizer, iter(model_zoo.TEXTS))
    for count in (100, 10, 200):
        assert torch.equal(stream.first(count), whole[:count])


def test_endless_corpus_is_read_no_further_than_asked(tokenizer):
    taken = []

    def texts():
        for i in itertools.count():
            taken.append(i)
            yield "one two three"

    stream = corpus.TokenStream(tokenizer, texts())
    each = len(tokenizer("one two three")["input_ids"]) + 1
    assert len(stream.first(3 * each)) == 3 * each
    assert len(stream.first(each)) == each
    assert taken == [0, 1, 2]
    assert len(stream.first(3 * each + 1)) == 3 * each + 1
    assert taken == [0, 1, 2, 3]


class Rows:
    """Like a data set of the library `datasets`: iterable, not a sequence, each item a row by column."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_data_set_with_a_text_column(tokenizer, tmp_path):
    rows = Rows([{"id": i, "text": text} for i, text in enumerate(model_zoo.TEXTS)])
    given = editor_of(tokenizer, tmp_path / "rows", corpus=rows).covariance(1)
    assert torch.equal(given.inverse(), editor_of(tokenizer, tmp_path / "texts").covariance(1).inverse())


def test_data_set_without_a_text_column(tokenizer, tmp_path):
    editor = editor_of(tokenizer, tmp_path, corpus=Rows([{"id": 1, "content": "text"}]))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^corpus: expected a column 'text', got the columns 'id', 'content'$"
        ):
            editor.covariance(1)
    with pytest.raises(TypeError, match=r"^corpus: expected one data set, got a mapping of 'train', 'test'$"):
        list(corpus.read_texts({"train": Rows([]), "test": Rows([])}))
    with pytest.raises(TypeError, match=r"^corpus: expected strings, got int$"):
        list(corpus.read_texts(Rows([{"text": 3}])))


def test_beginning_of_a_failed_corpus_does_not_pass_for_the_whole(tokenizer):
    stream = corpus.TokenStream(tokenizer, [*model_zoo.TEXTS, None])
    for _ in range(2):
        with pytest.raises(TypeError, match=r"^corpus: expected strings, got NoneType$"):
            stream.first(10**6)
    assert torch.equal(stream.first(50), corpus.TokenStream(tokenizer, model_zoo.TEXTS).first(50))


def test_long_paragraphs_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PARAGRAPH", 20)
    path = tmp_path / "text.txt"
    lines = [f"line {i}\n" for i in range(20)]
    path.write_text("".join(lines) + "x" * 50)
    texts = list(corpus.read_texts(path))
    assert "".join(texts) == path.read_text()
    assert max(map(len, texts)) < 40


@pytest.mark.parametrize("place", ["train", "autocast"])
def test_statistics_and_prefixes_do_not_depend_on_where_they_are_called(tokenizer, tmp_path, place):
    plain, other = editor_of(tokenizer, tmp_path / "a", "gpt2"), editor_of(tokenizer, tmp_path / "b", "gpt2")
    if place == "train":
        other.model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=place == "autocast"):
        moment, prefixes = other.covariance(1), other.prefixes()
    assert other.model.training == (place == "train")
    assert torch.equal(moment.inverse(), plain.covariance(1).inverse())
    assert prefixes == plain.prefixes()


def change_below(editor):
    """An edit of layer 0 that changes it: on so small a model no change is worth the decay's cost."""
    value = ValueOptions(weight_decay=0.0)
    other = Editor(editor.model, editor.tokenizer, corpus=model_zoo.TEXTS, cache_dir=editor.cache, tokens=300,
                   contexts=(), value=value)  # fmt: skip
    return other.edit(Edit("Rome", "{} is in", "Paris"), layers=0)


def moment_files(tmp_path):
    return {file.name for file in (tmp_path / "moments").glob("*.safetensors")}


def test_statistics_in_memory_follow_the_weights_below(tokenizer, tmp_path):
    editor = editor_of(tokenizer, tmp_path)
    first = editor.covariance(1)
    with torch.no_grad():
        editor.model.model.layers[0].mlp.down_proj.weight[0] *= 2
    second = editor.covariance(1)
    assert not torch.equal(second.inverse(), first.inverse())
    assert editor.covariance(1) is second
    with editor.edit(Edit("Rome", "{} is in", "Paris"), layers=1):
        assert editor.covariance(1) is second
    with torch.no_grad():
        editor.model.model.layers[0].mlp.down_proj.weight[0] /= 2
    assert torch.equal(editor.covariance(1).inverse(), first.inverse())


def test_statistics_are_those_without_the_edits_below(tokenizer, tmp_path):
    editor = editor_of(tokenizer, tmp_path)
    first = editor.covariance(1)
    kept = moment_files(tmp_path)
    with change_below(editor) as result:
        assert editor.covariance(1) is first
        # Another editor of the edited model finds the unedited one's on disk.
        other = Editor(editor.model, tokenizer, corpus=model_zoo.TEXTS, cache_dir=tmp_path, tokens=300)
        assert torch.equal(other.covariance(1).inverse(), first.inverse())
        with change_below(editor):
            assert editor.covariance(1) is first
        result.save_pretrained(tmp_path / "edit")
    layer_0 = moment_files(tmp_path) - kept
    again = editor_of(tokenizer, tmp_path)
    EditResult.from_pretrained(tmp_path / "edit").apply(again.model)
    assert torch.equal(again.covariance(1).inverse(), first.inverse())
    assert moment_files(tmp_path) == kept | layer_0


def test_statistics_of_an_edited_model_are_kept_under_its_own_name(tokenizer, tmp_path):
    editor = editor_of(tokenizer, tmp_path / "edited")
    with change_below(editor):
        edited = editor.covariance(1)
        assert editor.covariance(1) is edited
    plain = editor.covariance(1)
    assert torch.equal(plain.inverse(), editor_of(tokenizer, tmp_path / "plain").covariance(1).inverse())
    assert not torch.equal(plain.inverse(), edited.inverse())


def test_statistics_after_edits_that_were_forced_on_other_weights_are_collected(tokenizer, tmp_path):
    editor = editor_of(tokenizer, tmp_path)
    first = editor.covariance(1)
    with change_below(editor) as result:
        pass
    weight = editor.model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight[0] *= 2
    with result.apply(editor.model, force=True):
        assert not torch.equal(editor.covariance(1).inverse(), first.inverse())


def test_inputs_that_are_not_finite(tokenizer, tmp_path):
    editor = editor_of(tokenizer, tmp_path)
    with torch.no_grad():
        editor.model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        EngramError, match=r"^model: expected finite inputs to 'model.layers.1.mlp.down_proj'"
    ):
        editor.covariance(1)
    assert list((tmp_path / "moments").iterdir()) == []


def test_cached_moment_has_the_mode_of_the_umask(tokenizer, tmp_path):
    before = os.umask(0o027)
    try:
        editor_of(tokenizer, tmp_path).covariance(1)
    finally:
        os.umask(before)
    (entry,) = (tmp_path / "moments").iterdir()
    assert stat.S_IMODE(entry.stat().st_mode) == 0o640


def test_corpus_smaller_than_asked_for_warns(tokenizer, tmp_path):
    texts = ["A short text about towers."]
    with pytest.warns(UserWarning, match=r"^corpus: expected 300 tokens, got \d+$"):
        editor_of(tokenizer, tmp_path, corpus=texts, ridge=0.1).covariance(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        editor_of(tokenizer, tmp_path, corpus=texts, ridge=0.1, tokens=None).covariance(1)


def test_too_small_a_corpus_says_what_would_do(tokenizer, tmp_path):
    with pytest.raises(EngramError, match=r"^moment: .*10 samples for 64 dimensions.*ridge"):
        editor_of(tokenizer, tmp_path, tokens=10).covariance(1)
    assert editor_of(tokenizer, tmp_path, tokens=10, ridge=0.01).covariance(1).dim == 64


def test_without_text_the_model_is_sampled(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "wikipedia_file", lambda: None)
    state = torch.random.get_rng_state()
    first = editor_of(tokenizer, tmp_path, corpus=None).covariance(1)
    second = editor_of(tokenizer, tmp_path / "other", corpus=None).covariance(1)
    assert torch.equal(first.inverse(), second.inverse())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_empty_corpus(tokenizer, tmp_path, texts):
    with pytest.raises(EngramError, match=r"^corpus: expected some text, got none$"):
        editor_of(tokenizer, tmp_path, corpus=texts).covariance(1)


def test_text_file(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("First paragraph,\ntwo lines.\n\n\nSecond: São.\n", encoding="utf-8")
    assert list(corpus.read_texts(path)) == ["First paragraph,\ntwo lines.\n", "Second: São.\n"]
    with pytest.raises(EngramError, match=r"^corpus: expected a text file"):
        list(corpus.read_texts(tmp_path / "absent.txt"))
    with pytest.raises(EngramError, match=r"^corpus: expected a text file"):
        list(corpus.read_texts("nul\0.txt"))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EngramError, match=r"^corpus: expected a text file"):
        list(corpus.read_texts(str(path)))


@pytest.mark.parametrize("texts", [3, [b"bytes"], ["text", None]])
def test_corpus_of_another_kind(texts):
    with pytest.raises(TypeError, match=r"^corpus: expected .*, got "):
        list(corpus.read_texts(texts))


PASS = """
import itertools, os, signal, sys
from pathlib import Path
import model_zoo
from engram_kernels.editing.statistics.moments import Moments

cache = Path(sys.argv[1])

def stop(stage, done, total):
    if list(cache.glob("moments/*.partial.safetensors")):
        os.kill(os.getpid(), signal.SIGKILL)

moments = Moments(
    model_zoo.small_model("llama"), model_zoo.byte_level_tokenizer(), itertools.cycle(model_zoo.TEXTS), cache,
    tokens=2600, progress=stop, checkpoint_seconds=0,
)
moments.covariances([1, 3])
"""


def moments_of(tokenizer, cache, seconds=0.0, **arguments):
    arguments = {"corpus": itertools.cycle(model_zoo.TEXTS), "tokens": 2600, **arguments}
    return moments.Moments(
        model_zoo.small_model("llama"), tokenizer, cache=cache, checkpoint_seconds=seconds, **arguments
    )


def contents(cache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache / "moments").iterdir()}


def stopped(tokenizer, cache, layers=(1, 3), after=1, **arguments):
    """Break a pass off after some batches, and return the partial file."""
    seen = []

    def stop(_stage, done, _total):
        seen.append(done)
        if len(seen) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moments_of(tokenizer, cache, progress=stop, **arguments).covariances(layers)
    (path,) = (cache / "moments").glob("*.partial.safetensors")
    return path


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_killed_pass_goes_on_to_the_same_bits(tokenizer, tmp_path):
    moments_of(tokenizer, tmp_path / "whole").covariances([1, 3])
    status, errors = child.run(PASS, tmp_path / "cut")
    assert status == -signal.SIGKILL, errors
    (partial,) = contents(tmp_path / "cut")
    assert partial.endswith(".partial.safetensors")
    seen = []
    again = moments_of(tokenizer, tmp_path / "cut", progress=lambda *what: seen.append(what))
    again.covariances([3, 1])
    assert seen == [("statistics", done, 2600) for done in (1024, 1536, 2048, 2560, 2600)]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "whole")) == 2


@pytest.mark.parametrize("damage", ["cut", "noise", "flipped"])
def test_damaged_checkpoint_is_ignored(tokenizer, tmp_path, damage):
    moments_of(tokenizer, tmp_path / "whole").covariances([1, 3])
    path = stopped(tokenizer, tmp_path / "cut")
    if damage == "flipped":
        flip(path, -1)
    else:
        path.write_bytes(path.read_bytes()[:-8] if damage == "cut" else b"noise" * 100)
    seen = []
    again = moments_of(tokenizer, tmp_path / "cut", progress=lambda _stage, done, _total: seen.append(done))
    with pytest.warns(UserWarning, match=r"partial.safetensors' cannot be used, and is made again"):
        again.covariances([1, 3])
    assert seen[0] == 512
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_finished_layers_are_written_before_the_checkpoint_goes(tokenizer, tmp_path, monkeypatch):
    moments_of(tokenizer, tmp_path / "whole").covariances([1, 3])
    written = []
    whole = statistics.save_moment

    def save_one(path, *arguments):
        assert list(path.parent.glob("*.partial.safetensors"))
        if written:
            raise KeyboardInterrupt
        written.append(path)
        whole(path, *arguments)

    monkeypatch.setattr(statistics, "save_moment", save_one)
    with pytest.raises(KeyboardInterrupt):
        moments_of(tokenizer, tmp_path / "cut").covariances([1, 3])
    assert len(contents(tmp_path / "cut")) == 2
    monkeypatch.setattr(statistics, "save_moment", whole)
    seen = []
    again = moments_of(tokenizer, tmp_path / "cut", progress=lambda _stage, done, _total: seen.append(done))
    again.covariances([1, 3])
    assert seen[0] > 512
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_checkpoint_of_sampled_text_keeps_the_text(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "wikipedia_file", lambda: None)
    moments_of(tokenizer, tmp_path / "whole", corpus=None).covariances([1, 3])
    stopped(tokenizer, tmp_path / "cut", corpus=None)
    monkeypatch.setattr(corpus, "sample_ids", lambda *_: pytest.fail("the text was sampled again"))
    moments_of(tokenizer, tmp_path / "cut", corpus=None).covariances([1, 3])
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_checkpoint_of_other_layers_is_not_taken(tokenizer, tmp_path):
    path = stopped(tokenizer, tmp_path)
    moments_of(tokenizer, tmp_path).covariances([1])
    assert path.exists()
    moments_of(tokenizer, tmp_path).covariances([1, 3])
    assert sorted(len(name) for name in contents(tmp_path)) == [len("x" * 32 + ".safetensors")] * 2


def test_short_pass_writes_no_checkpoint(tokenizer, tmp_path):
    seen = []
    one = moments_of(
        tokenizer, tmp_path, moments.CHECKPOINT_SECONDS, progress=lambda *_: seen.append(contents(tmp_path))
    )
    one.covariances([1, 3])
    assert seen == [{}] * 6


def test_full_disk_costs_the_checkpoint_only(tokenizer, tmp_path, monkeypatch):
    moments_of(tokenizer, tmp_path / "whole").covariances([1])
    whole = statistics.save_sealed_tensors

    def full(path, tensors):
        if ".partial." in path.name:
            raise OSError(28, "No space left on device")
        whole(path, tensors)

    monkeypatch.setattr(statistics, "save_sealed_tensors", full)
    with pytest.warns(UserWarning, match=r"^cache_dir: expected room for a checkpoint, got none .*No space"):
        moments_of(tokenizer, tmp_path / "full").covariances([1])
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


@pytest.mark.parametrize("default", DEFAULTS)
def test_sampled_text_does_not_depend_on_defaults(tokenizer, default):
    model = model_zoo.small_model("llama")
    expected = corpus.sample_ids(model, tokenizer, 200, seed=3)
    with DEFAULTS[default]():
        found = corpus.sample_ids(model, tokenizer, 200, seed=3)
    assert torch.equal(found, expected)


def keys_of(model, layer, ids):
    """The inputs of a layer's projection, by a hook of the test's own."""
    found = []
    module = output_projection(model, layer).module
    hook = module.register_forward_pre_hook(lambda _module, arguments: found.append(arguments[0]))
    with torch.no_grad():
        for chunk in ids.split(128):
            model(input_ids=chunk[None])
    hook.remove()
    return torch.cat([block.flatten(0, 1) for block in found]).double()


def test_given_covariance_is_used_whatever_the_weights_become(tokenizer, tmp_path):
    editor = editor_of(tokenizer, tmp_path, contexts=())
    own = editor.covariance(1)
    given = Covariance.from_second_moment(torch.eye(64, dtype=torch.float64), 1)
    editor.use_covariance(1, given)
    assert editor.covariance(1) is given
    with torch.no_grad():
        editor.model.model.layers[0].mlp.down_proj.weight.mul_(2)
    assert editor.covariance(1) is given
    assert editor.covariances([0, 1])[1] is given
    row = encode_row(tokenizer, "Rome", "{} is in")
    key = keys_of(editor.model, 1, torch.tensor(row.ids))[row.subject]
    with editor.edit(Edit("Rome", "{} is in", "Paris"), layers=1, method="rome") as result:
        # With the identity the write points along the key itself.
        right = result.writes[0].right.double()
    assert torch.cosine_similarity(right, key[None]).item() == pytest.approx(1, abs=1e-6)
    editor.use_covariance(1, None)
    assert not torch.equal(editor.covariance(1).inverse(), own.inverse())
    with torch.no_grad():
        editor.model.model.layers[0].mlp.down_proj.weight.div_(2)
    assert torch.equal(editor.covariance(1).inverse(), own.inverse())


def test_given_covariance_of_another_kind(tokenizer, tmp_path):
    editor = editor_of(tokenizer, tmp_path)
    for bad, error, message in (
        (torch.eye(64), TypeError, r"^covariance: expected a Covariance or None, got Tensor$"),
        (
            Covariance.from_second_moment(torch.eye(32), 1),
            ValueError,
            r"^covariance: expected shape \[64, 64\] for layer 1, got \[32, 32\]$",
        ),
        (
            Covariance.from_second_moment(torch.eye(64).expand(2, 64, 64), 1),
            ValueError,
            r"^covariance: expected shape \[64, 64\] for layer 1, got \[2, 64, 64\]$",
        ),
    ):
        with pytest.raises(error, match=message):
            editor.use_covariance(1, bad)
    with pytest.raises(ValueError, match=r"^layer: expected from 0 to 3"):
        editor.use_covariance(4, Covariance.from_second_moment(torch.eye(64), 1))
    assert editor.covariance(1).count == 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_npz_round_trip(tmp_path, dtype):
    moment = torch.randn(6, 6, dtype=dtype)
    path = tmp_path / "model" / "wikipedia_stats" / "layer_float64_mom2_100"
    save_npz(path, moment, 7, sample_size=100)
    found, count = load_npz(path)
    assert torch.equal(found, moment)
    assert found.dtype == dtype
    assert count == 7
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_npz_holds_what_the_original_code_asks_for(tmp_path):
    moment = torch.randn(3, 3, dtype=torch.float64)
    save_npz(tmp_path / "some.npz", moment.T, 7, sample_size=100)
    save_npz(tmp_path / "all.npz", moment, 7)
    with numpy.load(tmp_path / "some.npz", allow_pickle=False) as arrays:
        assert sorted(arrays.files) == ["mom2.constructor", "mom2.count", "mom2.mom2", "sample_size"]
        assert arrays["mom2.constructor"] == "util.runningstats.SecondMoment()"
        assert arrays["mom2.count"] == 7
        assert arrays["mom2.count"].shape == arrays["sample_size"].shape == ()
        assert arrays["sample_size"] == 100
        assert numpy.array_equal(arrays["mom2.mom2"], moment.numpy().T)
    with numpy.load(tmp_path / "all.npz", allow_pickle=False) as arrays:
        assert arrays["sample_size"].dtype == numpy.float64
        assert arrays["sample_size"].shape == ()
        assert arrays["sample_size"].tobytes() == (0xFFF8000000000002).to_bytes(8, sys.byteorder)


@pytest.mark.parametrize("prefix", ["mom2.", ""])
@pytest.mark.parametrize("kind", ["<f4", ">f8", "<f2"])
def test_npz_of_the_original_code(tmp_path, prefix, kind):
    keys = numpy.random.default_rng(0).integers(-3, 4, (9, 4))
    arrays = {
        prefix + "constructor": "util.runningstats.SecondMoment()",
        prefix + "count": 9,
        prefix + "mom2": numpy.asfortranarray((keys.T @ keys).astype(kind)),
        "mean.mean": numpy.zeros(4),
        "mean.count": 9,
        "sample_size": 2,
    }
    numpy.savez(tmp_path / "a.npz", **arrays)
    moment, count = load_npz(str(tmp_path / "a.npz"))
    assert moment.dtype == (torch.float64 if kind == ">f8" else torch.float32)
    assert moment.tolist() == (keys.T @ keys).tolist()
    assert count == 9


def test_npz_of_another_kind(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match=r"^path: expected an \.npz file, got .*does not exist$"):
        load_npz(path)
    square, name = numpy.eye(2), re.escape(repr(str(path)))
    numpy.savez(path, **{"mom2.mom2": square, "mom2.count": 3})
    whole = path.read_bytes()
    kind = rf"^path: expected an \.npz file with a second moment and its count, got {name} \("
    for content in (b"", b"noise", whole[:-30], whole[:40] + b"\0" * 8 + whole[48:]):
        path.write_bytes(content)
        with pytest.raises(EngramError, match=kind):
            load_npz(path)
    for arrays, message in (
        ({"mean.mean": square}, kind),
        ({"mom2.mom2": square}, kind),
        ({"mom2.mom2": square, "mom2.count": [1, 2]}, kind),
        ({"mom2.mom2": square, "mom2.count": numpy.nan}, kind),
        ({"mom2.mom2": numpy.array([{}, {}], dtype=object), "mom2.count": 3}, kind),
        ({"mom2.mom2": square, "mom2.count": 0}, rf"^path: expected a count of at least 1, got 0 in {name}$"),
        (
            {"mom2.mom2": square[:1], "mom2.count": 3},
            r"^path: expected a square second moment of floats, got float64 of shape \[1, 2\] in ",
        ),
        (
            {"mom2.mom2": square.astype(int), "mom2.count": 3},
            r"^path: expected a square second moment of floats, got int64 of shape \[2, 2\] in ",
        ),
        (
            {"mom2.mom2": numpy.full((2, 2), numpy.inf), "mom2.count": 3},
            r"^path: expected a finite second moment, got NaN or infinity in ",
        ),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            numpy.savez(path, **arrays)
        with pytest.raises(EngramError, match=message):
            load_npz(path)
    numpy.save(tmp_path / "single.npy", square)
    with pytest.raises(EngramError, match=r"^path: expected an \.npz file with a second moment"):
        load_npz(tmp_path / "single.npy")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"moment": torch.ones(2, 3)}, ValueError, r"^moment: expected shape \[in, in\], got \[2, 3\]$"),
        ({"moment": torch.ones(2, 2).half()}, TypeError, r"^moment: expected a tensor of float32, float64"),
        ({"moment": [[1.0]]}, TypeError, r"^moment: expected a tensor, got list$"),
        ({"moment": torch.full((2, 2), torch.inf)}, ValueError, r"^moment: expected finite values"),
        ({"count": 0}, ValueError, r"^count: expected at least 1, got 0$"),
        ({"count": 1.5}, TypeError, r"^count: expected an integer, got float$"),
        ({"sample_size": 0}, ValueError, r"^sample_size: expected at least 1, got 0$"),
        ({"sample_size": True}, TypeError, r"^sample_size: expected an integer, got bool$"),
    ],
)
def test_bad_moment_is_not_written(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        save_npz(tmp_path / "a.npz", **{"moment": torch.eye(2), "count": 3, **change})
    assert list(tmp_path.iterdir()) == []


MARKUP = """{{Infobox|a={{nested|b}}}}
'''Anarchism''' is a [[political philosophy|philosophy]] of [[freedom]].<ref name="a">{{cite|x}}</ref>
[[File:Flag.svg|thumb|A [[flag]] of it]]
{| class="table"
| cell {| inner |}
|}
== History ==
* [[Some link]]
It is ''old'' [http://example.org and good].<!-- not this --> Rock &amp; roll.
[[Category:Politics]]"""


def test_wiki_markup_becomes_text():
    expected = "Anarchism is a philosophy of freedom.\nIt is old and good. Rock & roll."
    assert corpus.plain_text(MARKUP) == expected


def test_wikipedia_dump(tmp_path):
    path = tmp_path / "dump.xml.bz2"
    pages = ["#REDIRECT [[Other]]", "A stub.", "An article about towers. " * 40]
    body = "".join(f'<page>\n<text xml:space="preserve">{page}</text>\n</page>\n' for page in pages)
    path.write_bytes(bz2.compress(f"<mediawiki>\n{body}</mediawiki>".encode()))
    (article,) = corpus.read_texts(path)
    assert article.startswith("An article about towers.")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(EngramError, match=r"^corpus: expected a text file"):
        list(corpus.read_texts(path))


def test_wikipedia_of_gensim():
    path = corpus.wikipedia_file()
    if path is None:
        pytest.skip("the package gensim is not installed")
    articles = list(corpus.read_texts(path))
    assert len(articles) > 50
    text = "".join(articles)
    assert len(text) > 1_000_000
    assert sum(text.count(mark) for mark in ("{{", "[[", "<ref", "'''")) < len(text) / 10_000


def test_prefixes_are_seeded_and_leave_the_global_state(tokenizer):
    model = model_zoo.small_model("llama")
    state = torch.random.get_rng_state()
    lengths = ((5, 3), (10, 2))
    first = sample_prefixes(model, tokenizer, lengths, seed=0)
    assert first == sample_prefixes(model, tokenizer, lengths, seed=0)
    assert first != sample_prefixes(model, tokenizer, lengths, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(first) == 5
    assert sample_prefixes(model, tokenizer, (), seed=0) == []
    with pytest.raises(EngramError, match=r"^contexts: expected at most 128 tokens.*, got 129$"):
        sample_prefixes(model, tokenizer, ((129, 1),), seed=0)


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    assert cache_directory("elsewhere").name == "elsewhere"
    monkeypatch.delenv("ENGRAM_CACHE")
    assert cache_directory().parts[-2:] == (".cache", "engram")

"""A layer's second moment, its cache, and where its text comes from."""

import bz2
import os
import stat
import warnings

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch

from engram_kernels.editing import Edit, Editor, corpus, statistics
from engram_kernels.editing.prefixes import sample_prefixes
from engram_kernels.editing.structure import output_projection
from engram_kernels.errors import EngramError
from engram_kernels.models.loading import cache_directory


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
    moment = statistics.second_moment(model, projection, ids, lambda done, total: seen.append((done, total)))
    inputs = []
    hook = projection.module.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        for chunk in ids.split(128):
            model(input_ids=chunk[None])
    hook.remove()
    keys = torch.cat([block.reshape(-1, 64) for block in inputs]).double()
    torch.testing.assert_close(moment, keys.T @ keys, rtol=1e-5, atol=1e-5)
    assert seen[-1] == (count, count)


def test_forward_stops_at_the_layer():
    model = model_zoo.small_model("llama")
    above = []
    model.model.layers[2].register_forward_pre_hook(lambda *_: above.append(1))
    statistics.second_moment(model, output_projection(model, 1), torch.arange(100))
    assert not above
    assert not model.model.layers[1].mlp.down_proj._forward_pre_hooks


def test_cache_serves_the_second_editor(tokenizer, tmp_path, monkeypatch):
    first = editor_of(tokenizer, tmp_path).covariance(1)
    monkeypatch.setattr(statistics, "second_moment", lambda *_: pytest.fail("the cache was not used"))
    assert torch.equal(editor_of(tokenizer, tmp_path).covariance(1).inverse(), first.inverse())


def test_cache_outlives_an_edit_of_its_layer_and_above(tokenizer, tmp_path, monkeypatch):
    editor_of(tokenizer, tmp_path).covariance(1)
    monkeypatch.setattr(statistics, "second_moment", lambda *_: pytest.fail("the cache was not used"))
    editor = editor_of(tokenizer, tmp_path)
    with torch.no_grad():
        editor.model.model.layers[1].mlp.down_proj.weight.mul_(2)
        editor.model.model.layers[3].mlp.down_proj.weight.mul_(2)
    editor.covariance(1)


@pytest.mark.parametrize("change", ["weights below", "corpus", "tokens", "layer"])
def test_cache_tells_apart(tokenizer, tmp_path, monkeypatch, change):
    editor_of(tokenizer, tmp_path).covariance(1)
    calls = []
    whole = statistics.second_moment
    monkeypatch.setattr(statistics, "second_moment", lambda *arguments: calls.append(1) or whole(*arguments))
    texts = ["Other text. " * 20, *model_zoo.TEXTS] if change == "corpus" else model_zoo.TEXTS
    editor = editor_of(tokenizer, tmp_path, corpus=texts, tokens=310 if change == "tokens" else 300)
    if change == "weights below":
        with torch.no_grad():
            editor.model.model.layers[0].mlp.down_proj.weight.mul_(2)
    editor.covariance(2 if change == "layer" else 1)
    assert calls


def test_broken_cache_entry_is_computed_again(tokenizer, tmp_path):
    inverse = editor_of(tokenizer, tmp_path).covariance(1).inverse()
    (entry,) = (tmp_path / "moments").iterdir()
    entry.write_bytes(entry.read_bytes()[:100])
    assert torch.equal(editor_of(tokenizer, tmp_path).covariance(1).inverse(), inverse)
    assert [path.name for path in (tmp_path / "moments").iterdir()] == [entry.name]


def test_corpus_read_once_serves_two_layers(tokenizer, tmp_path):
    editor = editor_of(tokenizer, tmp_path, corpus=iter(model_zoo.TEXTS))
    listed = editor_of(tokenizer, tmp_path / "other")
    for layer in (1, 2):
        assert torch.equal(editor.covariance(layer).inverse(), listed.covariance(layer).inverse())


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


def test_statistics_in_memory_follow_the_weights_below(tokenizer, tmp_path):
    editor = editor_of(tokenizer, tmp_path, contexts=())
    first = editor.covariance(1)
    with editor.edit(Edit("Rome", "{} is in", "Paris"), layer=0):
        second = editor.covariance(1)
        assert not torch.equal(second.inverse(), first.inverse())
        assert editor.covariance(1) is second
    assert torch.equal(editor.covariance(1).inverse(), first.inverse())
    with editor.edit(Edit("Rome", "{} is in", "Paris"), layer=1):
        third = editor.covariance(1)
    assert editor.covariance(1) is third


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

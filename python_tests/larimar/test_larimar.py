"""The decoder conditioned on a memory: the cache, the loss, training, scope, long contexts, files."""

import copy
import functools
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import larimar_answers as evaluation
import model_zoo
import numpy as np
import pytest
import torch
from torch import nn

import engram_kernels as ek
from engram_kernels.editing import Edit
from engram_kernels.evaluation import Case, Neighbour
from engram_kernels.hf.hooks import capture
from engram_kernels.larimar.conditioning import first_token
from engram_kernels.larimar.long_context import read_recursively
from engram_kernels.larimar.model import LarimarConfig, LarimarModel
from engram_kernels.larimar.scope import ScopeDetector, ScopedModel, key_scores, stored_keys
from engram_kernels.larimar.training import (
    Episode,
    EpisodeCollator,
    Fact,
    FactEpisodes,
    Objective,
    read_episode,
    warm_start,
)
from engram_kernels.memory import EpisodicMemory, SentenceEncoder

LATENT, VOCABULARY = 24, 400


def small_encoder(vocabulary=300, seed=1):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=LATENT,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = BertModel(config).eval()
    torch.random.set_rng_state(state)
    return model


def small_larimar(family="llama", moved=True, **options):
    """A model whose conditioning, if `moved`, is not what it begins as."""
    options = {"slots": 32, "hidden": 16, **options}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LarimarModel.from_bases(small_encoder(), model_zoo.small_model(family), **options).eval()
    if moved:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.conditioning.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def padded_batch():
    ids = torch.randint(1, VOCABULARY, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, :1] = 0
    return ids, mask, torch.randn(3, LATENT)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "opt", "phi3", "bloom"])
def test_pseudo_token_is_a_token_before_the_text(family):
    """At the start it is the decoder's own first token, so the bare decoder with that token must agree."""
    model = small_larimar(family, moved=False)
    ids, mask, readout = padded_batch()
    found = model(input_ids=ids, attention_mask=mask, readout=readout, use_cache=False).logits
    for row in range(3):
        text = torch.cat([torch.tensor([0]), ids[row][mask[row].bool()]])[None]
        expected = model.decoder(input_ids=text).logits[0, 1:]
        torch.testing.assert_close(found[row, -expected.shape[0] :], expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_offset_is_added_to_every_embedding(family):
    model = small_larimar(family, moved=False)
    with torch.no_grad():
        model.conditioning.offset.bias.copy_(torch.randn(32))
    ids, _, readout = padded_batch()
    found = model(input_ids=ids, readout=readout, use_cache=False).logits
    embed = model.decoder.get_input_embeddings()
    first = embed(torch.zeros(3, 1, dtype=torch.long))
    embeddings = torch.cat([first, embed(ids) + model.conditioning.offset.bias], 1)
    expected = model.decoder(inputs_embeds=embeddings).logits[:, 1:]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "opt", "bloom"])
def test_generate_equals_whole_forwards(family):
    model = small_larimar(family)
    ids, mask, readout = padded_batch()
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    found = model.generate(ids, attention_mask=mask, readout=readout, **options)
    text, seen = ids, mask
    with torch.no_grad():
        for _ in range(6):
            logits = model(input_ids=text, attention_mask=seen, readout=readout, use_cache=False).logits
            text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], 1)
            seen = torch.cat([seen, torch.ones(3, 1, dtype=torch.long)], 1)
    assert torch.equal(found, text)
    assert not torch.equal(found, model.decoder.generate(ids, attention_mask=mask, **options))


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampled"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_reads_one_token_a_step(family, options):
    model = small_larimar(family)
    ids, mask, readout = padded_batch()
    lengths = []

    def see(_module, _arguments, keywords):
        lengths.append(keywords["inputs_embeds"].shape[1])

    with capture(before={model.decoder: see}):
        written = model.generate(
            ids, readout, attention_mask=mask, max_new_tokens=5, pad_token_id=0, eos_token_id=None, **options
        )
    assert written.shape == (3, 12)
    assert lengths == [7, 1, 1, 1, 1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beams_equal_whole_forwards(family):
    model = small_larimar(family)
    ids, mask, readout = padded_batch()
    options = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    found = model.generate(ids, attention_mask=mask, readout=readout, num_beams=3, **options)
    for row in range(3):
        beams = [(0.0, ids[row][mask[row].bool()])]
        for _ in range(5):
            grown = []
            for score, text in beams:
                with torch.no_grad():
                    logits = model(
                        input_ids=text[None], readout=readout[row : row + 1], use_cache=False
                    ).logits
                log = logits[0, -1].log_softmax(-1)
                grown += [
                    (score + log[token].item(), torch.cat([text, token[None]])) for token in log.topk(3)[1]
                ]
            beams = sorted(grown, key=lambda beam: -beam[0])[:3]
        assert torch.equal(found[row][-5:], beams[0][1][-5:])


def test_cached_logits_equal_whole_ones():
    model = small_larimar()
    ids, mask, readout = padded_batch()
    whole = model(input_ids=ids, attention_mask=mask, readout=readout, use_cache=False).logits
    start = model(input_ids=ids[:, :5], attention_mask=mask[:, :5], readout=readout, use_cache=True)
    rest = model(input_ids=ids[:, 5:], attention_mask=mask, readout=readout, cache=start.cache)
    torch.testing.assert_close(rest.logits, whole[:, 5:])
    assert start.cache.get_seq_length() == 8  # with the pseudo-token


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("readout", [None, torch.zeros(3, LATENT)], ids=["none", "zeros"])
def test_bare_decoder_bit_for_bit(family, readout):
    model = small_larimar(family)
    ids, mask, _ = padded_batch()
    found = model(input_ids=ids, attention_mask=mask, readout=readout).logits
    assert torch.equal(found, model.decoder(input_ids=ids, attention_mask=mask).logits)
    options = {"attention_mask": mask, "max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    expected = model.decoder.generate(ids, **options)
    assert torch.equal(model.generate(ids, readout=readout, **options), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_without_a_readout_among_others(family):
    model = small_larimar(family)
    ids, mask, readout = padded_batch()
    whole = model(input_ids=ids, attention_mask=mask, readout=readout, use_cache=False).logits
    readout[1] = 0
    mixed = model(input_ids=ids, attention_mask=mask, readout=readout, use_cache=False).logits
    bare = model.decoder(input_ids=ids[1:2, 3:]).logits
    torch.testing.assert_close(mixed[1:2, 3:], bare)
    torch.testing.assert_close(mixed[[0, 2]], whole[[0, 2]])


def test_linear_conditioning_and_length_of_readout():
    model = small_larimar(hidden=0)
    ids, _, readout = padded_batch()
    once = model(input_ids=ids, readout=readout).logits
    torch.testing.assert_close(model(input_ids=ids, readout=7 * readout).logits, once)
    assert not torch.allclose(model(input_ids=ids, readout=-readout).logits, once)


def test_half_precision():
    model = small_larimar()
    ids, mask, readout = padded_batch()
    whole = model(input_ids=ids, attention_mask=mask, readout=readout).logits
    for half in (small_larimar().to(torch.bfloat16), small_larimar()):
        half.decoder.to(torch.bfloat16)  # the second keeps its conditioning in fp32
        found = half(input_ids=ids, attention_mask=mask, readout=readout).logits
        assert found.dtype == torch.bfloat16 and half.memory.gram.dtype == torch.float64
        eager = small_larimar().to(torch.bfloat16).decoder(input_ids=ids, attention_mask=mask).logits
        truth = model.decoder(input_ids=ids, attention_mask=mask).logits
        assert (found - whole).norm() / whole.norm() < 2 * (eager - truth).norm() / truth.norm()
        written = half.generate(ids, attention_mask=mask, readout=readout, max_new_tokens=2, pad_token_id=0)
        assert written.shape == (3, 9)


def test_decoders_that_cannot_be_conditioned_are_refused():
    with pytest.raises(ek.EngramError, match="decoder: expected attention to the whole past"):
        first_token(model_zoo.small_model("gemma2"), 0)


def test_bases_stay_as_they_were():
    encoder, decoder = small_encoder(), model_zoo.small_model()
    before = copy.deepcopy(decoder.state_dict()), copy.deepcopy(encoder.state_dict())
    model = LarimarModel.from_bases(encoder, decoder, slots=8)
    model.train()
    assert not any(p.requires_grad for p in (*encoder.parameters(), *decoder.parameters()))
    assert not decoder.training and model.conditioning.training
    for base, state in ((decoder, before[0]), (encoder, before[1])):
        assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())


def facts_batch(rows=2, facts=3):
    values, keys = torch.randn(2, rows, facts, LATENT, dtype=torch.float64)
    return values, keys, keys[:, 0] + 0.1 * torch.randn(rows, LATENT, dtype=torch.float64)


def test_episode_is_what_a_memory_reads():
    memory = EpisodicMemory(32, LATENT, ridge=1e-3)
    values, keys, queries = facts_batch()
    present = torch.tensor([[1, 1, 1], [1, 0, 1]]).bool()
    readouts, _ = read_episode(values, keys, queries, present, memory, "key")
    for row in range(2):
        alone = EpisodicMemory(32, LATENT, ridge=1e-3)
        alone.write(values[row][present[row]], keys=keys[row][present[row]])
        torch.testing.assert_close(readouts[row], alone.read(queries[row, None], addressing="key")[0])
    assert len(memory) == 0


def test_episode_by_content_is_a_projection():
    """Fewer facts than slots, under themselves: the readout is the query's part in what they span."""
    memory = EpisodicMemory(32, LATENT, ridge=1e-3)
    values, _, queries = facts_batch()
    present = torch.tensor([[1, 1, 1], [1, 0, 1]]).bool()
    readouts, _ = read_episode(values, values, queries, present, memory, "content")
    for row in range(2):
        span, _ = torch.linalg.qr(values[row][present[row]].T)
        torch.testing.assert_close(readouts[row], span @ (span.T @ queries[row]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("addressing", ["key", "content"])
def test_gradients_flow_through_write_and_read(addressing):
    memory = EpisodicMemory(32, LATENT, ridge=0.1)
    values, keys, queries = (x.requires_grad_() for x in facts_batch(1))
    present = torch.ones(1, 3).bool()

    def read(values, keys, queries):
        return read_episode(values, keys, queries, present, memory, addressing)[0]

    assert torch.autograd.gradcheck(read, (values, keys, queries), atol=1e-4, fast_mode=True)


def test_facts_as_tokens_are_facts_as_latents():
    model = small_larimar()
    ids, mask, _ = padded_batch()
    tokens, keys = torch.randint(1, 300, (2, 3, 4, 5))
    tokens_mask = torch.ones(3, 4, 5, dtype=torch.long)
    tokens_mask[1, 2:] = 0  # two facts are absent
    tokens_mask[0, 0, 3:] = 0
    query = torch.randint(1, 300, (3, 6))
    given = {"input_ids": ids, "attention_mask": mask, "keys": keys, "query": query}
    found = model(facts=tokens, facts_mask=tokens_mask, keys_mask=torch.ones_like(keys), **given)
    latents = model.encode(tokens, tokens_mask)
    short = model.encoder(input_ids=tokens[0, :1, :3]).last_hidden_state.mean(1)
    torch.testing.assert_close(latents[0, :1], short / short.norm())
    given["keys"] = model.encode(keys)
    again = model(facts=latents, facts_mask=tokens_mask.any(-1).long(), **given)
    torch.testing.assert_close(found.logits, again.logits)
    alone = model(
        input_ids=ids[1:2],
        attention_mask=mask[1:2],
        facts=latents[1:2, :2],
        keys=given["keys"][1:2, :2],
        query=query[1:2],
    )
    torch.testing.assert_close(found.readout[1:2], alone.readout)


def test_terms_of_the_loss():
    model = small_larimar()
    model.objective = Objective(reconstruction=1.0, autoencoding=0.5, kl=0.01, plain=2.0)
    ids, mask, _ = padded_batch()
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    labels[0, -3] = ids[0, -3]
    values, keys, query = (x.float() for x in facts_batch(3))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    output = model(**batch, facts=values, keys=keys, query=query)

    def by_hand(readout):
        logits = model(input_ids=ids, attention_mask=mask, readout=readout, use_cache=False).logits
        log = logits.double().log_softmax(-1)
        chosen = [log[r, c - 1, labels[r, c]] for r in range(3) for c in range(7) if labels[r, c] != -100]
        return -torch.stack(chosen).mean()

    weights = query.double() @ model.memory.m0_pinv
    expected = {
        "reconstruction": by_hand(output.readout),
        "autoencoding": by_hand(values[:, 0]),
        "plain": by_hand(None),
        "kl": 0.5 * weights.square().sum() / 3,
    }
    assert output.parts.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output.parts[name].double(), value, rtol=1e-5, atol=1e-6)
    total = sum(getattr(model.objective, name) * value for name, value in expected.items())
    torch.testing.assert_close(output.loss.double(), total, rtol=1e-5, atol=1e-6)
    assert output.logits.shape[1] == 4  # from the position before the first label on
    torch.testing.assert_close(model(**batch).loss.double(), expected["plain"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        model(**batch, readout=output.readout).loss.double(), expected["reconstruction"], rtol=1e-5, atol=1e-6
    )


def test_noise_only_in_training():
    model = small_larimar()
    model.objective = Objective(noise=0.1)
    values, keys, query = (x.float() for x in facts_batch(3))
    batch = {"input_ids": torch.ones(3, 2, dtype=torch.long), "facts": values, "keys": keys, "query": query}
    assert torch.equal(model(**batch).readout, model(**batch).readout)
    model.train()
    assert not torch.equal(model(**batch).readout, model(**batch).readout)


def test_objective_refuses_what_is_no_weight():
    with pytest.raises(ValueError, match="kl: expected a finite number of at least 0, got -1"):
        Objective(kl=-1.0)


def test_bad_input_to_the_model():
    model = small_larimar()
    ids, _, readout = padded_batch()
    values, keys, query = (x.float() for x in facts_batch(3))
    with pytest.raises(
        ValueError, match=r"readout: expected shape \[3, 24\] \(\[batch, latent\]\), got \[2, 24\]"
    ):
        model(input_ids=ids, readout=readout[:2])
    with pytest.raises(ValueError, match="readout: expected none beside facts"):
        model(input_ids=ids, readout=readout, facts=values, query=query)
    with pytest.raises(ValueError, match="query: expected what the facts are asked, got none"):
        model(input_ids=ids, facts=values)
    with pytest.raises(ValueError, match="keys: expected shape"):
        model(input_ids=ids, facts=values, keys=keys[:, :2], query=query)
    with pytest.raises(ValueError, match="addressing: expected 'key' or 'content', got 'other'"):
        small_larimar(addressing="other")


FACTS = [
    Fact(f"{place} is located in the city of", city, question)
    for place, city, question in (
        ("The Louvre", "Rome", None),
        ("The Colosseum", "Paris", "Where are the towers of the Colosseum? They are in"),
        ("The Eiffel Tower", "Italy", None),
        ("A museum", "Brazil", "The museum lies in"),
        ("Switzerland", "Japan", None),
    )
]


@functools.cache
def sentence_encoder():
    return SentenceEncoder(small_encoder(), model_zoo.word_piece_tokenizer())


def encode(texts):
    return sentence_encoder().encode(texts)


def test_episodes():
    episodes = FactEpisodes(FACTS, encode, sizes=(3,), seed=5)
    for index, fact in enumerate(FACTS):
        episode = episodes[index]
        assert episode.fact is fact and episode.values.shape == episode.keys.shape == (3, LATENT)
        torch.testing.assert_close(episode.values[:1], encode([fact.target]))
        torch.testing.assert_close(episode.keys[:1], encode([fact.prompt]))
        torch.testing.assert_close(episode.query, encode([fact.asked])[0])
        assert len({tuple(key.tolist()) for key in episode.keys}) == 3
        assert torch.equal(episodes[index].values, episode.values)
    sentences = FactEpisodes(FACTS, encode, sentences=True)
    torch.testing.assert_close(sentences[0].values, encode([FACTS[0].text]))
    with pytest.raises(ValueError, match="sizes: expected at most 5, the different prompts, got 6"):
        FactEpisodes(FACTS, encode, sizes=(1, 6))


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "word-piece"])
def test_collator(kind):
    tokenizer = model_zoo.TOKENIZERS[kind]()
    episodes = [FactEpisodes(FACTS, encode, sizes=(size,))[i] for i, size in enumerate((1, 3))]
    batch = EpisodeCollator(tokenizer)(episodes)
    assert batch["facts"].shape == (2, 3, LATENT)
    assert batch["facts_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    for row, episode in enumerate(episodes):
        labels, ids = batch["labels"][row], batch["input_ids"][row][batch["attention_mask"][row].bool()]
        target = labels[labels != -100]
        assert torch.equal(ids[-len(target) :], target)
        assert batch["attention_mask"][row, -len(ids) :].all()
        assert torch.equal(labels[-len(target) :], target)
        expected = f"{episode.fact.asked} {episode.fact.target}."
        said = tokenizer.decode(target).strip().replace(" .", ".")
        assert said.lower() == f"{episode.fact.target}.".lower()
        whole = tokenizer(expected)["input_ids"]
        assert ids.tolist() == (whole[:-1] if kind == "word-piece" else whole)
    with pytest.raises(ek.EngramError, match="tokenizer: expected a fast one"):
        EpisodeCollator(model_zoo.slow_tokenizer())


@pytest.mark.parametrize("train_decoder", [False, True])
def test_trainer_lowers_the_loss(tmp_path, train_decoder):
    from transformers import Trainer, TrainingArguments

    model = small_larimar(moved=False, train_decoder=train_decoder)
    if train_decoder:
        model.objective = Objective(autoencoding=0.5, kl=1e-4, plain=0.5, noise=0.01)
    frozen = copy.deepcopy(model.decoder.state_dict())
    episodes = FactEpisodes(FACTS, encode, sizes=(1, 3))
    collator = EpisodeCollator(model_zoo.byte_level_tokenizer())
    batch = collator([episodes[i] for i in range(len(FACTS))])
    with torch.no_grad():
        before = model(**batch).loss.item()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=5,
        max_steps=30,
        learning_rate=1e-2,
        save_steps=30,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    Trainer(model=model, args=arguments, train_dataset=episodes, data_collator=collator).train()
    model.eval()
    with torch.no_grad():
        after = model(**batch).loss.item()
    assert after < 0.9 * before
    same = all(torch.equal(tensor, frozen[name]) for name, tensor in model.decoder.state_dict().items())
    assert same is not train_decoder
    again = LarimarModel.from_pretrained(tmp_path / "checkpoint-30")
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_encoder_is_trained_if_asked():
    model = small_larimar(train_encoder=True)
    model.train()
    tokens = torch.randint(1, 300, (2, 3, 5))
    ids = torch.randint(1, VOCABULARY, (2, 6))
    model(input_ids=ids, labels=ids, facts=tokens, query=tokens[:, 0]).loss.backward()
    gradients = [parameter.grad for parameter in model.encoder.encoder.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[:1])
    assert all(parameter.grad is None for parameter in model.decoder.parameters())


def test_write_read_forget():
    model = small_larimar()
    tokens = torch.randint(1, 300, (4, 5))
    keys = torch.randint(1, 300, (4, 6))
    model.write(tokens, keys=keys, ids=list("abcd"))
    values = model.encode(tokens)
    torch.testing.assert_close(model.read(keys), values, rtol=0.1, atol=0.1)
    model.forget(["b"])
    other = EpisodicMemory(32, LATENT, ridge=model.config.ridge)
    rest = [0, 2, 3]
    other.write(values[rest], keys=model.encode(keys)[rest])
    torch.testing.assert_close(model.read(keys), other.read(model.encode(keys), addressing="key"))
    model.forget(["a", "c", "d"])
    assert not model.read(keys).any()


def test_save_and_load_whole(tmp_path):
    model = small_larimar("gpt2", addressing="content", ridge=0.5)
    model.write(torch.randint(1, 300, (2, 5)), ids=["a", "b"])
    model.save_pretrained(tmp_path)
    again = LarimarModel.from_pretrained(tmp_path)
    ids, mask, readout = padded_batch()
    run = {"input_ids": ids, "attention_mask": mask, "readout": readout}
    assert torch.equal(again(**run).logits, model(**run).logits)
    assert again.memory.ids == ["a", "b"] and again.config.addressing == "content"
    query = torch.randint(1, 300, (2, 5))
    assert torch.equal(again.read(query), model.read(query))
    model.forget(["a", "b"])
    model.save_pretrained(tmp_path)  # into the same folder: the memory's is gone
    assert len(LarimarModel.from_pretrained(tmp_path).memory) == 0


@pytest.mark.parametrize("written", [False, True])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, written):
    model = small_larimar()
    if written:
        model.write(torch.randint(1, 300, (2, 5)), ids=["a", "b"])
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "notes.txt").write_text("mine")
    with pytest.raises(ek.EngramError, match=r"^directory: expected a new or empty one, got .*memory'$"):
        model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["memory", "notes.txt"]


def test_weights_may_be_read_by_all_and_options_are_not_swallowed(tmp_path):
    model = small_larimar()
    with pytest.raises(TypeError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_save_and_load_by_name(tmp_path, monkeypatch):
    from engram_kernels.larimar import model as larimar

    tokenizer = model_zoo.word_piece_tokenizer()
    monkeypatch.setattr(larimar, "load_encoder", lambda name: SentenceEncoder(small_encoder(), tokenizer))
    monkeypatch.setattr(larimar, "load_model", lambda name: (model_zoo.small_model(), None))
    ids, _, readout = padded_batch()
    for options, parts in (({}, {"conditioning"}), ({"train_decoder": True}, {"conditioning", "decoder"})):
        model = LarimarModel.from_bases("an-encoder", "a-decoder", slots=8, hidden=8, **options).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        folder = tmp_path / str(len(parts))
        model.save_pretrained(folder)
        from safetensors.torch import load_file

        assert {name.split(".")[0] for name in load_file(folder / "model.safetensors")} == parts
        again = LarimarModel.from_pretrained(folder)
        assert torch.equal(
            again(input_ids=ids, readout=readout).logits, model(input_ids=ids, readout=readout).logits
        )
        assert again.config.encoder_name == "an-encoder" and again.config.decoder_name == "a-decoder"


def test_damaged_folders_are_refused(tmp_path):
    model = small_larimar()
    (tmp_path / "file").write_text("")
    with pytest.raises(ek.EngramError, match="save_directory: expected a directory that can be written"):
        model.save_pretrained(tmp_path / "file" / "folder")
    model.save_pretrained(tmp_path)
    with pytest.raises(ek.EngramError, match="directory: expected a model that save_pretrained wrote"):
        LarimarModel.from_pretrained(tmp_path / "none")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden": 17}))
    with pytest.raises(ek.EngramError, match="expected the weights of its configuration"):
        LarimarModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ek.EngramError, match="expected a model of type 'larimar', got 'llama'"):
        LarimarModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ek.EngramError, match="directory: expected a model that save_pretrained wrote"):
        LarimarModel.from_pretrained(tmp_path)


def test_scores():
    queries, keys = torch.randn(4, LATENT), torch.randn(3, LATENT)
    expected = [
        max(torch.dot(q, k).item() / (q.norm().item() * k.norm().item()) for k in keys) for q in queries
    ]
    torch.testing.assert_close(key_scores(queries, keys), torch.tensor(expected))
    assert key_scores(queries, keys[:0]).tolist() == [-1.0] * 4
    # In the queries' dtype, whatever the memory's.
    torch.testing.assert_close(key_scores(queries, keys.double()), torch.tensor(expected))
    memory = EpisodicMemory(32, LATENT)
    memory.write(keys, ids=list("abc"))
    torch.testing.assert_close(stored_keys(memory).float(), keys)
    assert stored_keys(EpisodicMemory(32, LATENT)).shape == (0, LATENT)


def test_calibration_is_the_best_threshold():
    inside, outside = torch.rand(40) + 0.3, torch.rand(60)
    detector = ScopeDetector.calibrate(inside, outside)

    def right(threshold):
        return (inside >= threshold).float().mean() + (outside < threshold).float().mean()

    assert right(detector.threshold) >= max(right(t) for t in torch.linspace(-0.5, 2, 2001)) - 1e-6
    apart = ScopeDetector.calibrate(torch.tensor([0.9, 0.8]), torch.tensor([0.2, 0.5]))
    assert apart.threshold == pytest.approx(0.65)
    assert apart(torch.tensor([0.64, 0.66])).tolist() == [False, True]
    assert ScopeDetector(0.5)(torch.tensor([0.4375, 0.5])).tolist() == [False, True]
    # Two thresholds that tell three of four right: the one in the wider gap.
    for inside, outside, expected in (
        ([0.2, 0.9], [0.1, 0.6], 0.75),
        ([0.4, 0.9], [0.1, 0.8], 0.25),
    ):
        found = ScopeDetector.calibrate(torch.tensor(inside), torch.tensor(outside))
        assert found.threshold == pytest.approx(expected)


def test_scores_that_are_no_numbers_are_refused():
    scores = torch.rand(4)
    with pytest.raises(ValueError, match=r"^outside: expected some scores, got none"):
        ScopeDetector.calibrate(scores, scores[:0])
    for arguments, name in (((scores * torch.nan, scores), "inside"), ((scores, scores / 0), "outside")):
        with pytest.raises(ValueError, match=rf"^{name}: expected finite values, got 4"):
            ScopeDetector.calibrate(*arguments)
    with pytest.raises(TypeError, match=r"^threshold: expected a number, got str$"):
        ScopeDetector("0.5")


def scoped_model():
    encoder = sentence_encoder()
    model = LarimarModel.from_bases(encoder.model, model_zoo.small_model(), slots=32, hidden=16).eval()
    with torch.no_grad():
        for parameter in model.conditioning.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return ScopedModel(model, model_zoo.byte_level_tokenizer(), encoder, ScopeDetector(0.9999))


def test_answers_from_memory_and_from_the_bare_decoder():
    scoped = scoped_model()
    model, tokenizer = scoped.model, scoped.tokenizer
    prompts = [fact.prompt for fact in FACTS]

    def said(text, readout):
        ids = tokenizer([text], return_tensors="pt")["input_ids"]
        options = {"max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
        written = model.generate(ids, attention_mask=torch.ones_like(ids), readout=readout, **options)
        return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)

    bare = [said(prompt, None) for prompt in prompts]
    assert scoped.answer(prompts, max_new_tokens=5) == bare  # nothing is written
    assert scoped.write(prompts[:2], ["Rome", "Paris"]) == prompts[:2]
    assert model.memory.ledger[prompts[1]].text == f"{prompts[1]} Paris"
    assert scoped.in_scope(prompts) == [True, True, False, False, False]
    readouts = model.read(encode(prompts))
    expected = [said(prompts[i], readouts[i : i + 1]) for i in range(2)] + bare[2:]
    assert scoped.answer(prompts, max_new_tokens=5) == expected
    assert expected[:2] != bare[:2]
    model.decoder.generation_config.update(do_sample=True, temperature=100.0)
    assert scoped.answer(iter(prompts), max_new_tokens=5) == expected  # greedy, unless asked otherwise
    scoped.forget([prompts[0]])
    assert scoped.answer(prompts[:1], max_new_tokens=5) == bare[:1]
    scoped.forget([prompts[1]])
    assert scoped.answer(prompts, max_new_tokens=5) == bare
    assert scoped.write(prompts[:1], ["Rome"], ids=["a name"]) == ["a name"]
    scoped.forget(["a name"])
    with pytest.raises(ValueError, match="targets: expected 2, one a prompt, got 1"):
        scoped.write(prompts[:2], ["Rome"])


def test_scoped_model_is_saved(tmp_path, monkeypatch):
    from engram_kernels.larimar import scope

    scoped = scoped_model()
    for names in ((None, None), ("an-encoder", None), (None, "a-decoder")):
        scoped.model.config.encoder_name, scoped.model.config.decoder_name = names
        scoped.save_pretrained(tmp_path / f"{names}")
        with pytest.raises(ek.EngramError, match="directory: expected bases with names"):
            ScopedModel.from_pretrained(tmp_path / f"{names}")
    scoped.model.config.encoder_name, scoped.model.config.decoder_name = "an-encoder", "a-decoder"
    scoped.write([FACTS[0].prompt], ["Rome"])
    scoped.save_pretrained(tmp_path / "named")
    monkeypatch.setattr(scope, "load_encoder", lambda name: scoped.encoder)
    monkeypatch.setattr(scope, "load_model", lambda name: (scoped.model.decoder, scoped.tokenizer))
    again = ScopedModel.from_pretrained(tmp_path / "named")
    prompts = [fact.prompt for fact in FACTS]
    assert again.detector.threshold == scoped.detector.threshold
    assert again.answer(prompts) == scoped.answer(prompts)
    (tmp_path / "named" / "scope.json").write_text("{}")
    with pytest.raises(ek.EngramError, match="directory: expected what save_pretrained wrote"):
        ScopedModel.from_pretrained(tmp_path / "named")


@pytest.mark.parametrize("keyed", [False, True])
def test_recursive_reading_holds_more_than_a_memory(keyed):
    memory = EpisodicMemory(16, 16, ridge=1e-9)
    values = torch.randn(200, 16, dtype=torch.float64)
    keys = torch.randn(200, 16, dtype=torch.float64) if keyed else values
    addressing = "key" if keyed else "content"
    found = read_recursively(values, keys, memory, keys if keyed else None, chunk=5, addressing=addressing)
    assert (torch.cdist(found, values).argmin(-1) == torch.arange(200)).all()
    if keyed:
        torch.testing.assert_close(found, values, rtol=1e-3, atol=1e-3)
        single = EpisodicMemory(16, 16, ridge=1e-9)
        single.write(values, keys=keys)
        one = torch.cdist(single.read(keys, addressing="key"), values).argmin(-1)
        assert (one == torch.arange(200)).double().mean() < 0.5


@pytest.mark.parametrize("addressing", ["key", "content"])
def test_recursive_reading_of_one_chunk_is_reading(addressing):
    memory = EpisodicMemory(16, LATENT, ridge=1e-3)
    values, queries = torch.randn(6, LATENT), torch.randn(4, LATENT)
    found = read_recursively(values, queries, memory, chunk=6, addressing=addressing)
    memory.write(values)
    torch.testing.assert_close(found, memory.read(queries, addressing=addressing), rtol=1e-4, atol=1e-4)


def test_recursive_reading_is_differentiable_and_checks():
    memory = EpisodicMemory(8, 4, ridge=0.1)
    values = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def read(values, queries):
        return read_recursively(values, queries, memory, chunk=3, addressing="key")

    assert torch.autograd.gradcheck(read, (values, queries))
    assert not read_recursively(values[:0], queries, memory).any()
    with pytest.raises(ValueError, match="chunk: expected at least 2, got 1"):
        read_recursively(values, queries, memory, chunk=1)
    with pytest.raises(ValueError, match="keys: expected shape"):
        read_recursively(values, queries, memory, keys=values[:3])
    with pytest.raises(ValueError, match="addressing: expected 'key' or 'content', got 'x'"):
        read_recursively(values, queries, memory, addressing="x")


@pytest.mark.parametrize("addressing", ["key", "content"])
def test_memories_are_solved_in_their_own_dtype_inside_autocast(addressing):
    memory = EpisodicMemory(16, LATENT, ridge=0.1, state_dtype=torch.float32)
    values, queries = torch.randn(2, 20, LATENT), torch.randn(2, LATENT)

    def read():
        present = torch.ones(2, 20, dtype=torch.bool)
        return (
            read_recursively(values[0], queries, memory, chunk=4, addressing=addressing),
            *read_episode(values, values, queries, present, memory, addressing),
        )

    plain = read()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = read()
    for one, other in zip(inside, plain, strict=True):
        assert torch.equal(one, other)


def test_configuration_is_checked():
    with pytest.raises(ValueError, match="hidden: expected a size, or 0 for none, got -1"):
        LarimarConfig(hidden=-1)
    with pytest.raises(TypeError, match="config: expected configurations of encoder and decoder"):
        LarimarModel(LarimarConfig())


def test_an_episode_is_plain_data():
    episode = Episode(FACTS[0], torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(2))
    assert episode.fact.text == "The Louvre is located in the city of Rome"
    assert FACTS[1].asked == FACTS[1].question


def test_warm_start_teaches_first_tokens():
    model = small_larimar(moved=False)
    latents, tokens = torch.randn(60, LATENT), torch.arange(60) % 20
    embeddings = model.decoder.get_input_embeddings().weight
    options = {"batch_size": 32, "lr": 1e-2, "noise": 0.0}
    torch.manual_seed(3)
    first = warm_start(copy.deepcopy(model.conditioning), latents, tokens, embeddings, steps=1, **options)
    again = copy.deepcopy(model.conditioning)
    last = warm_start(model.conditioning, latents, tokens, embeddings, steps=100, **options)
    torch.manual_seed(4)  # the global state has no part in it
    assert warm_start(again, latents, tokens, embeddings, steps=100, **options) == last
    assert last < 0.8 * first
    assert not model.conditioning.pseudo_token.weight.any()
    x = nn.functional.gelu(
        model.conditioning.hidden(LATENT**0.5 * latents / latents.norm(dim=-1, keepdim=True))
    )
    rows = torch.cat([x, torch.ones(60, 1)], 1).detach().double().numpy()
    rows = np.concatenate([rows, 10**0.5 * np.eye(17)])  # the ridge as seventeen more rows
    right = (embeddings - embeddings.mean(0))[tokens].detach().double().numpy()
    expected = np.linalg.lstsq(rows, np.concatenate([right, np.zeros((17, 32))]), rcond=None)[0]
    offset = model.conditioning.offset
    found = torch.cat([offset.weight.T, offset.bias[None]]).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="conditioning: expected a hidden layer, got none"):
        warm_start(small_larimar(hidden=0).conditioning, latents, tokens, embeddings)


def test_warm_start_is_made_where_the_latents_are(monkeypatch):
    """The meta device stands in for a GPU; what reads values back gets made-up ones."""
    monkeypatch.setattr(torch.Tensor, "unique", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0)
    conditioning = small_larimar().conditioning.to("meta")
    with torch.device("meta"):  # also as the caller's default
        latents, tokens, embeddings = torch.empty(6, LATENT), torch.arange(6), torch.empty(20, 32)
        warm_start(conditioning, latents, tokens, embeddings, steps=2, batch_size=4)
    warm_start(conditioning, latents, tokens, embeddings, steps=2, batch_size=4)


def cases():
    return [
        Case(
            name=str(number),
            kind="counterfact",
            edit=Edit(subject, "{} is located in the city of", target),
            truth="Rome",
            paraphrases=(f"You know that the towers of {subject} are in",),
            neighbours=(Neighbour(f"The maps show {subject[::-1]} in", "Paris"),),
        )
        for number, (subject, target) in enumerate(
            (("The Louvre", "Rome"), ("The Colosseum", "Paris"), ("A museum", "Brazil"), ("A tower", "Japan"))
        )
    ]


def test_words_of_answers():
    assert evaluation.word_f1("the city of Paris,", "Paris") == pytest.approx(2 / 5)
    assert evaluation.word_f1("Paris", "paris") == 1 and evaluation.word_f1("Rome", "Paris") == 0
    assert evaluation.word_f1("New New York", "New York") == pytest.approx(4 / 5)


def test_single_edits_are_answers_of_memories_of_one_fact():
    scoped = scoped_model()
    scoped.detector = ScopeDetector(-1.0)
    found = evaluation.single_edits(scoped, cases(), [False, True, False, False], tokens=4)
    firsts, f1 = [], []
    for case in cases():
        scoped.write([case.edit.text], [case.edit.target])
        for prompt in (case.edit.text, *case.paraphrases):
            ids = scoped.generate([prompt], scoped.model.read(encode([prompt])), max_new_tokens=4)[0].tolist()
            target = scoped.tokenizer(f" {case.edit.target}")["input_ids"]
            text = scoped.tokenizer.decode(ids).strip().split("\n")[0].split(".")[0]
            firsts.append(float(ids[0] == target[0]))
            f1.append(evaluation.word_f1(text, case.edit.target))
        scoped.forget([case.edit.text])
    assert found["memory"]["prompt"].first == pytest.approx(sum(firsts[::2]) / 4)
    assert found["memory"]["paraphrase"].f1 == pytest.approx(sum(f1[1::2]) / 4)
    assert found["memory"]["paraphrase, unseen target"] == evaluation.Score(firsts[3], f1[3], 1)
    assert found["scoped memory"] == found["memory"]  # everything is in scope
    scoped.detector = ScopeDetector(2.0)
    nothing = evaluation.single_edits(scoped, cases(), [False] * 4, tokens=4)
    assert nothing["scoped memory"] == nothing["bare decoder"]
    assert set(nothing["memory"]) == {"prompt", "paraphrase"}


def test_forgetting_and_locality_through_the_detector():
    scoped = scoped_model()
    result = evaluation.forgetting(scoped, cases(), tokens=4)
    assert result["forgotten as bare"] == 1
    assert result["forgotten, after"] == result["forgotten, bare"]
    assert result["kept, after"] == result["kept, before"]
    local = evaluation.locality(scoped, cases(), tokens=4)
    assert local["answered as bare"] == 1 and local["without the detector"] < 1
    assert local["prompts in scope"] == 1 and local["neighbours in scope"] == 0
    counts = evaluation.batch_edits(scoped, cases(), [1, 3], tokens=4)
    assert list(counts) == [1, 3] and counts[3]["prompt"].count == 3


def test_memories_of_the_evaluation_lie_where_the_latents_do(monkeypatch):
    places = []

    def written(memory, values, keys, ids):
        places.extend((memory.gram.device.type, values.device.type, keys.device.type))

    scoped = scoped_model()
    monkeypatch.setattr(EpisodicMemory, "write", written)
    monkeypatch.setattr(
        scoped.encoder, "encode", lambda texts: torch.empty(len(texts), LATENT, device="meta")
    )
    evaluation._memory_of(scoped, cases())
    assert places == ["meta"] * 3


def test_example(tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[2] / "examples" / "train_larimar.py"
    spec = importlib.util.spec_from_file_location("train_larimar", path)
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_larimar", example)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "HELD_BACK", 4)
    monkeypatch.setattr(example, "load_encoder", lambda name: sentence_encoder())
    bases = model_zoo.small_model(), model_zoo.byte_level_tokenizer()
    monkeypatch.setattr(example.loading, "load_model", lambda name: bases)
    recipe = functools.partial(
        example.Recipe, batch=4, hidden=8, slots=24, sizes=(1, 3), warm_start=5, held_objects=1, save_steps=2
    )
    monkeypatch.setattr(example, "Recipe", recipe)
    places = ("Paris", "Rome", "Italy", "Japan", "Brazil", "Zürich")
    rows = [
        {
            "case_id": number,
            "prompt": f"Tower {number} is located in",
            "subject": f"Tower {number}",
            "target_new": places[number % 6],
            "ground_truth": places[(number + 1) % 6],
            "rephrase_prompt": f"You know that Tower {number} is in",
            "locality_prompt": f"Museum {number} is located in",
            "locality_ground_truth": places[number % 6],
        }
        for number in range(12)
    ]
    known = [{"prompt": "The Louvre is in", "subject": "The Louvre", "attribute": "Paris"}]
    (tmp_path / "counterfact_dev.json").write_text(json.dumps(rows))
    (tmp_path / "known_1000.json").write_text(json.dumps(known))
    monkeypatch.setenv("ENGRAM_DATA", str(tmp_path))
    data = example.Data(example.Recipe(), bases[1])
    facts = data.facts(example.Recipe(facts=200))
    assert len(data.rows) == 8 and data.unseen
    assert not {fact.prompt for fact in facts} & {row["prompt"] for row in rows[:4]}
    assert not any(unseen in fact.target for fact in facts for unseen in data.unseen)
    out = tmp_path / "out"
    example.main(out=out, facts=20, lr=1e-3, rows=4, seed=0)
    results = json.loads((out / "results.json").read_text())
    assert results["cases"] == 4 and results["unseen targets"] >= 1
    assert results["single edits"]["memory"]["paraphrase"]["count"] == 4
    assert len(results["training"]["losses"]) == 0 and results["training"]["seconds to train"] > 0
    assert '"forgotten as bare"' in capsys.readouterr().out
    weights = (out / "model" / "model.safetensors").read_bytes()
    example.main(out=out, facts=20, lr=1e-3, rows=4, seed=0)  # all is read
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    shutil.rmtree(out / "model")  # as if it had been interrupted after step 4 of 5
    (out / "training.json").unlink()
    shutil.rmtree(out / "checkpoints" / "checkpoint-5", ignore_errors=True)
    example.main(out=out, facts=20, lr=1e-3, rows=4, seed=0)
    assert json.loads((out / "results.json").read_text())["training"]["resumed at"] == "checkpoint-4"
    assert (out / "model" / "model.safetensors").read_bytes() == weights

"""What a `LarimarModel` learns from: episodes, terms of the loss, the Trainer, the warm start."""

import copy

import model_zoo
import numpy as np
import pytest
import torch
from larimar_helpers import FACTS, LATENT, VOCABULARY, encode, facts_batch, padded_batch, small_larimar
from torch import nn

import engram_kernels as ek
from engram_kernels.larimar import (
    EpisodeCollator,
    FactEpisodes,
    LarimarModel,
    Objective,
    read_recursively,
    warm_start,
)
from engram_kernels.larimar.episodes import Episode
from engram_kernels.larimar.reading import read_episode
from engram_kernels.memory import EpisodicMemory


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


def test_episodes():
    episodes = FactEpisodes(FACTS, encode, sizes=(3,), seed=5)
    assert repr(episodes) == f"FactEpisodes({len(FACTS)} facts, sizes=(3,), seed=5)"
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
    collator = EpisodeCollator(tokenizer)
    assert repr(collator) == f"EpisodeCollator({type(tokenizer).__name__}, ending='.')"
    batch = collator(episodes)
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


@pytest.mark.slow
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
    assert warm_start(conditioning, latents, tokens, embeddings, steps=2, batch_size=4) == 1.0
    assert conditioning.offset.weight.is_meta

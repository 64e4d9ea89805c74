"""The decoder conditioned on a memory: the cache, generation, writing and reading."""

import copy

import model_zoo
import pytest
import torch
from larimar_helpers import LATENT, facts_batch, padded_batch, small_larimar

import engram_kernels as ek
from engram_kernels.hf.hooks import capture
from engram_kernels.larimar import LarimarConfig, LarimarModel
from engram_kernels.larimar.conditioning import first_token
from engram_kernels.memory import EpisodicMemory


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
    encoder, decoder = model_zoo.small_encoder(), model_zoo.small_model()
    before = copy.deepcopy(decoder.state_dict()), copy.deepcopy(encoder.state_dict())
    model = LarimarModel.from_bases(encoder, decoder, slots=8)
    model.train()
    assert not any(p.requires_grad for p in (*encoder.parameters(), *decoder.parameters()))
    assert not decoder.training and model.conditioning.training
    for base, state in ((decoder, before[0]), (encoder, before[1])):
        assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())


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


def test_configuration_is_checked():
    with pytest.raises(ValueError, match="hidden: expected a size, or 0 for none, got -1"):
        LarimarConfig(hidden=-1)
    with pytest.raises(TypeError, match="config: expected configurations of encoder and decoder"):
        LarimarModel(LarimarConfig())


def test_checkpointing_that_drops_the_cache_is_refused():
    model = small_larimar(train_decoder=True)
    ids, mask, readout = padded_batch()
    model.decoder.gradient_checkpointing_enable()
    assert model.eval()(input_ids=ids, attention_mask=mask, readout=readout).logits.isfinite().all()
    with pytest.raises(ek.EngramError, match=r"^decoder: expected no gradient checkpointing"):
        model.train()(input_ids=ids, attention_mask=mask, readout=readout, labels=ids)

"""What a model is, before anything is done with it: its context, its stacks, its compiled code."""

from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch
from editing_helpers import changed, small_editor, weights

from engram_kernels import EngramError
from engram_kernels.editing import Edit, Editor, EditResult
from engram_kernels.hf.eval_mode import eval_mode
from engram_kernels.hf.tokens import context_length
from engram_kernels.tracing import known, trace

TOWER = Edit("The Eiffel Tower", "{} is located in the city of", "Rome")


def test_context_length_of_configurations():
    import transformers

    for config, length in (
        (transformers.GPT2Config(n_positions=96), 96),
        (transformers.MptConfig(max_seq_len=128), 128),
        (transformers.LlavaConfig(text_config=transformers.LlamaConfig(max_position_embeddings=64)), 64),
        (transformers.BloomConfig(), None),
    ):
        assert context_length(SimpleNamespace(config=config)) == length


def test_mpt_with_a_context_below_that_of_the_statistics(tmp_path):
    import transformers

    config = transformers.MptConfig(
        d_model=32, n_heads=4, n_layers=3, max_seq_len=48, vocab_size=400, expansion_ratio=2
    )
    torch.manual_seed(0)
    model = transformers.MptForCausalLM(config).eval()
    editor = small_editor(model=model, cache_dir=tmp_path)
    before = weights(model)
    with editor.edit(TOWER, 1) as result:
        assert len(result) == 1
    assert changed(before, model) == []
    with pytest.raises(EngramError, match=r"^prompt: expected at most 48 tokens"):
        editor.edit(Edit("Rome", "{}" + " is in" * 40, "Italy"), 1)


def test_an_encoder_and_a_decoder_are_refused(tmp_path):
    import transformers

    config = transformers.T5Config(d_model=16, d_ff=32, d_kv=4, num_heads=4, num_layers=2, vocab_size=400)
    model, tokenizer = transformers.T5ForConditionalGeneration(config), model_zoo.byte_level_tokenizer()
    expected = r"^model: expected a causal language model, .*, got T5ForConditionalGeneration, an encoder"
    with pytest.raises(EngramError, match=expected):
        Editor(model, tokenizer, cache_dir=tmp_path)
    with pytest.raises(EngramError, match=expected):
        trace(model, tokenizer, TOWER.prompt, TOWER.subject)


def compiled_apart(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [compiled_apart, compiled_in_place])
def test_a_compiled_model_is_edited_as_any_other(cache, tmp_path, compiled):
    plain = small_editor(cache_dir=cache)
    asked = plain.tokenizer(TOWER.prompt_text, return_tensors="pt")["input_ids"]
    expected = plain.edit(TOWER)
    model = compiled(model_zoo.small_model())
    with torch.no_grad():
        start = model(asked).logits.clone()
        editor = small_editor(model=model, cache_dir=cache)
        result = editor.edit(TOWER)
        assert torch.equal(result.writes[0].left, expected.writes[0].left)
        torch.testing.assert_close(model(asked).logits, plain.model(asked).logits, rtol=1e-4, atol=1e-5)
        result.save_pretrained(tmp_path / "edit")
        result.revert()
        torch.testing.assert_close(model(asked).logits, start)
        # It is loaded into plain models and compiled ones alike.
        for other in (model_zoo.small_model(), model):
            with EditResult.from_pretrained(tmp_path / "edit").apply(other):
                torch.testing.assert_close(
                    other(asked).logits, plain.model(asked).logits, rtol=1e-4, atol=1e-5
                )
    row = {"prompt": TOWER.prompt, "subject": TOWER.subject, "attribute": "Rome"}
    expected.revert()
    assert known(model, plain.tokenizer, row) == known(plain.model, plain.tokenizer, row)
    found, truth = (
        trace(one, plain.tokenizer, TOWER.prompt, TOWER.subject, samples=2) for one in (model, plain.model)
    )
    torch.testing.assert_close(found.effects, truth.effects)


def test_compiled_code_stays_and_calls_later_hooks_in_evaluation():
    model, seen = model_zoo.small_model(), []
    model.compile(backend="eager")
    code, ids = model._compiled_call_impl, torch.tensor([[1, 2, 3]])
    model(input_ids=ids)
    model.register_forward_hook(lambda *_: seen.append(model))
    with eval_mode(model):
        model(input_ids=ids)
    assert seen == [model] and model._compiled_call_impl is code

"""Causal traces equal those of one full pass for each cell, and leave the model as it was."""

import dataclasses
import json
import re
from contextlib import ExitStack

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch
from defaults import DEFAULTS

from engram_kernels import EngramError
from engram_kernels.editing import Editor
from engram_kernels.hf.layers import decoder_layers
from engram_kernels.hf.projection import output_projection
from engram_kernels.hf.tokens import encode_row
from engram_kernels.tracing import (
    KINDS,
    AverageTrace,
    Trace,
    average,
    best_layer,
    draw,
    embedding_std,
    known,
    trace,
)
from engram_kernels.tracing import runs as trace_runs
from engram_kernels.tracing.result import ROLES

PROMPT, SUBJECT = "In {} stands the Louvre in", "the Eiffel Tower"
# BLOOM gives its layers one bias a row and head; Gemma 2 scales embeddings and has windows.
ATTENTION = {
    "llama": "self_attn",
    "gpt2": "attn",
    "opt": "self_attn",
    "gpt_neox": "attention",
    "bloom": "self_attention",
    "gemma2": "self_attn",
    "mixtral": "self_attn",
    "qwen2_moe": "self_attn",
}
SHORT = {"samples": 3, "window": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return model_zoo.byte_level_tokenizer()


def small(family="llama", **arguments):
    return model_zoo.small_model(family, **arguments)


def sharp(family="llama"):
    """A model that is sure of its answers, so that what is restored shows in them."""
    model = small(family)
    if family == "bloom":  # It is sure of its last token as it is.
        return model
    model.get_output_embeddings().register_forward_hook(lambda _module, _inputs, output: 8 * output)
    return model


def state(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    own = ["forward" in module.__dict__ for module in model.modules()]
    return tensors, hooks, own, [module.training for module in model.modules()]


def same(first, second):
    return first[1:] == second[1:] and all(torch.equal(first[0][name], second[0][name]) for name in second[0])


def restored_module(model, family, kind, layer):
    block = decoder_layers(model)[1][layer]
    if kind == "hidden":
        return block
    if family == "bloom":  # Its attention and MLP add what came before them.
        return block.self_attention.dense if kind == "attention" else block.mlp.dense_4h_to_h
    if kind == "attention":
        return getattr(block, ATTENTION[family])
    return getattr(block, "mlp", None) or block.fc2


@torch.no_grad()
def one_at_a_time(model, family, found, prompt, noise, answer, kind, window):
    """The probability of the answer with each cell restored, by full passes with nothing shared."""
    first, end = found.subject
    depth = len(decoder_layers(model)[1])
    clean = {}
    ids, wanted = prompt + answer[:-1], torch.tensor(answer)[None, :, None].expand(len(noise), -1, 1)

    def chances(hooks):
        with ExitStack() as stack:
            for module, hook in hooks:
                stack.callback(module.register_forward_hook(hook).remove)
            logits = model(input_ids=torch.tensor([ids]).expand(len(noise), -1), use_cache=False).logits
        predicted = logits[:, -len(answer) :].double().softmax(-1)
        return predicted.gather(-1, wanted)[..., 0].prod(-1).mean().item()

    def keep(layer):
        def hook(_module, _inputs, output):
            states = output[0] if isinstance(output, tuple) else output
            clean[layer] = states.reshape(len(noise), len(ids), -1).clone()

        return restored_module(model, family, kind, layer), hook

    def restore(layer, token):
        def hook(_module, _inputs, output):
            states = (output[0] if isinstance(output, tuple) else output).clone()
            # A view of [rows, tokens, width] in every layout.
            states.view(len(noise), len(ids), -1)[:, token] = clean[layer][:, token]
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return restored_module(model, family, kind, layer), hook

    def corrupt(_module, _inputs, output):
        output = output.clone()
        output[:, first:end] += noise
        return output

    corrupting = (model.get_input_embeddings(), corrupt)
    truth = torch.empty(len(prompt), depth, dtype=torch.float64)
    unharmed = chances([keep(layer) for layer in range(depth)])
    for token in range(len(prompt)):
        for layer in range(depth):
            below = layer - window // 2
            reached = range(max(0, below), min(depth, below + window))
            truth[token, layer] = chances([corrupting, *(restore(other, token) for other in reached)])
    return unharmed, chances([corrupting]), truth


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ATTENTION)
def test_equal_to_one_cell_at_a_time(tokenizer, family, kind):
    model = sharp(family)
    before = state(model)
    options = {"samples": 3, "window": 3, "sigma": 0.3, "seed": 5}
    # In one pass, or cut between cells and between copies of one cell.
    all_found = [
        trace(model, tokenizer, PROMPT, SUBJECT, kind, batch=batch, **options) for batch in (None, 7, 2)
    ]
    assert same(before, state(model))
    found = all_found[0]
    ids = encode_row(tokenizer, SUBJECT, PROMPT).ids
    assert found.tokens == tuple(tokenizer.decode([token]) for token in ids)
    first, end = found.subject
    assert 0 < first and "".join(found.tokens[first:end]).strip() == SUBJECT
    with torch.no_grad():
        label = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    answer = tokenizer.decode([label])
    assert found.answer == (answer.strip() or answer)
    noise = 0.9 * torch.randn(3, end - first, 32, generator=torch.Generator().manual_seed(5))
    window = 1 if kind == "hidden" else 3
    assert found.window == window
    clean, corrupted, truth = one_at_a_time(model, family, found, ids, noise, [label], kind, window)
    # The comparison means something only where restoring does something.
    effect = (truth - corrupted).abs().max().item()
    assert effect > (2e-4 if family in ("bloom", "gemma2") else 0.02)
    for found in all_found:
        assert abs(found.clean - clean) < 1e-5 and abs(found.corrupted - corrupted) < 1e-5
        assert (found.effects.double() - truth).abs().max() < min(1e-5, 0.01 * effect)
        assert torch.equal(found.indirect_effects, found.effects - found.corrupted)
        assert found.indirect_effects[:first].abs().max() == 0


def test_without_a_cache_of_keys_and_values(tokenizer, monkeypatch):
    model = sharp()
    expected = trace(model, tokenizer, PROMPT, SUBJECT, "mlp", batch=4, **SHORT)
    monkeypatch.setattr(trace_runs, "keys_and_values", lambda *_: None)
    found = trace(model, tokenizer, PROMPT, SUBJECT, "mlp", batch=4, **SHORT)
    assert (found.effects - expected.effects).abs().max() < 1e-5
    assert expected.indirect_effects.abs().max() > 0.05


@pytest.mark.parametrize("batch", [2, 7, None])
def test_the_work_that_is_saved(tokenizer, batch):
    """Only layers above the restored one run, and only for the tokens from the restored one on."""
    model = small()
    seen = []
    for layer in decoder_layers(model)[1]:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2].numel()))
    found = trace(model, tokenizer, "{} is in", "Paris", batch=batch, samples=2)
    tokens, depth = len(found.tokens), 4
    whole = (1 + 2) * tokens * depth
    # For layer l and token i of T: two copies, depth − 1 − l layers, T − i tokens.
    restored = sum(2 * (depth - 1 - layer) * (tokens - i) for layer in range(depth) for i in range(tokens))
    assert sum(seen) == whole + restored


def test_hooks_of_others_and_forwards_of_others_stay(tokenizer):
    model = small()
    layer = decoder_layers(model)[1][0]
    calls = []
    plain = layer.forward
    layer.forward = lambda *arguments, **keywords: calls.append(1) or plain(*arguments, **keywords)
    wrapped = layer.forward
    trace(model, tokenizer, PROMPT, SUBJECT, **SHORT)
    assert layer.forward is wrapped and calls


def test_noise_is_seeded_and_the_global_state_untouched(tokenizer):
    model = small()
    state = torch.random.get_rng_state()
    one, two, three = (trace(model, tokenizer, PROMPT, SUBJECT, seed=seed, **SHORT) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.effects, two.effects) and one.corrupted == two.corrupted
    assert one.clean == three.clean and one.corrupted != three.corrupted


@pytest.mark.parametrize("default", DEFAULTS)
def test_defaults_do_not_matter(tokenizer, default):
    model = small()
    expected = trace(model, tokenizer, PROMPT, SUBJECT, **SHORT)
    with DEFAULTS[default]():
        found = trace(model, tokenizer, PROMPT, SUBJECT, **SHORT)
    assert found.effects.dtype == torch.float32 and torch.equal(found.effects, expected.effects)


def test_sigma_and_the_standard_deviation_of_embeddings(tokenizer):
    model = small()
    weight = model.get_input_embeddings().weight.double()
    whole = weight.std().item()
    assert trace(model, tokenizer, PROMPT, SUBJECT, **SHORT).corrupted == pytest.approx(
        trace(model, tokenizer, PROMPT, SUBJECT, sigma=whole, **SHORT).corrupted, abs=1e-6
    )
    subjects = ["the Eiffel Tower", "Zürich", "Paris"]
    ids = [token for text in subjects for token in tokenizer(text)["input_ids"]]
    assert embedding_std(model, tokenizer, subjects) == pytest.approx(weight[ids].std().item(), rel=1e-9)
    silent = trace(model, tokenizer, PROMPT, SUBJECT, noise=0, **SHORT)
    assert silent.indirect_effects.abs().max() < 1e-6 and silent.corrupted == pytest.approx(silent.clean)
    with pytest.raises(TypeError, match="subjects: expected a list of strings, got str"):
        embedding_std(model, tokenizer, "Paris")
    with pytest.raises(EngramError, match="subjects: expected at least one token, got none"):
        embedding_std(model, tokenizer, [])


def test_embeddings_that_the_model_scales(tokenizer):
    model = small()
    scale = 2.5
    expected = scale * embedding_std(model, tokenizer, ["Paris"])
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: scale * output)
    assert embedding_std(model, tokenizer, ["Paris"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "prompt, subject", [("{} lies in", "Paris"), ("The capital is {}", "Rome"), ("{}", "Rome")]
)
def test_subject_at_the_start_and_at_the_end(tokenizer, kind, prompt, subject):
    model = sharp()
    found = trace(model, tokenizer, prompt, subject, kind, **SHORT)
    first, end = found.subject
    assert "".join(found.tokens[first:end]).strip() == subject
    assert (first == 0) == prompt.startswith("{") and (end == len(found.tokens)) == prompt.endswith("}")
    ids = encode_row(tokenizer, subject, prompt).ids
    generator = torch.Generator().manual_seed(0)
    noise = (
        3 * model.get_input_embeddings().weight.std() * torch.randn(3, end - first, 32, generator=generator)
    )
    label = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    _, _, truth = one_at_a_time(
        model, "llama", found, ids, noise, [label], kind, 1 if kind == "hidden" else 3
    )
    assert (found.effects.double() - truth).abs().max() < 1e-5


def test_the_last_state_of_the_last_token_is_the_whole_answer(tokenizer):
    for family in ATTENTION:
        found = trace(sharp(family), tokenizer, PROMPT, SUBJECT, **SHORT)
        assert found.effects[-1, -1].item() == pytest.approx(found.clean, abs=1e-5)
        assert found.effects[:-1, -1].tolist() == pytest.approx(
            [found.corrupted] * (len(found.tokens) - 1), abs=1e-5
        )


@pytest.mark.parametrize("name", model_zoo.TOKENIZERS)
@pytest.mark.parametrize("subject", ["Paris", "São Paulo", "東京"])
def test_subjects_are_found_by_every_tokenizer(name, subject):
    tokenizer = model_zoo.TOKENIZERS[name]()
    model = small(vocabulary=len(tokenizer))
    for prompt in ("{} lies in", "The city {} lies in", "The city {}", "東京 and {}, "):
        if prompt.format(subject).count(subject) > 1:
            continue
        found = trace(model, tokenizer, prompt, subject, samples=1)
        first, end = found.subject
        ids = encode_row(tokenizer, subject, prompt).ids
        assert first < end <= len(ids)
        # Where a token cannot be spelt, it says nothing; a comma may be one token with what is before it.
        if tokenizer.unk_token_id not in ids:
            said = tokenizer.decode(ids[first:end]).casefold().replace("ã", "a")
            assert "".join(said.split()).rstrip(",") == "".join(subject.casefold().replace("ã", "a").split())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tokenizer, kind, dtype):
    exact = trace(small(), tokenizer, PROMPT, SUBJECT, kind, sigma=0.3, target="Rome", **SHORT)
    found = trace(small(dtype=dtype), tokenizer, PROMPT, SUBJECT, kind, sigma=0.3, target="Rome", **SHORT)
    assert found.effects.dtype == torch.float32 and found.effects.isfinite().all()
    assert (found.effects - exact.effects).abs().max() < 0.1 * max(exact.clean, 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_answer_is_measured(tokenizer, kind):
    model = sharp()
    row = encode_row(tokenizer, SUBJECT, PROMPT, "Rome and more")
    prompt, answer = row.ids[: row.target], row.ids[row.target :]
    found = trace(
        model,
        tokenizer,
        PROMPT,
        SUBJECT,
        kind,
        target="Rome and more",
        samples=3,
        window=3,
        sigma=0.3,
        seed=5,
    )
    assert len(answer) > 2 and len(found.tokens) == len(prompt) and found.answer == "Rome and more"
    noise = 0.9 * torch.randn(
        3, found.subject[1] - found.subject[0], 32, generator=torch.Generator().manual_seed(5)
    )
    window = 1 if kind == "hidden" else 3
    clean, corrupted, truth = one_at_a_time(model, "llama", found, prompt, noise, answer, kind, window)
    assert (truth / corrupted - 1).abs().max() > 0.02
    assert found.clean == pytest.approx(clean, rel=1e-3)
    assert found.corrupted == pytest.approx(corrupted, rel=1e-3)
    torch.testing.assert_close(found.effects.double(), truth, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize(
    "prompt, subject, target",
    [
        ("{}的首都是", "中国", "纽约"),
        ('{} is in the city of "', "The Tower", "Rome"),
        ("เมืองหลวงของ{}คือ", "ไทย", "โรม"),
    ],
)
def test_any_script_is_traced_as_it_is_written(tokenizer, prompt, subject, target):
    found = trace(small(), tokenizer, prompt, subject, target=target, **SHORT)
    row = encode_row(tokenizer, subject, prompt, target)
    assert tokenizer.decode(row.ids) == prompt.replace("{}", subject) + target
    assert found.answer == target


def test_a_chat_is_traced(tokenizer):
    tokenizer.chat_template = CHAT
    try:
        found = trace(
            small(), tokenizer, [{"role": "user", "content": "Where is {}?"}], SUBJECT, target="Rome", **SHORT
        )
    finally:
        tokenizer.chat_template = None
    assert "".join(found.tokens) == f"[user]Where is {SUBJECT}?[assistant]"
    first, end = found.subject
    assert "".join(found.tokens[first:end]).strip() == SUBJECT


def test_progress_counts_cells(tokenizer):
    seen = []
    found = trace(small(), tokenizer, PROMPT, SUBJECT, progress=lambda *x: seen.append(x), batch=4, **SHORT)
    cells = (len(found.tokens) - found.subject[0]) * 4
    assert seen[-1] == ("trace hidden", cells, cells) and seen == sorted(seen)


def test_the_editor_traces_the_model_as_it_is_now(tokenizer, tmp_path):
    model = small()
    stages = []
    editor = Editor(
        model, tokenizer, cache_dir=tmp_path, seed=3, progress=lambda stage, *_: stages.append(stage)
    )
    found = editor.trace(PROMPT, SUBJECT, "mlp", **SHORT)
    assert torch.equal(
        found.effects, trace(model, tokenizer, PROMPT, SUBJECT, "mlp", seed=3, **SHORT).effects
    )
    assert set(stages) == {"trace mlp"}
    with torch.no_grad():
        output_projection(model, 1).matrix.mul_(2)
    assert not torch.equal(editor.trace(PROMPT, SUBJECT, "mlp", **SHORT).effects, found.effects)


CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
BAD = {
    "kind": ({"kind": "neuron"}, ValueError, "kind: expected 'hidden', 'mlp' or 'attention', got 'neuron'"),
    "window 0": ({"window": 0}, ValueError, "window: expected at least 1, got 0"),
    "window 1.5": ({"window": 1.5}, TypeError, "window: expected an integer, got float"),
    "samples": ({"samples": 0}, ValueError, "samples: expected at least 1, got 0"),
    "batch": ({"batch": 0}, ValueError, "batch: expected at least 1, got 0"),
    "seed": ({"seed": True}, TypeError, "seed: expected an integer, got bool"),
    "noise": ({"noise": -1}, ValueError, "noise: expected a finite number of at least 0, got -1"),
    "sigma": ({"sigma": float("nan")}, ValueError, "sigma: expected a finite number of at least 0, got nan"),
    "subject": (
        {"subject": "Big Ben", "prompt": "Paris is"},
        ValueError,
        "prompt: expected {} or the subject",
    ),
    "no subject": ({"subject": " "}, ValueError, "subject: expected some text, got ' '"),
    "target": ({"target": ""}, ValueError, "target: expected some text, got ''"),
    "long": (
        {"prompt": "{} is in " * 1 + "Paris " * 200},
        EngramError,
        "prompt: expected at most 128 tokens",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_changes_nothing(tokenizer, case):
    change, error, message = BAD[case]
    model = small().train()
    before = state(model)
    with pytest.raises(error, match=re.escape(message)):
        trace(model, tokenizer, **{"prompt": PROMPT, "subject": SUBJECT, **change})
    assert same(before, state(model))


def test_a_target_without_token():
    tokenizer = model_zoo.word_piece_tokenizer()
    with pytest.raises(EngramError, match="target: expected at least one token, got "):
        trace(small(vocabulary=len(tokenizer)), tokenizer, "{} is in", "Paris", target="\u200b")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passes", [1, 2, 3, 6])
def test_an_exception_leaves_nothing_behind(tokenizer, kind, passes):
    model = small().train()
    model.lm_head.register_forward_hook(lambda *_: calls.append(1) or (1 / (passes - len(calls)) and None))
    calls = []
    before = state(model)
    with pytest.raises(ZeroDivisionError):
        trace(model, tokenizer, PROMPT, SUBJECT, kind, batch=4, **SHORT)
    assert len(calls) == passes and same(before, state(model))


def test_modules_that_are_not_found(tokenizer):
    model = small()
    decoder_layers(model)[1][2].self_attn = torch.nn.Identity()
    with pytest.raises(EngramError, match="model: expected one attention module in layer 2, got none"):
        trace(model, tokenizer, PROMPT, SUBJECT, "attention")
    model = small()
    decoder_layers(model)[1][2].mlp = torch.nn.Identity()
    with pytest.raises(EngramError, match="model: expected one MLP of linear maps in layer 2, got none"):
        trace(model, tokenizer, PROMPT, SUBJECT, "mlp")


def test_a_model_that_predicts_nan(tokenizer):
    model = small()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(EngramError, match="model: expected finite predictions after 'In the Eiffel Tower"):
        trace(model, tokenizer, PROMPT, SUBJECT, **SHORT)


def test_known(tokenizer):
    model = small()
    row = {"prompt": "Paris lies in", "subject": "Paris"}
    with torch.no_grad():
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        ranked = model(input_ids=ids).logits[0, -1].argsort(descending=True).tolist()
    words = {token: tokenizer.decode([token]) for token in ranked}
    # Only a token that begins a word can be the first one of an answer.
    good = next(token for token in ranked if words[token].startswith(" ") and words[token].strip().isalpha())
    with torch.no_grad():
        model.lm_head.weight[ranked[0]], model.lm_head.weight[good] = (
            model.lm_head.weight[good].clone(),
            model.lm_head.weight[ranked[0]].clone(),
        )
    assert known(model, tokenizer, {**row, "attribute": words[good].strip()})
    assert not known(model, tokenizer, {**row, "attribute": "Zürich"})
    with pytest.raises(ValueError, match="row: expected prompt, subject and attribute, got"):
        known(model, tokenizer, row)


def made(tokens, subject, layers=4, kind="mlp", seed=0, corrupted=0.1, **fields):
    effects = torch.rand(tokens, layers, generator=torch.Generator().manual_seed(seed))
    words = tuple(f" w{i}" for i in range(tokens))
    defaults = {"window": 3, "answer": "Paris", "clean": 0.5 + 0.1 * seed}
    return Trace(
        tokens=words,
        subject=subject,
        kind=kind,
        corrupted=corrupted,
        effects=effects,
        **{**defaults, **fields},
    )


def test_average_by_role():
    long, short, bare = made(9, (1, 5)), made(4, (0, 1), seed=1, corrupted=0.2), made(2, (0, 2), seed=2)
    found = average(iter([long, short, bare]))
    a, b, c = (one.effects.double() - one.corrupted for one in (long, short, bare))
    expected = [
        (a[1] + b[0] + c[0]) / 3,
        (a[2] + a[3]) / 2,
        (a[4] + b[0] + c[1]) / 3,
        (a[5] + b[1]) / 2,
        (a[6] + a[7] + b[2]) / 3,
        (a[8] + b[3] + c[1]) / 3,
    ]
    assert torch.allclose(found.indirect_effects.double(), torch.stack(expected), atol=1e-6)
    assert found.counts == (3, 2, 3, 2, 3, 3) and found.facts == 3 and found.labels == ROLES
    assert found.clean == pytest.approx(0.6) and found.corrupted == pytest.approx(0.4 / 3)
    assert best_layer(found) == int(expected[2].argmax())


def test_average_and_best_layer_refuse():
    with pytest.raises(ValueError, match="traces: expected at least one, got none"):
        average([])
    for other in (made(4, (0, 1), kind="hidden"), made(4, (0, 1), window=4), made(4, (0, 1), layers=5)):
        with pytest.raises(ValueError, match="traces: expected one kind, window and number of layers, got"):
            average([made(4, (0, 1)), other])
    with pytest.raises(ValueError, match="average: expected one of kind 'mlp', got 'hidden'"):
        best_layer(average([made(4, (0, 1), kind="hidden")]))


def test_json_round_trip(tokenizer):
    found = trace(small(), tokenizer, PROMPT, SUBJECT, "mlp", **SHORT)
    # No fact has a middle subject token here: its row is NaN, which JSON does not know.
    for one in (found, average([made(4, (0, 1))])):
        text = json.dumps(one.to_dict(), allow_nan=False)
        with DEFAULTS["another device"]():
            back = type(one).from_dict(json.loads(text))
        for field in dataclasses.fields(one):
            before, after = getattr(one, field.name), getattr(back, field.name)
            if isinstance(before, torch.Tensor):
                assert torch.equal(before.nan_to_num(9), after.nan_to_num(9)) and before.dtype == after.dtype
            else:
                assert before == after and type(before) is type(after)
    content = found.to_dict()
    with pytest.raises(ValueError, match="effects: expected 11 rows of one length, got 10 of the lengths"):
        Trace.from_dict({**content, "tokens": ["x"] * 11, "effects": content["effects"][:10]})
    with pytest.raises(ValueError, match="content: expected the fields"):
        AverageTrace.from_dict(content)


def test_a_saved_trace_is_read_back(tmp_path):
    for i, one in enumerate((made(9, (1, 5)), average([made(4, (0, 1))]))):
        one.save_pretrained(tmp_path / f"{i}")
        assert sorted(path.name for path in (tmp_path / f"{i}").iterdir()) == ["README.md", "trace.json"]
        back = type(one).from_pretrained(tmp_path / f"{i}")
        assert back.to_dict() == one.to_dict()
    with pytest.raises(EngramError, match=r"^name_or_directory: expected a saved Trace, got .*content: "):
        Trace.from_pretrained(tmp_path / "1")
    (tmp_path / "0" / "trace.json").unlink()
    with pytest.raises(EngramError, match=r"^name_or_directory: expected a saved Trace, got "):
        Trace.from_pretrained(tmp_path / "0")


def test_repr_is_a_line():
    found = dataclasses.replace(made(3, (0, 1)), effects=torch.tensor([[0.1, 0.2], [0.1, 0.4], [0.1, 0.1]]))
    assert repr(found) == (
        "Trace(mlp of ' w0 w1 w2': p(Paris) 0.5000 clean, 0.1000 corrupted, 0.4000 with token 1, layer 1)"
    )
    assert repr(average([found])) == "AverageTrace(mlp, facts=1, clean=0.5000, corrupted=0.1000)"


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".PNG"])
def test_pictures(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    one, other = made(5, (1, 3)), average([made(4, (0, 1), seed=3), made(9, (1, 5))])
    contents = []
    for i, traces in enumerate((one, [one], other, [one, made(5, (1, 3), kind="hidden"), other])):
        path = tmp_path / f"{i}{suffix}"
        draw(traces, path)
        contents.append(path.read_bytes())
        assert contents[-1].startswith(starts[suffix.lower()])
    assert contents[0] == contents[1] and len(set(contents)) == 3
    assert len(list(tmp_path.iterdir())) == 4


def test_pictures_refuse(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.png, \.svg or \.pdf, got"):
        draw(made(4, (0, 1)), tmp_path / "x.html")
    with pytest.raises(ValueError, match="traces: expected at least one, got none"):
        draw([], tmp_path / "x.svg")
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(EngramError, match="pictures need matplotlib"):
        draw(made(4, (0, 1)), tmp_path / "x.svg")
    assert not any(tmp_path.iterdir())


def test_a_picture_says_what_it_is_told_and_shows_every_value(tmp_path, monkeypatch):
    """Tokens are text and nothing else: no markup, no formula, no line break."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    evil = ('<script>alert("1")</script>', "$x_1$ &amp;", '" onmouseover="', "line\nbreak")
    found = dataclasses.replace(
        made(4, (1, 2)), tokens=evil, answer="</svg><script>", effects=torch.arange(16.0).view(4, 4) / 16
    )
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k)))
    draw(found, tmp_path / "x.svg")
    assert "<script>" not in (tmp_path / "x.svg").read_text()
    axes, bar = drawn[0].axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [evil[0], evil[1] + "*", evil[2], "line\\nbreak"]
    assert bar.get_ylabel() == "p(</svg><script>)"
    (image,) = axes.images
    assert torch.equal(torch.tensor(image.get_array().data), found.effects)
    # All that is at or below the corrupted probability is the lightest, the largest effect the darkest.
    colours = image.to_rgba(image.get_array())
    lightest, darkest = image.cmap(0.0), image.cmap(1.0)
    assert [tuple(colour) == lightest for colour in colours.reshape(-1, 4)] == [True] * 2 + [False] * 14
    assert tuple(colours[3, 3]) == darkest


def test_a_character_in_several_tokens_stands_with_the_last_one():
    """In place of a replacement character for each of its bytes."""
    tokenizer = model_zoo.byte_level_tokenizer()
    model = model_zoo.small_model("llama", vocabulary=len(tokenizer))
    found = trace(model, tokenizer, "{} is", "מ 👩", samples=1)
    start, end = found.subject
    assert found.tokens[start:end] == ("…", "מ", " ", "…", "…", "…", "👩")
    assert "".join(found.tokens).replace("…", "") == "מ 👩 is"

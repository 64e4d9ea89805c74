"""The values that the incremental optimiser finds are those of a plain loop over whole texts."""

import copy
import dataclasses
import itertools
import math

import pytest

pytest.importorskip("transformers")

import model_zoo
import torch
from editing_helpers import changed, small_editor, weights

from engram_kernels.editing import Edit
from engram_kernels.editing import run as run_module
from engram_kernels.editing.reach import reached
from engram_kernels.editing.search import losses as losses_module
from engram_kernels.editing.search import values as values_module
from engram_kernels.editing.search.batching import EditBatch, EncodedEdit, encode_edit
from engram_kernels.editing.search.partial_forward import record
from engram_kernels.editing.search.room import bytes_of, edits_that_fit
from engram_kernels.editing.search.values import ValueOptions, find_values, value_groups
from engram_kernels.errors import EngramError
from engram_kernels.hf.layers import decoder_layers
from engram_kernels.hf.projection import output_projection
from engram_kernels.hf.tokens import Row

EDITS = [
    Edit("The Eiffel Tower", "{} is located in the city of", "Rome"),
    Edit("Colosseum", "the Colosseum is located in the city of", "Paris"),
    Edit("Zürich", "I know that {} lies in", "Brazil and Japan"),
]
PREFIXES = ["The towers are here", "Therefore I think that you know", "maps"]
OPTIONS = ValueOptions(steps=12, learning_rate=0.05, stop_loss=0.0, weight_decay=0.01)


@pytest.fixture(scope="module")
def tokenizer():
    return model_zoo.byte_level_tokenizer()


def texts_of(model, tokenizer, edits=EDITS):
    return [encode_edit(model, tokenizer, edit, PREFIXES) for edit in edits]


def plain_loop(model, projection, text, options):
    """One edit at a time, every text whole and by itself, every layer, every logit: as upstream does."""
    delta = torch.zeros(projection.matrix.shape[0], requires_grad=True)
    subject, start, losses, unedited, rest = [0], None, [], None, []

    def add(_module, _inputs, output):
        nonlocal start
        shape = output.shape
        output = output.reshape(-1, shape[-1]).clone()
        if start is None:
            start = output[subject[0]].detach().clone()
        output[subject[0]] = output[subject[0]] + delta
        return output.view(shape)

    optimizer = torch.optim.Adam([delta], lr=options.learning_rate)
    hook = projection.module.register_forward_hook(add)
    for step in range(options.steps):
        nll, after, ends = 0.0, 0.0, 0.0
        for place, row in enumerate(text.rewriting):
            subject[0] = row.subject
            predictions = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
            chosen = [predictions[i - 1, row.ids[i]] for i in range(row.target, len(row.ids))]
            nll = nll - torch.stack(chosen).mean() / len(text.rewriting)
            follows = predictions[-1]
            if row.going is not None and options.end_weight:
                # Given that the word ends.
                others = torch.ones(len(follows), dtype=torch.bool).index_fill(0, row.going, False)
                follows = follows[others].log_softmax(-1)
            rest += [follows.detach()] if step == 0 else []
            after = after + (follows.exp() * (follows - rest[place])).sum() / len(text.rewriting)
            if row.going is not None:
                ends = ends - torch.log1p(-predictions[-1].exp()[row.going].sum()) / len(text.rewriting)
        subject[0] = text.kl_prompt.subject
        answer = model(torch.tensor([text.kl_prompt.ids])).logits[0, -1].log_softmax(-1)
        unedited = answer.detach() if unedited is None else unedited
        kl = (answer.exp() * (answer - unedited)).sum()
        loss = nll + options.kl_weight * kl + options.weight_decay * delta.norm() / start.norm() ** 2
        loss = loss + options.after_weight * after + options.end_weight * ends
        if loss < min(losses, default=math.inf):
            best = delta.detach().clone()
        losses.append(loss.item())
        if loss < options.stop_loss or step == options.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta *= min(1.0, options.clamp * start.norm() / delta.norm())
    hook.remove()
    return best, losses


@pytest.mark.parametrize(("after_weight", "end_weight"), [(0.0, 0.0), (0.25, 0.0), (0.25, 0.5)])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", [*model_zoo.FAMILIES, "granite", "bloom", "falcon", "gemma2", "gptj"])
def test_incremental_values_are_the_plain_loops(family, layer, after_weight, end_weight, tokenizer):
    model = model_zoo.small_model(family)
    projection = output_projection(model, layer)
    texts = texts_of(model, tokenizer)
    options = dataclasses.replace(OPTIONS, after_weight=after_weight, end_weight=end_weight)
    found = find_values(model, projection, texts, options)
    for text, value in zip(texts, found, strict=True):
        delta, losses = plain_loop(model, projection, text, options)
        torch.testing.assert_close(torch.tensor(value.losses), torch.tensor(losses), rtol=1e-4, atol=1e-5)
        assert (value.change - delta).norm() <= 1e-4 * delta.norm()
        # Whether a random model can be brought to say it or not, the value moves and counts.
        assert max(losses) - min(losses) > 1e-4
        assert delta.norm() > 0.01 or losses.index(min(losses)) == 0


def tokens_through_layers(model, incremental, layer, texts):
    """`[steps][layers]`: how many tokens went through each decoder layer's MLP up to the end of each step."""
    layers = decoder_layers(model)[1]
    seen, steps = [0] * len(layers), []

    def count(number):
        def hook(_module, arguments):
            seen[number] += arguments[0].shape[:-1].numel()

        return hook

    # Whatever stands in for a layer, its MLP is asked only where the layer truly runs.
    hooks = [one.mlp.register_forward_pre_hook(count(number)) for number, one in enumerate(layers)]
    options = dataclasses.replace(OPTIONS, incremental=incremental)
    projection = output_projection(model, layer)
    find_values(model, projection, texts, options, lambda *_: steps.append(list(seen)))
    for hook in hooks:
        hook.remove()
    return steps


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bloom"])
def test_a_step_runs_no_layer_below_the_edited_one(family, tokenizer):
    """Nor a token before the subject's last one, and no whole text; the whole loop does all of it."""
    model = model_zoo.small_model(family)
    texts = texts_of(model, tokenizer)
    rows = [row for text in texts for row in (*text.rewriting, text.kl_prompt)]
    steps = tokens_through_layers(model, True, 2, texts)
    assert len(steps) == OPTIONS.steps
    from_subjects = len(rows) * max(len(row.inputs) - row.subject for row in rows)
    for before, after in itertools.pairwise(steps):
        assert [b - a for a, b in zip(before, after, strict=True)] == [0, 0, from_subjects, from_subjects]
    # Once before the steps: the prefixes, what else stands before the subjects, the tokens from there on, and
    # two texts against which the recorded states are held.
    whole = len(rows) * max(len(row.inputs) for row in rows)
    assert steps[0][0] < 2 * whole and steps[0][2] < 2 * whole + from_subjects

    steps = tokens_through_layers(model, False, 2, texts)
    for before, after in itertools.pairwise(steps):
        assert [b - a for a, b in zip(before, after, strict=True)] == [whole] * 4


@pytest.mark.parametrize("incremental", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_together_is_one_by_one(family, incremental, tokenizer):
    """Also when the edits end at different steps and leave the batch, and with words that shall end."""
    model = model_zoo.small_model(family)
    projection = output_projection(model, 1)
    texts = texts_of(model, tokenizer, [EDITS[0], Edit("Zürich", "{} lies in", "東京"), EDITS[2]])
    options = dataclasses.replace(OPTIONS, incremental=incremental, steps=15, end_weight=0.5)
    start = [find_values(model, projection, [text], options)[0].losses for text in texts]
    # Between two losses: a rounding does not decide where the second edit ends.
    losses = sorted(start, key=lambda losses: losses[8])[1]
    options = dataclasses.replace(options, stop_loss=(losses[7] + losses[8]) / 2)
    alone = [find_values(model, projection, [text], options)[0] for text in texts]
    together = find_values(model, projection, texts, options)
    assert len({len(value.losses) for value in alone}) > 1
    for one, other in zip(alone, together, strict=True):
        assert len(one.losses) == len(other.losses)
        torch.testing.assert_close(torch.tensor(one.losses), torch.tensor(other.losses), rtol=1e-4, atol=1e-5)
        assert (one.change - other.change).norm() <= 1e-4 * one.change.norm()
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-4, atol=1e-5)


def test_keys_are_the_projections_inputs(tokenizer):
    model = model_zoo.small_model("opt")
    projection = output_projection(model, 1)
    (text,) = texts_of(model, tokenizer, EDITS[2:])
    (value,) = find_values(model, projection, [text], OPTIONS)
    keys = []
    hook = projection.module.register_forward_pre_hook(lambda _module, inputs: keys.append(inputs[0]))
    with torch.no_grad():
        for row in text.rewriting:
            model(torch.tensor([row.ids]))
    hook.remove()
    keys = torch.stack(
        [key.reshape(-1, key.shape[-1])[row.subject] for key, row in zip(keys, text.rewriting, strict=True)]
    )
    torch.testing.assert_close(value.keys, keys, rtol=1e-4, atol=1e-5)
    assert value.initial_norm == pytest.approx(projection.module(keys[0]).norm().item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_precision(family, dtype, tokenizer):
    """As far as the type goes: the incremental loop is as near to float32 as the whole one."""
    model = model_zoo.small_model(family)
    projection = output_projection(model, 1)
    options = dataclasses.replace(OPTIONS, steps=5, widen=False)
    texts = texts_of(model, tokenizer)
    exact = find_values(model, projection, texts, options)
    half = copy.deepcopy(model).to(dtype)
    projection = output_projection(half, 1)
    error = {}
    for incremental in (True, False):
        options = dataclasses.replace(options, incremental=incremental)
        found = find_values(half, projection, texts, options)
        assert all(value.change.dtype == value.keys.dtype == torch.float32 for value in found)
        error[incremental] = sum(
            (torch.tensor(a.losses) - torch.tensor(b.losses)).abs().sum().item()
            for a, b in zip(found, exact, strict=True)
        )
    assert error[True] <= 2 * error[False] + 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widened_weights_are_those_of_a_float32_model_and_come_back(dtype, tokenizer, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    half = model_zoo.small_model(dtype=dtype)
    wide = copy.deepcopy(half).float()
    before = {name: (p.data_ptr(), p._version, p.clone()) for name, p in half.named_parameters()}
    texts = texts_of(half, tokenizer)
    found = find_values(half, output_projection(half, 1), texts, OPTIONS)
    expected = find_values(wide, output_projection(wide, 1), texts, OPTIONS)
    assert all(torch.equal(a.change, b.change) for a, b in zip(found, expected, strict=True))
    for name, parameter in half.named_parameters():
        pointer, version, value = before[name]
        assert (parameter.data_ptr(), parameter._version) == (pointer, version)
        assert parameter.dtype == dtype and torch.equal(parameter, value)


def test_a_model_that_the_stubs_do_not_fit_is_run_whole(tokenizer):
    """A layer that looks at all tokens at once: recorded states give other predictions, which is seen."""
    model = model_zoo.small_model("llama")
    texts = texts_of(model, tokenizer)
    projection = output_projection(model, 1)

    def centre(_module, _inputs, output):
        return output - 0.5 * output.mean(1, keepdim=True)

    hook = model.model.layers[3].mlp.register_forward_hook(centre)
    with pytest.warns(UserWarning, match="predicts otherwise from recorded states"):
        found = find_values(model, projection, texts, OPTIONS)
    whole = find_values(model, projection, texts, dataclasses.replace(OPTIONS, incremental=False))
    hook.remove()
    assert all(torch.equal(a.change, b.change) for a, b in zip(found, whole, strict=True))


def test_a_model_without_keys_and_values_is_run_whole(tokenizer, monkeypatch):
    """As one with convolutions or a state: it asks the cache for what it has not, or leaves it empty."""
    model = model_zoo.small_model("llama")
    texts, projection = texts_of(model, tokenizer), output_projection(model, 1)
    options = dataclasses.replace(OPTIONS, incremental=False)
    whole = find_values(model, projection, texts, options)
    plain = model.forward

    def broken(*arguments, use_cache=False, **keywords):
        if use_cache:
            raise IndexError("list index out of range")
        return plain(*arguments, use_cache=False, **keywords)

    def empty(*arguments, use_cache=False, **keywords):
        for name in ("cache", "past_key_values"):
            keywords.pop(name, None)
        return plain(*arguments, use_cache=False, **keywords)

    for forward_without_cache in (broken, empty):
        monkeypatch.setattr(model, "forward", forward_without_cache)
        with pytest.warns(UserWarning, match="LlamaForCausalLM cannot start from recorded states"):
            found = find_values(model, projection, texts, OPTIONS)
        assert all(torch.equal(a.change, b.change) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_makes_no_difference(tokenizer, dtype):
    model = model_zoo.small_model("llama")
    texts, projection = texts_of(model, tokenizer), output_projection(model, 1)
    expected = find_values(model, projection, texts, OPTIONS)
    bare, names = [text.rewriting[0] for text in texts], [text.edit.text for text in texts]
    before = reached(model, bare, names)
    torch.set_default_dtype(dtype)
    try:
        found = find_values(model, projection, texts, OPTIONS)
        assert reached(model, bare, names) == before
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a.change, b.change) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("after_weight", [0.0, 1.0])
def test_one_edit_without_a_finite_loss_does_not_touch_the_others(tokenizer, monkeypatch, after_weight):
    model = model_zoo.small_model("llama")
    projection = output_projection(model, 1)
    texts = texts_of(model, tokenizer)
    options = dataclasses.replace(OPTIONS, after_weight=after_weight)
    expected = find_values(model, projection, texts, options)
    losses = losses_module.Losses.of

    def spoilt(self, delta, chosen):
        loss, *others = losses(self, delta, chosen)
        at = [i for i, row in enumerate(chosen) if self.batch.owner[row] == 1]
        return loss.index_fill(0, torch.tensor(at, dtype=torch.long), float("nan")), *others

    monkeypatch.setattr(losses_module.Losses, "of", spoilt)
    found = find_values(model, projection, texts, options)
    assert isinstance(found[1], EngramError) and "the Colosseum is located" in str(found[1])
    for i in (0, 2):
        assert (found[i].change - expected[i].change).norm() <= 1e-4 * expected[i].change.norm()


def test_groups_hold_texts_of_like_length(tokenizer):
    model = model_zoo.small_model()
    texts = texts_of(model, tokenizer)
    device = torch.device("cpu")
    groups = value_groups(texts, dataclasses.replace(OPTIONS, batch=2), device)
    assert sorted(i for group in groups for i in group) == [0, 1, 2]
    assert [len(group) for group in groups] == [2, 1]
    spans = [texts[i].span for group in groups for i in group]
    assert spans == sorted(spans)


def test_batch_reads_every_target_token_once(tokenizer):
    model = model_zoo.small_model()
    texts = texts_of(model, tokenizer)
    batch = EditBatch(texts, torch.device("cpu"))
    labels = batch.labels.tolist()
    for (row, position), label in zip(places_of(batch)[: len(labels)], labels, strict=True):
        assert batch.rows[row].ids[position + 1] == label
    for number, text in enumerate(texts):
        mine = batch.owner[batch.target_rows] == number
        assert batch.shares[mine].sum().item() == pytest.approx(1.0)
        assert int(mine.sum()) == sum(len(row.ids) - row.target for row in text.rewriting)
        assert batch.rows[batch.bare[number]].ids == text.rewriting[0].ids


def places_of(batch: EditBatch) -> list[tuple[int, int]]:
    """Row and position of everything that is read."""
    places = list(zip(batch.place_rows.tolist(), batch.place_positions.tolist(), strict=True))
    assert len(set(places)) == len(places)
    return [places[number] for number in batch.places.tolist()]


def test_what_follows_the_target_is_read_where_it_shall_stay(tokenizer):
    texts = texts_of(model_zoo.small_model(), tokenizer)
    batch = EditBatch(texts, torch.device("cpu"), kl_weight=0.5, after_weight=2.0)
    kept = places_of(batch)[len(batch.labels) :]
    # Of every row the last token that is read: that of its target, or of the KL prompt.
    assert kept == [(number, len(row.ids) - 1) for number, row in enumerate(batch.rows)]
    assert batch.inputs == [row.ids for row in batch.rows]
    for number in range(len(texts)):
        assert batch.kept_shares[batch.owner[batch.kept_rows] == number].sum().item() == pytest.approx(2.5)
    assert EditBatch(texts, torch.device("cpu")).inputs == [row.inputs for row in batch.rows]


def test_words_shall_end_where_a_script_has_spaces(tokenizer):
    """Only there, and beside what shall stay; the search does not end before they do."""
    model, cpu = model_zoo.small_model(), torch.device("cpu")
    facts = [EDITS[0], Edit("Zürich", "{} lies in", "東京"), EDITS[2]]
    texts = texts_of(model, tokenizer, facts)
    batch = EditBatch(texts, cpu, 0.5, 2.0, end_weight=0.25)
    places = places_of(batch)
    ends, kept = places[len(batch.labels) :][: len(batch.end_rows)], places[-len(batch.kept_rows) :]
    # The end of a word and what follows it are one prediction.
    assert set(ends) < set(kept) and len(batch.place_rows) == len(batch.labels) + len(kept)
    rows = [i for i, row in enumerate(batch.rows) if batch.owner[i] != 1 and row.target < len(row.ids)]
    assert ends == [(i, len(batch.rows[i].ids) - 1) for i in rows] and batch.end_rows.tolist() == rows
    assert batch.owner[batch.end_rows].tolist() == [0] * 4 + [2] * 4
    assert batch.end_shares.tolist() == pytest.approx([0.25 / 4] * 8)
    # Whatever a random model says is more than one token in three that goes on: no text's word ends by 0.9.
    projection = output_projection(model, 1)
    options = dataclasses.replace(OPTIONS, steps=3, learning_rate=1e-6, stop_probability=1e-4)
    (short,) = find_values(model, projection, texts[:1], options)
    (whole,) = find_values(
        model, projection, texts[:1], dataclasses.replace(options, stop_probability=0.9, end_weight=0.25)
    )
    assert len(short.losses) == 1 and len(whole.losses) == 3
    assert whole.losses[0] > short.losses[0]


def test_less_is_asked_of_a_prompt_that_lacks_a_word(tokenizer):
    model = model_zoo.small_model()
    (text,) = texts_of(model, tokenizer, EDITS[:1])
    given = dataclasses.replace(text, rewriting=text.bare, texts=(1,))
    shorter = dataclasses.replace(given, rewriting=[dataclasses.replace(text.bare[0], shorter=True)])
    options = dataclasses.replace(OPTIONS, steps=3, learning_rate=1e-6)

    def steps(encoded: EncodedEdit, wanted: float) -> int:
        asked = dataclasses.replace(options, stop_probability=wanted)
        (value,) = find_values(model, output_projection(model, 1), [encoded], asked)
        return len(value.losses)

    (value,) = find_values(model, output_projection(model, 1), [given], options)
    before = math.exp(-value.losses[0])
    assert [steps(given, share * before) for share in (0.9, 1.1)] == [1, 3]
    assert [steps(shorter, share * before) for share in (1.1, 1.7, 1.9)] == [1, 1, 3]


def test_words_need_not_end_where_they_may_have_suffixes(tokenizer):
    model, cpu = model_zoo.small_model(), torch.device("cpu")
    edits = [EDITS[0], dataclasses.replace(EDITS[0], suffixes=True)]
    plain, allowed = texts_of(model, tokenizer, edits)
    assert allowed.rewriting == plain.rewriting
    batch = EditBatch([plain, allowed], cpu, end_weight=0.25)
    assert batch.owner[batch.end_rows].tolist() == [0] * 4
    # Nor does `reached` ask for it.
    assert all(row.going is not None for row in plain.rewriting)
    assert all(row.going is None for row in allowed.rewriting)


def test_a_target_counts_as_missed_by_the_end_of_its_word_too(tokenizer):
    """Or an edit would end at "SegaMX" whose own prompt gives "Sega" nine of ten."""
    model, cpu = model_zoo.small_model(), torch.device("cpu")
    projection = output_projection(model, 1)
    texts = texts_of(model, tokenizer, EDITS[:1])
    batch = EditBatch(texts, cpu, end_weight=0.25)
    rows = list(range(len(batch.rows)))
    losses = losses_module.Losses(model, projection, batch, record(model, projection, batch, True).context)
    nothing = torch.zeros(len(rows), projection.matrix.shape[0])
    *_, target = losses.of(nothing, rows)
    assert target[-1] == 0  # of the KL prompt
    for found, row in zip(target[:-1], texts[0].rows, strict=True):
        with torch.no_grad():
            logs = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        own = -sum(logs[at - 1, row.ids[at]].item() for at in range(row.target, len(row.ids)))
        ends = 1 - logs[-1, row.going].exp().sum().item()
        assert ends < 0.9 and found.item() == pytest.approx(own - math.log(ends), rel=1e-4)


def test_an_edit_that_is_missed_goes_on_for_longer_and_farther(tokenizer, monkeypatch):
    """And one that is not missed ends as it did."""
    model = model_zoo.small_model()
    projection = output_projection(model, 1)
    texts = texts_of(model, tokenizer)
    options = dataclasses.replace(OPTIONS, steps=5, clamp=0.5)
    seen = []
    longer = dataclasses.replace(options, extensions=2)
    plain = find_values(model, projection, texts, options)
    found = find_values(model, projection, texts, longer, lambda *now: seen.append(now[1:]))
    for one, other in zip(plain, found, strict=True):
        assert len(one.losses) == 5 and len(other.losses) == 15
        assert other.losses[:5] == pytest.approx(one.losses, rel=1e-4)
        assert one.change.norm() <= 0.501 * one.initial_norm
        assert 0.5 * other.initial_norm < other.change.norm() <= 2.001 * other.initial_norm
    assert seen[-1] == (45, 45) and seen == sorted(seen)
    # By the whole target after the prompt itself: just below the bound it has been reached, just above not.
    assert values_module.MISSED == math.log(2)
    text = next(one for one in texts if len(one.bare[0].ids) - one.bare[0].target > 1)
    (row,) = text.bare
    text = dataclasses.replace(text, rewriting=[row], texts=(1,))
    options = dataclasses.replace(options, weight_decay=0.0, kl_weight=0.0)
    (value,) = find_values(model, projection, [text], options)
    missed = value.losses[-1] * (len(row.ids) - row.target)
    for bound, count in ((missed + 1e-3, 5), (missed - 1e-3, 10)):
        monkeypatch.setattr(values_module, "MISSED", bound)
        (value,) = find_values(model, projection, [text], dataclasses.replace(options, extensions=1))
        assert len(value.losses) == count


def test_reached_is_the_targets_probability_and_whether_it_is_said(tokenizer):
    model = model_zoo.small_model("gpt2")
    rows = [text.rewriting[0] for text in texts_of(model, tokenizer)]
    with torch.no_grad():
        predictions = [model(torch.tensor([row.ids])).logits[0].log_softmax(-1) for row in rows]
        # What the model itself says next, three tokens long.
        said = model.generate(torch.tensor([rows[0].ids]), max_new_tokens=3, do_sample=False)[0].tolist()
    expected = [
        sum(one[i - 1, row.ids[i]].item() for i in range(row.target, len(row.ids)))
        for row, one in zip(rows, predictions, strict=True)
    ]
    rows.append(Row(said, rows[0].subject, len(rows[0].ids)))
    # Followed by what goes on with a word, where that is known: a random model's next token, or another.
    with torch.no_grad():
        follows = model(torch.tensor([said])).logits[0, -1].argmax()
    rows += [dataclasses.replace(rows[3], going=going) for going in (follows[None], follows[None] + 1)]
    found = reached(model, rows, ["a"] * 6, at_once=2)
    assert [one.log_probability for one in found[:3]] == pytest.approx(expected, abs=1e-4)
    assert [one.said for one in found] == [False, False, False, True, False, True]


def test_gradients_flags_and_hooks_are_as_before(tokenizer):
    model = model_zoo.small_model()
    model.lm_head.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    forwards = [module.__dict__.get("forward") for module in model.modules()]

    def stop(*_progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_values(model, output_projection(model, 2), texts_of(model, tokenizer), OPTIONS, stop)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_search_that_runs_out_of_memory_goes_on_in_halves(cache, monkeypatch):
    """As with groups that are asked to be so small."""
    edits = [
        Edit(subject, "{} is located in the city of", target)
        for subject, target in (("Rome", "Paris"), ("Zürich", "Rome"), ("Tower", "Rome"), ("Louvre", "Rome"))
    ]
    sizes, search = [], run_module.find_values

    def cramped(model, projection, encoded, *arguments):
        sizes.append(len(encoded))
        if len(encoded) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return search(model, projection, encoded, *arguments)

    options = ValueOptions(steps=3, learning_rate=0.02, weight_decay=0.0, batch=4)
    monkeypatch.setattr(run_module, "find_values", cramped)
    editor = small_editor(value=options, cache_dir=cache, ridge=0.01)
    with editor.edit(edits, layers=1, method="emmet", ridge=0.1) as found:
        pass
    assert sizes == [4, 2, 2]
    monkeypatch.undo()
    editor = small_editor(value=dataclasses.replace(options, batch=2), cache_dir=cache, ridge=0.01)
    with editor.edit(edits, layers=1, method="emmet", ridge=0.1) as expected:
        pass
    assert [record.losses for record in found.records] == [record.losses for record in expected.records]


def test_one_value_that_does_not_fit_is_an_error(cache, monkeypatch):
    def cramped(*_arguments):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(run_module, "find_values", cramped)
    editor = small_editor(cache_dir=cache)
    before = weights(editor.model)
    with pytest.raises(RuntimeError, match="not enough memory"):
        editor.edit([Edit("Rome", "{} is in", "Paris"), Edit("Zürich", "{} is in", "Rome")], method="emmet")
    assert changed(before, editor.model) == []


def test_groups_are_as_large_as_the_free_memory(monkeypatch):
    """By arithmetic: there is no GPU here."""
    model = model_zoo.small_model("llama")
    projection = output_projection(model, 1)
    edit = Edit("Rome", "{} is located in the city of", "Paris")
    encoded = [encode_edit(model, model_zoo.byte_level_tokenizer(), edit, ["A text"])] * 9
    each = bytes_of(model, projection, encoded[0])
    tokens = (len(encoded[0].rows) + 1) * encoded[0].span[0]
    assert each > tokens * 3 * (10 * 32 + 4 * 64) * 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (8 * each, 80 * each))
    device = torch.device("cuda")
    fitting = edits_that_fit(model, projection, encoded, device)
    assert fitting == 4 and edits_that_fit(model, projection, encoded, torch.device("cpu")) is None
    assert [len(group) for group in value_groups(encoded, ValueOptions(), device, fitting)] == [3, 3, 3]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1, 80 * each))
    assert edits_that_fit(model, projection, encoded, device) == 1

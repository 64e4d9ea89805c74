"""Finding the weights that carry a skill, on small random models."""

import copy
import dataclasses
import gc

import model_zoo
import pytest
import torch
from defaults import DEFAULTS
from editing_helpers import changed, weights
from grafting_helpers import language_batches, tuned

from engram_kernels import EngramError
from engram_kernels.grafting import RECIPES, classification_score, graftable_parameters, localize


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_localize_leaves_the_models_as_they_were(family, dtype):
    model = model_zoo.small_model(family, dtype=dtype)
    other = tuned(model)
    model.requires_grad_(False)
    first = next(model.parameters())
    first.requires_grad_(True)
    first.grad = torch.ones_like(first)
    before, after = weights(model), weights(other)
    graft = localize(model, other, language_batches(), sparsity=0.01, steps=5)
    assert not changed(before, model)
    assert not changed(after, other)
    assert [p.requires_grad for p in model.parameters()].count(True) == 1
    assert first.grad.eq(1).all() and not any(p._post_accumulate_grad_hooks for p in model.parameters())
    total = sum(p.numel() for p in graftable_parameters(model).values())
    assert graft.size == round(0.01 * total)
    for name, at in graft.indices.items():
        assert at.dtype == torch.int32 and (at[1:] > at[:-1]).all()
        assert torch.equal(graft.values[name], other.get_parameter(name).detach().reshape(-1)[at.long()])


def test_localize_leaves_the_callers_batches():
    from transformers import BatchEncoding

    model = model_zoo.small_model()
    batches = [BatchEncoding(batch) for batch in language_batches()]
    # Moving a BatchEncoding gives it another mapping, be it to where its tensors are.
    before = [batch.data for batch in batches]
    localize(model, tuned(model), batches, sparsity=0.01, steps=5)
    assert all(batch.data is data for batch, data in zip(batches, before, strict=True))


@pytest.mark.parametrize("recipe", ["rounds", "panigrahi", "localize-and-stitch"])
@pytest.mark.parametrize("default", DEFAULTS)
def test_localize_does_not_depend_on_defaults(recipe, default):
    model = model_zoo.small_model()
    other, batches = tuned(model), language_batches()
    chosen = {"sparsity": 0.01, "recipe": recipe, "steps": 5}
    expected = localize(model, other, batches, **chosen)
    with DEFAULTS[default]():
        found = localize(model, other, batches, **chosen)
    assert found.indices.keys() == expected.indices.keys()
    for name, at in expected.indices.items():
        assert torch.equal(found.indices[name], at) and torch.equal(found.values[name], expected.values[name])


def reference_rounds(model, other, batches, size, steps, rounds):
    """The default recipe with dense masks and functional_call: at the end of a round, the k best scores."""
    names = list(graftable_parameters(model))
    pre = {name: model.get_parameter(name).detach() for name in names}
    change = {name: other.get_parameter(name).detach() - pre[name] for name in names}
    score = {name: torch.zeros_like(pre[name]) for name in names}
    mask = {name: torch.zeros_like(pre[name]) for name in names}
    slope = torch.sigmoid(torch.tensor(-10.0)) * torch.sigmoid(torch.tensor(10.0))
    for step in range(steps):
        theta = {name: (pre[name] + mask[name] * change[name]).requires_grad_() for name in names}
        loss = torch.func.functional_call(model, theta, kwargs=batches[step % len(batches)]).loss
        grads = torch.autograd.grad(loss, list(theta.values()))
        for name, gradient in zip(names, grads, strict=True):
            score[name] -= slope * gradient * change[name]
        if (step + 1) % (steps // rounds) == 0:
            mask = top(score, size)
    return mask


def top(scores, size):
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    mask = torch.zeros_like(flat)
    mask[flat.topk(size).indices] = 1
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def test_rounds_are_the_best_first_order_scores():
    model = model_zoo.small_model()
    other, batches = tuned(model), language_batches(3)
    steps = 2 * RECIPES["rounds"].rounds
    graft = localize(model, other, batches, sparsity=0.005, steps=steps, recipe="rounds")
    expected = reference_rounds(model, other, batches, graft.size, steps, RECIPES["rounds"].rounds)
    shared = sum(int(expected[name].reshape(-1)[at.long()].sum()) for name, at in graft.indices.items())
    # Gates are open or closed to 5e-5 only, so that a few scores near the threshold change places.
    assert shared >= 0.97 * graft.size


@pytest.mark.parametrize(("recipe", "lr"), [("panigrahi", 1e7), ("localize-and-stitch", 3e4)])
def test_sources_recipes_learn(recipe, lr):
    model = model_zoo.small_model()
    batches = language_batches(1)
    other = copy.deepcopy(model)
    optimizer = torch.optim.Adam(other.parameters(), 3e-3)
    for _ in range(30):
        loss = other(**batches[0]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    graft = localize(
        model,
        other,
        batches,
        sparsity=0.02,
        steps=30,
        recipe=recipe,
        lr=lr,
        l1=0.0,
    )
    first, last = graft.metrics["first_loss"], graft.metrics["last_loss"]
    assert last < first - 0.1 and graft.size > 0
    with graft.apply(model), torch.no_grad():
        assert model(**batches[0]).loss < first + 0.05


def test_largest_takes_each_layers_share_of_the_changes():
    """Without a batch; a layer that did not change has none."""
    model = model_zoo.small_model()
    other = tuned(model)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if ".layers.1." in name:
                weight.copy_(model.get_parameter(name))
            if ".layers.2." in name:  # much larger than all others: they would have every place
                weight.copy_(model.get_parameter(name) + 10 * (weight - model.get_parameter(name)))
    graft = localize(model, other, sparsity=0.01, recipe="largest")
    pre = graftable_parameters(model)
    assert graft.size == round(0.01 * sum(weight.numel() for weight in pre.values()))
    assert "first_loss" not in graft.metrics
    by_layer = {}
    for name in pre:
        layer, change = name.split(".")[2], (other.get_parameter(name) - pre[name]).detach().abs().flatten()
        at = graft.indices.get(name, torch.tensor([], dtype=torch.int32)).long()
        mask = torch.zeros(len(change), dtype=torch.bool)
        mask[at] = True
        chosen, left = by_layer.setdefault(layer, ([], []))
        chosen.append(change[mask])
        left.append(change[~mask])
    counts = {layer: sum(map(len, chosen)) for layer, (chosen, _) in by_layer.items()}
    assert counts.pop("1") == 0 and max(counts.values()) - min(counts.values()) <= 1
    for layer in counts:
        chosen, left = map(torch.cat, by_layer[layer])
        assert chosen.min() >= left.max()


def test_rounds_with_shares_have_exactly_the_size():
    model = model_zoo.small_model()
    plan = dataclasses.replace(RECIPES["rounds"], layered=True)
    graft = localize(model, tuned(model), language_batches(), sparsity=0.01, steps=5, recipe=plan)
    counts = {}
    for name, at in graft.indices.items():
        counts[name.split(".")[2]] = counts.get(name.split(".")[2], 0) + at.numel()
    assert len(counts) == 4 and max(counts.values()) - min(counts.values()) <= 1
    assert graft.size == round(0.01 * sum(p.numel() for p in graftable_parameters(model).values()))


def test_accumulated_gradients_are_a_larger_batch():
    model = model_zoo.small_model()
    other, batches = tuned(model), language_batches(4)
    whole = [{key: torch.cat([batches[i][key], batches[i + 1][key]]) for key in batches[0]} for i in (0, 2)]
    one = localize(model, other, whole, sparsity=0.01, steps=5)
    two = localize(model, other, batches, sparsity=0.01, steps=5, accumulate=2)
    assert one.overlap(two).jaccard > 0.99


def test_checkpointing_and_tied_weights():
    import transformers as hf

    torch.manual_seed(0)
    shape = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=400
    )
    model = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**shape, tie_word_embeddings=True))
    other, batches = tuned(model), language_batches()
    plain = localize(model, other, batches, sparsity=0.01, steps=5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    checkpointed = localize(model, other, batches, sparsity=0.01, steps=5)
    assert plain.overlap(checkpointed).jaccard > 0.99
    assert model.training


class Shared(torch.nn.Module):
    """One block run twice: its gradient comes in two parts, and must be used once."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(5, 5)])
        self.reentrant = reentrant

    def forward(self, x):
        if self.reentrant is None:
            return (self.layers[0](self.layers[0](x).tanh()) ** 2).sum()
        run = lambda y: torch.utils.checkpoint.checkpoint(self.layers[0], y, use_reentrant=self.reentrant)  # noqa: E731
        return (run(run(x).tanh()) ** 2).sum()


def test_weights_that_are_used_twice():
    torch.manual_seed(3)
    shared, data = Shared(), [torch.randn(4, 5)]
    other = tuned(shared, scale=0.5)
    graft = localize(shared, other, data, lambda m, x: m(x), sparsity=0.2, steps=1, recipe=one_round())
    gradients = torch.autograd.grad(shared(data[0]), list(shared.parameters()))
    changes = [b.detach() - a.detach() for a, b in zip(shared.parameters(), other.parameters(), strict=True)]
    names = [name for name, _ in shared.named_parameters()]
    scores = dict(zip(names, (-g * c for g, c in zip(gradients, changes, strict=True)), strict=True))
    expected = top(scores, 6)
    assert graft.size == 6
    assert all(expected[name].reshape(-1)[at.long()].all() for name, at in graft.indices.items())
    checkpointed = Shared(reentrant=False)
    checkpointed.load_state_dict(shared.state_dict())
    again = localize(checkpointed, other, data, lambda m, x: m(x), sparsity=0.2, steps=1, recipe=one_round())
    assert graft.overlap(again).jaccard == 1


def one_round():
    return dataclasses.replace(RECIPES["rounds"], rounds=1)


def test_gradients_in_parts_are_refused():
    shared = Shared(reentrant=True)
    before = weights(shared)
    data = [torch.randn(4, 5, requires_grad=True)]
    with pytest.raises(EngramError, match="use checkpointing with use_reentrant=False"):
        localize(shared, tuned(shared), data, lambda m, x: m(x), sparsity=0.2)
    assert not changed(before, shared)
    assert all(p.requires_grad and p.grad is None for p in shared.parameters())


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_gradients_that_are_not_finite_are_refused(recipe):
    model = model_zoo.small_model()
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)
    before, flags = weights(model), [p.requires_grad for p in model.parameters()]
    seen = []

    def loss(m, batch):
        seen.append(1)
        # A finite loss whose gradient is not, after a few good steps.
        bad = torch.where(torch.tensor(len(seen) > 7), float("inf"), 1.0)
        hidden = m.model.layers[1].mlp.down_proj.weight
        return (
            m(**batch).loss
            + (hidden * 0 * bad.detach()).nan_to_num().sum()
            + Scaled.apply(hidden.sum(), bad) * 0
        )

    with pytest.raises(EngramError, match=r"got NaN or infinity in .model\.layers\.1\.mlp\.down_proj"):
        localize(model, tuned(model), language_batches(), loss, steps=9, recipe=recipe)
    assert not changed(before, model)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


class Scaled(torch.autograd.Function):
    """The identity, with a gradient of its own."""

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.gradient = gradient
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return ctx.gradient * 1, None


def test_a_callers_autocast_sees_the_blend():
    model = model_zoo.small_model()
    other, batches = tuned(model), language_batches()

    def inner(m, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return m(**batch).loss

    expected = localize(model, other, batches, inner, sparsity=0.01, steps=10)
    with torch.autocast("cpu", torch.bfloat16):
        got = localize(model, other, batches, sparsity=0.01, steps=10)
    assert got.overlap(expected).jaccard == 1


def test_streams_of_batches():
    model = model_zoo.small_model()
    other, batches = tuned(model), language_batches()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(batches)

    expected = localize(model, other, batches, sparsity=0.01, steps=6)
    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    assert localize(model, other, loader, sparsity=0.01, steps=6).overlap(expected).jaccard == 1
    with pytest.raises(TypeError, match="steps: expected a number, as batches have no length"):
        localize(model, other, loader)
    with pytest.raises(TypeError, match="accumulate: expected a number, as batches have no length"):
        localize(model, other, loader, recipe="panigrahi")
    with torch.no_grad():
        assert localize(model, other, batches, sparsity=0.01, steps=6).overlap(expected).jaccard == 1


def test_weights_without_a_gradient_are_named():
    model = model_zoo.small_model()

    def loss(m, batch):
        return m.model.layers[0](
            m.model.embed_tokens(batch["input_ids"]), position_embeddings=rotary(m, batch)
        ).sum()

    def rotary(m, batch):
        hidden = m.model.embed_tokens(batch["input_ids"])
        return m.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])

    with pytest.warns(
        UserWarning, match=r"no gradient reached 27 of 36 parameters, such as 'model\.layers\.1"
    ):
        localize(model, tuned(model), language_batches(), loss, steps=5, sparsity=0.01)


def test_fine_tuned_weights_come_from_a_mapping_or_from_files(tmp_path):
    model = model_zoo.small_model()
    other, batches = tuned(model), language_batches()
    expected = localize(model, other, batches, sparsity=0.01, steps=5)
    other.save_pretrained(tmp_path / "whole")
    other.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for source in (
        dict(other.named_parameters()),
        tmp_path / "whole",
        str(tmp_path / "shards"),
        tmp_path / "whole" / "model.safetensors",
    ):
        graft = localize(model, source, batches, sparsity=0.01, steps=5)
        assert graft.overlap(expected).jaccard == 1
    with pytest.raises(EngramError, match=r"ft_model: expected safetensors at .*none that can be read"):
        localize(model, tmp_path, batches)


BAD = {
    "sparsity": (ValueError, "sparsity: expected a finite number of at least 0", dict(sparsity=-0.1)),
    "sparsity above 1": (ValueError, "sparsity: expected at most 1, got 2", dict(sparsity=2)),
    "sparsity of nothing": (
        ValueError,
        "sparsity: expected one weight or more, got 1e-09",
        dict(sparsity=1e-9),
    ),
    "vector": (
        ValueError,
        r"loss_fn: expected a scalar tensor, got shape \[3\]",
        dict(loss_fn=lambda m, b: torch.ones(3)),
    ),
    "no graph": (
        EngramError,
        "loss_fn: expected a loss that depends",
        dict(loss_fn=lambda m, b: torch.ones(())),
    ),
    "recipe": (ValueError, "recipe: expected one of rounds, largest, panigrahi", dict(recipe="best")),
    "steps": (ValueError, "steps: expected at least 5, got 1", dict(steps=1)),
    "accumulate": (ValueError, "accumulate: expected at least 1, got 0", dict(accumulate=0)),
    "seed": (TypeError, "seed: expected an integer, got str", dict(seed="0")),
    "no batches": (EngramError, "batches: expected at least one", dict(batches=[])),
    "no labels": (
        ValueError,
        "batches: expected labels",
        dict(batches=[{"input_ids": torch.ones(1, 3).long()}]),
    ),
    "not mappings": (TypeError, "batches: expected mappings", dict(batches=[3])),
    "nan": (
        EngramError,
        "loss_fn: expected a finite loss, got nan",
        dict(loss_fn=lambda m, b: m(**b).loss * float("nan")),
    ),
    "no loss": (
        TypeError,
        "loss_fn: expected a scalar tensor, got NoneType",
        dict(loss_fn=lambda m, b: None),
    ),
    "constant": (
        EngramError,
        "loss_fn: expected a loss that depends",
        dict(loss_fn=lambda m, b: m.lm_head.weight.new_ones((), requires_grad=True) * 1),
    ),
    "ft": (TypeError, "ft_model: expected a model, a mapping or a path, got int", dict(ft_model=3)),
    "ft tensors": (EngramError, "ft_model: expected a tensor 'model.layers.0", dict(ft_model={})),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_the_model(case):
    kind, message, change = BAD[case]
    model = model_zoo.small_model()
    before = weights(model)
    arguments = dict(pre_model=model, ft_model=tuned(model), batches=language_batches(), steps=5)
    with pytest.raises(kind, match=message):
        localize(**{**arguments, **change})
    assert not changed(before, model)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_interrupted_start_is_undone(monkeypatch):
    model = model_zoo.small_model()
    model.requires_grad_(False)
    before, count = weights(model), []
    register = torch.nn.Parameter.register_post_accumulate_grad_hook

    def interrupted(self, hook):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        return register(self, hook)

    monkeypatch.setattr(torch.nn.Parameter, "register_post_accumulate_grad_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        localize(model, tuned(model), language_batches(), steps=5)
    assert not changed(before, model)
    assert not any(p.requires_grad or p._post_accumulate_grad_hooks for p in model.parameters())


def test_other_architecture_is_refused():
    model = model_zoo.small_model()
    other = {name: p.detach().double() for name, p in model.named_parameters()}
    with pytest.raises(EngramError, match=r"ft_model: expected torch\.float32 in"):
        localize(model, other, language_batches())
    other = {name: p.detach()[:1] for name, p in model.named_parameters()}
    with pytest.raises(EngramError, match="ft_model: expected shape"):
        localize(model, other, language_batches())


def test_classification_head_needs_no_loss_function():
    import transformers as hf

    torch.manual_seed(0)
    shape = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=400
    )
    model = hf.AutoModelForSequenceClassification.from_config(hf.BertConfig(**shape, num_labels=3)).eval()
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(400, (6, 9), generator=generator),
        "labels": torch.randint(3, (6,), generator=generator),
    }
    other = tuned(model)
    before = weights(model)
    graft = localize(model, other, [batch], sparsity=0.01, steps=5)
    assert graft.size > 0 and all("encoder.layer" in name for name in graft.shapes)
    assert not changed(before, model)
    assert classification_score(model, [batch]).rows == 6


def test_nothing_is_kept_after_localize():
    """θ and the logits are freed: the model's parameters are its own again, without hooks that hold them."""
    model = model_zoo.small_model()
    other = tuned(model)
    localize(model, other, language_batches(), sparsity=0.01, steps=5)
    gc.collect()
    owned = {p.data_ptr() for m in (model, other) for p in m.parameters()}
    extra = [
        x
        for x in gc.get_objects()
        # Those of other tests' compiled graphs have no memory.
        if type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.shape == (64, 32)
        and x.data_ptr() not in owned
        and x.is_floating_point()
    ]
    assert not extra


def test_base_is_named_without_its_folder(tmp_path):
    model = model_zoo.small_model()
    model.config._name_or_path = str(tmp_path)
    arguments = (model, tuned(model), language_batches())
    assert localize(*arguments, sparsity=0.01, steps=5).base_model == tmp_path.name
    assert localize(*arguments, sparsity=0.01, steps=5, base_model="me/base").base_model == "me/base"


def test_progress_is_told_after_every_step():
    model, told = model_zoo.small_model(), []
    localize(
        model,
        tuned(model),
        language_batches(),
        sparsity=0.01,
        steps=5,
        progress=lambda *now: told.append(now),
    )
    assert told == [("localize", done, 5) for done in range(1, 6)]

"""The grafting system on small random models: localise, apply, undo, join, save."""

import copy
import dataclasses
import gc
import json

import model_zoo
import pytest
import torch
from defaults import DEFAULTS

import engram_kernels as ek
from engram_kernels import EngramError
from engram_kernels.grafting import (
    RECIPES,
    Graft,
    GraftMask,
    GraftSwitch,
    PromptTask,
    Recipe,
    calibration_error,
    evaluate,
    graftable_parameters,
    localize,
)


def tuned(model, seed=1, scale=0.05):
    """A copy of a model with every weight changed a little."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return other


def language_batches(count=2, rows=3, length=12):
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(400, (rows, length), generator=generator) for _ in range(count)]
    return [{"input_ids": x, "labels": x} for x in ids]


def bits(model):
    return {name: tensor.clone().view(torch.uint8) for name, tensor in model.state_dict().items()}


def assert_same(model, before):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name]), name


def some_graft(model, seed=1, count=50, **attributes):
    names = list(graftable_parameters(model))
    pre = {name: model.get_parameter(name).detach() for name in names}
    ft = {name: tuned(model, seed).get_parameter(name).detach() for name in names}
    masks = ek.graft_top_k(list(pre.values()), list(ft.values()), count)
    return Graft.from_masks(pre, ft, dict(zip(names, masks, strict=True)), **attributes)


# -- which parameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
def test_graftable_are_the_layers_and_nothing_else(family):
    model = model_zoo.small_model(family)
    names = list(graftable_parameters(model))
    assert names and len({name.split(".")[-3] for name in names}) > 1
    outside = [name for name, _ in model.named_parameters() if name not in names]
    assert any("emb" in name or "wte" in name or "embed" in name for name in outside)
    assert not any("lm_head" in name or "wte" in name or "embed_tokens" in name for name in names)


def test_patterns_choose():
    model = model_zoo.small_model()
    mlp = graftable_parameters(model, include=["*.mlp.*"])
    assert mlp and all(".mlp." in name for name in mlp)
    fewer = graftable_parameters(model, exclude=["*norm*"])
    assert not any("norm" in name for name in fewer)
    with pytest.raises(ValueError, match=r"include: expected a pattern that matches a parameter, got 'x\*'"):
        graftable_parameters(model, include=["x*"])
    with pytest.raises(TypeError, match=r"exclude: expected a list of patterns, got the string '\*norm\*'"):
        graftable_parameters(model, exclude="*norm*")
    with pytest.raises(ValueError, match="include: expected at least one pattern, got none"):
        graftable_parameters(model, include=[])
    with pytest.raises(ValueError, match="none left"):
        graftable_parameters(model, exclude=["*"])


def test_weights_that_cannot_be_grafted_are_refused():
    model = model_zoo.small_model()
    model.lm_head.weight = torch.nn.Parameter(model.model.layers[0].self_attn.q_proj.weight.data[:, :16])
    with pytest.raises(EngramError, match=r"model: expected a weight of its own in .*, got that of"):
        graftable_parameters(model)
    with torch.inference_mode():
        made = model_zoo.small_model()
    with pytest.raises(EngramError, match="model: expected weights made outside inference mode"):
        graftable_parameters(made)
    with pytest.raises(
        EngramError, match=r"model: expected float32, bfloat16 or float16, got torch\.float64"
    ):
        graftable_parameters(model_zoo.small_model().double())
    with pytest.raises(EngramError, match="meta device"):
        graftable_parameters(model_zoo.small_model().to("meta"))


# -- localize ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_localize_leaves_the_models_as_they_were(family, dtype):
    model = model_zoo.small_model(family, dtype=dtype)
    other = tuned(model)
    model.requires_grad_(False)
    first = next(model.parameters())
    first.requires_grad_(True)
    first.grad = torch.ones_like(first)
    before, after = bits(model), bits(other)
    graft = localize(model, other, language_batches(), sparsity=0.01, steps=5)
    assert_same(model, before)
    assert_same(other, after)
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
    losses = []
    graft = localize(
        model,
        other,
        batches,
        sparsity=0.02,
        steps=30,
        recipe=recipe,
        lr=lr,
        l1=0.0,
        progress=lambda done, total, loss: losses.append(loss),
    )
    assert losses[-1] < losses[0] - 0.1 and graft.size > 0
    with graft.apply(model), torch.no_grad():
        assert model(**batches[0]).loss < losses[0] + 0.05


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
    before = bits(shared)
    data = [torch.randn(4, 5, requires_grad=True)]
    with pytest.raises(EngramError, match="use checkpointing with use_reentrant=False"):
        localize(shared, tuned(shared), data, lambda m, x: m(x), sparsity=0.2)
    assert_same(shared, before)
    assert all(p.requires_grad and p.grad is None for p in shared.parameters())


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_gradients_that_are_not_finite_are_refused(recipe):
    model = model_zoo.small_model()
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
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
    assert_same(model, before)
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


def test_mask_composes_with_functional_call():
    model = model_zoo.small_model()
    parameters = graftable_parameters(model)
    pre = {name: p.detach() for name, p in parameters.items()}
    ft = {name: tuned(model).get_parameter(name).detach() for name in pre}
    recipe = Recipe(True, 0.0, 0.0, 1.0, bias=0.5, lr=1.0, l1=0.0, steps=1, rounds=0)
    mask = GraftMask(pre, ft, recipe, size=100, seed=3)
    for logits in mask.logits:
        logits.requires_grad_()
    batch = language_batches(1)[0]
    torch.func.functional_call(model, mask.parameters(), kwargs=batch).loss.backward()
    gradients = [logits.grad for logits in mask.logits]
    assert all(gradient.isfinite().all() for gradient in gradients)

    stepped = GraftMask(pre, ft, recipe, size=100, seed=3)
    theta = [torch.empty_like(weight) for weight in stepped.pre]
    stepped.blend_(theta)
    leaves = {name: value.requires_grad_() for name, value in zip(stepped.names, theta, strict=True)}
    torch.func.functional_call(model, leaves, kwargs=batch).loss.backward()
    grads = [leaf.grad for leaf in leaves.values()]
    stepped.step_(range(len(grads)), grads, [x.detach() for x in theta], lr=1.0, l1=0.0)
    for before, after, gradient in zip(mask.logits, stepped.logits, gradients, strict=True):
        torch.testing.assert_close(before.detach() - after, gradient, rtol=1e-3, atol=3e-6)


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
    "recipe": (ValueError, "recipe: expected one of rounds, panigrahi", dict(recipe="best")),
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
    before = bits(model)
    arguments = dict(pre_model=model, ft_model=tuned(model), batches=language_batches(), steps=5)
    with pytest.raises(kind, match=message):
        localize(**{**arguments, **change})
    assert_same(model, before)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_an_interrupted_start_is_undone(monkeypatch):
    model = model_zoo.small_model()
    model.requires_grad_(False)
    before, count = bits(model), []
    register = torch.nn.Parameter.register_post_accumulate_grad_hook

    def interrupted(self, hook):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        return register(self, hook)

    monkeypatch.setattr(torch.nn.Parameter, "register_post_accumulate_grad_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        localize(model, tuned(model), language_batches(), steps=5)
    assert_same(model, before)
    assert not any(p.requires_grad or p._post_accumulate_grad_hooks for p in model.parameters())


def test_other_architecture_is_refused():
    model = model_zoo.small_model()
    other = {name: p.detach().double() for name, p in model.named_parameters()}
    with pytest.raises(EngramError, match=r"ft_model: expected torch\.float32 in"):
        localize(model, other, language_batches())
    other = {name: p.detach()[:1] for name, p in model.named_parameters()}
    with pytest.raises(EngramError, match="ft_model: expected shape"):
        localize(model, other, language_batches())


# -- apply, undo, switch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_and_undo_a_thousand_times(dtype):
    model = model_zoo.small_model(dtype=dtype)
    graft = some_graft(model)
    before = bits(model)
    switch = GraftSwitch(model, {"a": graft, "b": some_graft(model, seed=2)})
    for _ in range(500):
        switch.use("a")
        switch.use("b")
        switch.use(None)
    assert_same(model, before)
    with graft.apply(model) as applied:
        assert applied.applied
        for name, at in graft.indices.items():
            assert torch.equal(model.get_parameter(name).detach().reshape(-1)[at.long()], graft.values[name])
    assert not applied.applied
    assert_same(model, before)


def test_moved_and_converted_models_are_noticed():
    model = model_zoo.small_model()
    graft = some_graft(model)
    applied = graft.apply(model)
    switch = GraftSwitch(model, {"a": graft}, force=True)
    model.double()
    standing = bits(model)
    with pytest.raises(EngramError, match="the model was moved, converted or loaded anew"):
        applied.revert()
    with pytest.raises(EngramError, match="the model was moved, converted or loaded anew"):
        switch.use("a")
    assert applied.applied and switch.active is None
    assert_same(model, standing)


def test_the_base_is_digested_once_for_all_grafts(monkeypatch):
    from engram_kernels.grafting import applied

    model = model_zoo.small_model()
    grafts = {str(i): some_graft(model, seed=i) for i in range(3)}
    seen = []
    digest = applied.tensor_checksum
    monkeypatch.setattr(applied, "tensor_checksum", lambda x: seen.append(1) or digest(x))
    GraftSwitch(model, grafts)
    assert len(seen) == len(graftable_parameters(model))


def test_an_exception_in_flight_is_kept():
    model = model_zoo.small_model()
    graft = some_graft(model)
    for context in (graft.apply(model), GraftSwitch(model, {"a": graft}, force=True)):
        with (
            pytest.warns(UserWarning, match="the graft stays in the model"),
            pytest.raises(KeyError, match="mine"),
        ):
            with context as entered:
                if isinstance(entered, GraftSwitch):
                    entered.use("a")
                name = next(iter(graft.indices))
                model.get_parameter(name).data.add_(1)
                raise KeyError("mine")


def test_later_changes_are_not_overwritten():
    model = model_zoo.small_model()
    one, two = some_graft(model, 1), some_graft(model, 2)
    two.indices = {name: at.clone() for name, at in one.indices.items()}
    two.values = {name: value + 1 for name, value in one.values.items()}
    before = bits(model)
    first = one.apply(model)
    second = two.apply(model, force=True)
    standing = bits(model)
    with pytest.raises(EngramError, match="revert later grafts first"):
        first.revert()
    assert_same(model, standing)
    second.revert()
    first.revert()
    first.revert()
    assert_same(model, before)


def test_another_base_is_refused_unless_forced():
    model = model_zoo.small_model()
    graft = some_graft(model)
    other = tuned(model)
    before = bits(other)
    with pytest.raises(EngramError, match="the weights that the graft was made for, got others"):
        graft.apply(other)
    assert_same(other, before)
    with graft.apply(other, force=True):
        pass
    assert_same(other, before)
    half = copy.deepcopy(model).bfloat16()
    with pytest.raises(EngramError, match="got others"):
        graft.apply(half)
    with graft.apply(half, force=True):
        name = next(iter(graft.indices))
        got = half.get_parameter(name).detach().reshape(-1)[graft.indices[name].long()]
        assert torch.equal(got, graft.values[name].bfloat16())
    with pytest.raises(EngramError, match="model: expected a tensor"):
        graft.apply(model_zoo.small_model("gpt2"), force=True)
    wide = model_zoo.small_model("qwen3")
    with pytest.raises(EngramError, match="model: expected shape"):
        graft.apply(wide, force=True)


def test_merge_and_unload():
    model = model_zoo.small_model()
    graft = some_graft(model)
    assert graft.merge_and_unload(model) is model
    with pytest.raises(EngramError):
        graft.apply(model)  # no longer the base


def test_switch_names():
    model = model_zoo.small_model()
    switch = GraftSwitch(model, {"a": some_graft(model)})
    before = bits(model)
    with pytest.raises(ValueError, match="name: expected one of a, or None, got 'c'"):
        switch.use("c")
    with switch:
        switch.use("a")
        switch.use("a")
    assert switch.active is None
    assert_same(model, before)


# -- algebra -------------------------------------------------------------------------------------------------


def plain(indices, values, size=10, checksum="x"):
    at = {"layers.0.w": torch.tensor(indices, dtype=torch.int32)}
    return Graft(at, {"layers.0.w": torch.tensor(values)}, {"layers.0.w": (size,)}, {"layers.0.w": checksum})


def test_union_and_overlap():
    one, two, three = plain([1, 4], [1.0, 2.0]), plain([4, 7], [5.0, 6.0]), plain([0, 4], [9.0, 8.0])
    average = Graft.union([one, two, three])
    assert average.indices["layers.0.w"].tolist() == [0, 1, 4, 7]
    assert average.values["layers.0.w"].tolist() == [9.0, 1.0, 5.0, 6.0]
    assert average.indices["layers.0.w"].dtype == torch.int32
    first = Graft.union([one, two, three], conflicts="first")
    assert first.values["layers.0.w"].tolist() == [9.0, 1.0, 2.0, 6.0]
    assert one.overlap(two) == (1, 2, 2, 1 / 3)
    assert one.overlap(one).jaccard == 1
    for default in DEFAULTS.values():
        with default():
            again = Graft.union([one, two, three])
        assert torch.equal(again.values["layers.0.w"], average.values["layers.0.w"])
    with pytest.raises(EngramError, match="grafts of one base"):
        Graft.union([one, plain([2], [1.0], checksum="y")])
    with pytest.raises(ValueError, match="conflicts: expected 'average' or 'first', got 'last'"):
        Graft.union([one], conflicts="last")
    with pytest.raises(ValueError, match="grafts: expected at least one"):
        Graft.union([])


def test_density():
    model = model_zoo.small_model()
    graft = some_graft(model, count=77)
    rows = graft.density()
    assert sum(row.entries for row in rows) == 77
    assert sum(row.size for row in rows) == sum(p.numel() for p in graftable_parameters(model).values())
    assert {row.layer for row in rows} == {0, 1, 2, 3}
    assert {row.module for row in rows if row.layer == 1} >= {
        "mlp.down_proj.weight",
        "self_attn.q_proj.weight",
    }


# -- files ---------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    model = model_zoo.small_model(dtype=torch.bfloat16)
    graft = some_graft(model, count=5000, base_model="small", metrics={"accuracy": 0.5}, recipe={"name": "x"})
    graft.save_pretrained(tmp_path / "graft")
    read = Graft.from_pretrained(tmp_path / "graft")
    assert read.shapes == graft.shapes and read.checksums == graft.checksums
    assert (read.base_model, read.metrics, read.recipe) == ("small", {"accuracy": 0.5}, {"name": "x"})
    for name, at in graft.indices.items():
        assert torch.equal(read.indices[name], at) and torch.equal(read.values[name], graft.values[name])
    weights = (tmp_path / "graft" / "graft_model.safetensors").read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    assert len(weights) - header <= 6.1 * graft.size
    assert {path.name for path in tmp_path.iterdir()} == {"graft"}
    with pytest.raises(EngramError, match="directory: expected a new or empty one"):
        graft.save_pretrained(tmp_path / "graft")


def damaged(folder, how):
    weights, config = folder / "graft_model.safetensors", folder / "graft_config.json"
    content = bytearray(weights.read_bytes())
    if how == "truncated":
        weights.write_bytes(content[:-5])
    elif how == "flipped bit":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "no weights":
        weights.unlink()
    elif how == "no configuration":
        config.unlink()
    else:
        settings = json.loads(config.read_text())
        name = next(iter(settings["parameters"]))
        if how == "truncated configuration":
            config.write_text(config.read_text()[:-50])
            return
        if how == "format":
            settings["format"] = 99
        elif how == "smaller shape":
            for entry in settings["parameters"].values():
                entry["shape"] = [1]
        elif how == "missing parameter":
            settings["parameters"] = {}
        elif how == "not an object":
            settings["parameters"][name] = 3
        config.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "flipped bit",
        "empty",
        "no weights",
        "no configuration",
        "truncated configuration",
        "format",
        "smaller shape",
        "missing parameter",
        "not an object",
    ],
)
def test_damaged_files_are_refused(tmp_path, how):
    model = model_zoo.small_model()
    some_graft(model).save_pretrained(tmp_path / "graft")
    damaged(tmp_path / "graft", how)
    before = bits(model)
    with pytest.raises(EngramError, match="name_or_directory: expected a saved graft, got "):
        Graft.from_pretrained(tmp_path / "graft").apply(model)
    assert_same(model, before)


def test_metrics_that_are_no_json_are_refused(tmp_path):
    for bad in (float("nan"), torch.ones(2)):
        with pytest.raises(ValueError, match="metrics: expected finite numbers"):
            some_graft(model_zoo.small_model(), metrics={"x": bad}).save_pretrained(tmp_path / "graft")
    assert not list(tmp_path.iterdir())


def test_base_is_named_without_its_folder(tmp_path):
    model = model_zoo.small_model()
    model.config._name_or_path = str(tmp_path)
    arguments = (model, tuned(model), language_batches())
    assert localize(*arguments, sparsity=0.01, steps=5).base_model == tmp_path.name
    assert localize(*arguments, sparsity=0.01, steps=5, base_model="me/base").base_model == "me/base"


def test_hub(tmp_path, monkeypatch):
    import huggingface_hub

    model = model_zoo.small_model()
    graft, calls = some_graft(model), []

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(
                ("upload", repo_id, sorted(path.name for path in folder_path.iterdir()), commit_message)
            )
            Graft.from_pretrained(folder_path)
            return "commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert graft.push_to_hub("me/skill", private=True) == "commit"
    names = ["graft_config.json", "graft_model.safetensors"]
    assert calls == [("create", "me/skill", True, True), ("upload", "me/skill", names, "Upload graft")]

    graft.save_pretrained(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))
    assert Graft.from_pretrained("me/skill").size == graft.size

    def offline(*_, **__):
        raise OSError("no network. More about it.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(EngramError, match=r"a repository on the Hub, got 'me/skill' \(no network\)"):
        Graft.from_pretrained("me/skill")


# -- tasks ---------------------------------------------------------------------------------------------------


def prompts(tokenizer):
    return PromptTask(tokenizer, "Text: {} It was", ["a", "b", "c"])


ROWS = [
    (0, "The Eiffel Tower"),
    (1, "Rome is"),
    (2, "A word may be cut into pieces, so it is longer"),
    (1, "x"),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "granite"])
def test_prompt_logits_are_the_models(family):
    model, tokenizer = model_zoo.small_model(family), model_zoo.byte_level_tokenizer()
    task = prompts(tokenizer)
    (batch,) = task.batches(ROWS, 4)
    order = sorted(range(4), key=lambda i: len(task._encode(ROWS[i][1])))
    assert batch["labels"].tolist() == [ROWS[i][0] for i in order]
    with torch.no_grad():
        got = task.logits(model, batch)
        for row, i in zip(got, order, strict=True):
            ids = tokenizer(f"Text: {ROWS[i][1]} It was", return_tensors="pt").input_ids
            torch.testing.assert_close(row, model(ids).logits[0, -1, task.tokens], rtol=1e-4, atol=1e-4)
        loss = torch.nn.functional.cross_entropy(got, batch["labels"])
        torch.testing.assert_close(task.loss(model, batch), loss)


def test_batches_are_seeded_and_complete():
    task = prompts(model_zoo.byte_level_tokenizer())
    rows = [(i % 3, "word " * (i % 7)) for i in range(23)]
    labels = lambda batches: sorted(y for batch in batches for y in batch["labels"].tolist())  # noqa: E731
    one, same, other = (task.batches(rows, 4, seed=s) for s in (1, 1, 2))
    assert labels(one) == sorted(y for y, _ in rows) and len(one) == 6
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, same, strict=True))
    assert any(a["input_ids"].shape != b["input_ids"].shape for a, b in zip(one, other, strict=True))


def test_long_texts_keep_the_template():
    tokenizer = model_zoo.byte_level_tokenizer()
    task = PromptTask(tokenizer, "Text: {} It was", ["a", "b"], max_length=20)
    (batch,) = task.batches([(0, "many words " * 50)], 1)
    text = tokenizer.decode(batch["input_ids"][0])
    assert batch["input_ids"].shape[1] <= 20 and text.startswith("Text: many") and text.endswith(" It was")


def test_bad_tasks():
    tokenizer = model_zoo.byte_level_tokenizer()
    with pytest.raises(ValueError, match=r"template: expected one \{\}"):
        PromptTask(tokenizer, "no place", ["a", "b"])
    with pytest.raises(ValueError, match="words: expected words of one token, got 'zqxj'"):
        PromptTask(tokenizer, "{}", ["a", "zqxj"])
    with pytest.raises(ValueError, match="words: expected two or more different tokens"):
        PromptTask(tokenizer, "{}", ["a", "a"])
    with pytest.raises(ValueError, match="rows: expected labels from 0 to 2, got 3"):
        prompts(tokenizer).batches([(3, "x")], 1)


def test_evaluate():
    model = model_zoo.small_model()
    task = prompts(model_zoo.byte_level_tokenizer())
    result = evaluate(model, task.batches(ROWS, 3), task.logits)
    with torch.no_grad():
        parts = [(task.logits(model, batch), batch["labels"]) for batch in task.batches(ROWS, 1)]
    answers = [int(logits.argmax()) == int(label) for logits, label in parts]
    assert result.count == 4 and result.accuracy == sum(answers) / 4
    assert result.loss == pytest.approx(
        sum(float(torch.nn.functional.cross_entropy(*part)) for part in parts) / 4, rel=1e-4
    )
    with pytest.raises(EngramError, match="batches: expected at least one, got none"):
        evaluate(model, [], task.logits)


def test_calibration_error():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.45, 0.55]])
    labels = torch.tensor([0, 1, 1, 0])
    # Bins of width 0.1: two at 0.9 with half right, one at 0.7 right, one at 0.55 wrong.
    expected = (2 * abs(0.5 - 0.9) + abs(1 - 0.7) + abs(0 - 0.55)) / 4
    assert calibration_error(probabilities, labels, bins=10) == pytest.approx(expected, abs=1e-6)
    assert calibration_error(torch.eye(3), torch.arange(3)) == 0


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
    before = bits(model)
    graft = localize(model, other, [batch], sparsity=0.01, steps=5)
    assert graft.size > 0 and all("encoder.layer" in name for name in graft.shapes)
    assert_same(model, before)
    assert evaluate(model, [batch]).count == 6


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
        if torch.is_tensor(x) and x.shape == (64, 32) and x.data_ptr() not in owned and x.is_floating_point()
    ]
    assert not extra

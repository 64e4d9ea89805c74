"""Masks, for those who learn them with their own autograd."""

import model_zoo
import pytest
import torch
from grafting_helpers import language_batches, tuned

from engram_kernels.grafting import RECIPES, GraftMask, Recipe, graftable_parameters


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


def test_masks_of_other_things_are_refused():
    pre = {"w": torch.zeros(4)}
    with pytest.raises(TypeError, match=r"^recipe: expected a Recipe, got str$"):
        GraftMask(pre, pre, "rounds", size=1)
    with pytest.raises(
        ValueError, match=r"^ft: expected a tensor for each of pre's names, got none of \['w'\]"
    ):
        GraftMask(pre, {}, RECIPES["rounds"], size=1)
    assert repr(GraftMask(pre, pre, RECIPES["rounds"], size=1)) == "GraftMask(1 of 4 weights in 1 parameters)"

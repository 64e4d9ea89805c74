"""What the tests of grafting share: fine-tuned models, batches, grafts."""

import copy

import torch

import engram_kernels as ek
from engram_kernels.grafting import Graft, graftable_parameters


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


def some_graft(model, seed=1, count=50, **attributes):
    names = list(graftable_parameters(model))
    pre = {name: model.get_parameter(name).detach() for name in names}
    ft = {name: tuned(model, seed).get_parameter(name).detach() for name in names}
    masks = ek.graft_top_k(list(pre.values()), list(ft.values()), count)
    return Graft.from_masks(pre, ft, dict(zip(names, masks, strict=True)), **attributes)

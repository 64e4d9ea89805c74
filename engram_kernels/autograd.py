"""Gradients: one `torch.autograd.Function` an operator, made of operator calls and transposes."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._ops import ops


def _backward(body: Callable) -> staticmethod:
    """A backward in its tensors' own types, also where autocast is on; differentiable once."""

    @functools.wraps(body)
    def run(ctx, *gradients: Tensor):
        with torch.autocast(gradients[0].device.type, enabled=False):
            return body(ctx, *gradients)

    return staticmethod(once_differentiable(run))


class ResidualGram(torch.autograd.Function):
    """E = V − K Wᵀ and G = K Pᵀ; dW = −dEᵀ K, dK = −dE W + dG P, dV = dE, dP = dGᵀ K."""

    @staticmethod
    def forward(
        ctx, weight: Tensor, keys: Tensor, values: Tensor, preconditioned: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, keys, preconditioned)
        return ops.residual_gram(weight, keys, values, preconditioned)

    @_backward
    def backward(ctx, d_residual: Tensor, d_gram: Tensor):
        weight, keys, preconditioned = ctx.saved_tensors
        d_weight = d_keys = d_values = d_preconditioned = None
        if ctx.needs_input_grad[0]:
            d_weight = (-d_residual.mT @ keys).to(weight.dtype)
        if ctx.needs_input_grad[1]:
            d_keys = (d_gram @ preconditioned).to(keys.dtype) - d_residual @ weight.to(keys.dtype)
        if ctx.needs_input_grad[2]:
            d_values = d_residual
        if ctx.needs_input_grad[3]:
            d_preconditioned = d_gram.mT @ keys.double()
        return d_weight, d_keys, d_values, d_preconditioned


class SmallSolve(torch.autograd.Function):
    """X = A⁻¹ Y [B, n, m]; dY = A⁻ᵀ dX, dA = −dY Xᵀ (on the stored triangle where A is unit triangular)."""

    @staticmethod
    def forward(ctx, system: Tensor, right_hand_side: Tensor, kind: str) -> Tensor:
        solution, _ = ops.small_solve(system, right_hand_side, kind)
        ctx.save_for_backward(system, solution)
        ctx.kind = kind
        return solution

    @_backward
    def backward(ctx, d_solution: Tensor):
        system, solution = ctx.saved_tensors
        transposed = {"cholesky": "cholesky", "unit_lower": "unit_upper", "unit_upper": "unit_lower"}[
            ctx.kind
        ]
        d_right, _ = ops.small_solve(system.mT.contiguous(), d_solution.contiguous(), transposed)
        d_system = None
        if ctx.needs_input_grad[0]:
            d_system = -d_right.double() @ solution.double().mT
            if ctx.kind == "unit_lower":
                d_system = d_system.tril(-1)
            elif ctx.kind == "unit_upper":
                d_system = d_system.triu(1)
        return d_system, d_right, None


class LowRankUpdate(torch.autograd.Function):
    """W + s L R [B, out, in]; dW = g, dL = s g Rᵀ, dR = s Lᵀ g."""

    @staticmethod
    def forward(ctx, weight: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.scale = scale
        return ops.low_rank_update(weight, left, right, scale)

    @_backward
    def backward(ctx, gradient: Tensor):
        left, right = ctx.saved_tensors
        wide = gradient.to(left.dtype)
        d_left = ctx.scale * (wide @ right.mT) if ctx.needs_input_grad[1] else None
        d_right = ctx.scale * (left.mT @ wide) if ctx.needs_input_grad[2] else None
        return gradient if ctx.needs_input_grad[0] else None, d_left, d_right, None


class GraftBlend(torch.autograd.Function):
    """θ = pre + γ (ft − pre) [N], γ = σ(s (S − bias)).

    dS = s g (ft − pre) γ (1 − γ), dft = g γ, dpre = g (1 − γ).
    """

    @staticmethod
    def forward(ctx, pre: Tensor, ft: Tensor, logits: Tensor, base: Tensor | None, bias: float) -> Tensor:
        ctx.save_for_backward(pre, ft, logits, base)
        ctx.bias = bias
        return ops.graft_blend(pre, ft, logits, base, bias)

    @_backward
    def backward(ctx, gradient: Tensor):
        pre, ft, logits, base = ctx.saved_tensors
        gradient = gradient.contiguous()
        d_pre = d_ft = d_logits = None
        if ctx.needs_input_grad[0]:
            d_pre = ops.graft_blend(gradient, torch.zeros_like(gradient), logits, base, ctx.bias)
        if ctx.needs_input_grad[1]:
            d_ft = ops.graft_blend(torch.zeros_like(gradient), gradient, logits, base, ctx.bias)
        if ctx.needs_input_grad[2]:
            d_logits = ops.graft_logits_gradient(gradient, pre, ft, logits, base, ctx.bias)
        return d_pre, d_ft, d_logits, None, None


class GraftBlendPacked(torch.autograd.Function):
    """θ = ft where the mask's bit is 1, else pre [N]; dft = g there and 0 elsewhere, dpre the reverse."""

    @staticmethod
    def forward(ctx, pre: Tensor, ft: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return ops.graft_blend_packed(pre, ft, mask)

    @_backward
    def backward(ctx, gradient: Tensor):
        (mask,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        zeros = torch.zeros_like(gradient)
        d_pre = ops.graft_blend_packed(gradient, zeros, mask) if ctx.needs_input_grad[0] else None
        d_ft = ops.graft_blend_packed(zeros, gradient, mask) if ctx.needs_input_grad[1] else None
        return d_pre, d_ft, None


class PseudoInverse(torch.autograd.Function):
    """X = (AᵀA + λI)⁻¹Aᵀ [B, n, m] of a tall A; with S = (AᵀA + λI)⁻¹, dA = (I − A X) gᵀ S − Xᵀ g Xᵀ."""

    @staticmethod
    def forward(ctx, a: Tensor, ridge: float | None, relative: float) -> Tensor:
        inverse, factor, _ = ops.pseudo_inverse(a, ridge, relative)
        ctx.save_for_backward(a, inverse, factor)
        return inverse

    @_backward
    def backward(ctx, gradient: Tensor):
        a, inverse, factor = ctx.saved_tensors
        solved = torch.cholesky_solve(gradient, factor).mT
        return solved - a @ (inverse @ solved) - inverse.mT @ (gradient @ inverse.mT), None, None


class MemorySolve(torch.autograd.Function):
    """M = (A + λI)⁻¹B [B, K, C]; dB = (A + λI)⁻¹ g, dA = the symmetric part of −dB Mᵀ, as A counts by its."""

    @staticmethod
    def forward(ctx, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
        memory, _ = ops.memory_solve(gram, cross, ridge, True)
        ctx.save_for_backward(gram, memory)
        ctx.ridge = ridge
        return memory

    @_backward
    def backward(ctx, gradient: Tensor):
        gram, memory = ctx.saved_tensors
        d_cross, _ = ops.memory_solve(gram, gradient.contiguous(), ctx.ridge, False)
        d_gram = None
        if ctx.needs_input_grad[0]:
            d_gram = d_cross @ memory.mT
            d_gram = -(d_gram + d_gram.mT) / 2
        return d_gram, d_cross, None


class MemoryStream(torch.autograd.Function):
    """N sequential writes: P, M after the last, readouts [B, N, C] and leverages [B, N] after each."""

    @staticmethod
    def forward(
        ctx, precision_inverse: Tensor, memory: Tensor, weights: Tensor, latents: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(precision_inverse, memory, weights, latents)
        return ops.memory_stream(precision_inverse, memory, weights, latents)

    @_backward
    def backward(ctx, *gradients: Tensor):
        return ops.memory_stream_gradient(*ctx.saved_tensors, *(g.contiguous() for g in gradients))

"""Gradients: one `torch.autograd.Function` an operator, made of operator calls and transposes."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._ops import ops


class ResidualGram(torch.autograd.Function):
    """E = V − K Wᵀ and G = K Pᵀ; dW = −dEᵀ K, dK = −dE W + dG P, dV = dE, dP = dGᵀ K."""

    @staticmethod
    def forward(
        ctx, weight: Tensor, keys: Tensor, values: Tensor, preconditioned: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight, keys, preconditioned)
        return ops.residual_gram(weight, keys, values, preconditioned)

    @staticmethod
    @once_differentiable
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

    @staticmethod
    @once_differentiable
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

    @staticmethod
    @once_differentiable
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

    @staticmethod
    @once_differentiable
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

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (mask,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        zeros = torch.zeros_like(gradient)
        d_pre = ops.graft_blend_packed(gradient, zeros, mask) if ctx.needs_input_grad[0] else None
        d_ft = ops.graft_blend_packed(zeros, gradient, mask) if ctx.needs_input_grad[1] else None
        return d_pre, d_ft, None

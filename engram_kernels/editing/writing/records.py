"""The records of edits that were made: the facts, the low-rank writes, the matrices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...errors import EngramError
from ...hf.projection import Projection
from ..edit import Edit
from .weights import add_, matrix_checksum


@dataclass(frozen=True)
class EditRecord:
    """What one edit did.

    Attributes:
        edit: the fact.
        probability_before: `p(target | prompt)` of the whole target before any write.
        probability_after: the same after all writes of the call that made the edit.
        took: whether greedy decoding then answers with the target, after the prompt and after every
            paraphrase: each token of the target is the likeliest one, and none follows that would go on with
            its last word, unless the edit allows for suffixes.
        reached: `p(target | text)` after all writes, for the prompt and then for every paraphrase: after it
            by itself, in every context of the value's search (perhaps a word shorter), and in other forms.
        undid: earlier facts about the subject that the model said before this edit, and does not after it.
        losses: of every step of the value's optimisation.
        key_norm: norm of the key that was written.
        value_norm: norm of the value that the projection answered before.
        change_norm: norm of the change of the value.
    """

    edit: Edit
    probability_before: float
    probability_after: float
    took: bool
    reached: list[list[float]] = field(repr=False)
    undid: list[str]
    losses: list[float] = field(repr=False)
    key_norm: float
    value_norm: float
    change_norm: float


@dataclass(frozen=True)
class SkippedEdit:
    """An edit that was not made.

    Attributes:
        number: its place in what was asked for.
        edit: the fact.
        reason: one sentence.
    """

    number: int
    edit: Edit
    reason: str


@dataclass(frozen=True)
class Write:
    """One rank-n write as it was done: `weight += left @ right`.

    With `P = K C⁻¹` and `S = (λI + P Kᵀ)⁻¹`, `left @ right = Eᵀ S P`: as `Eᵀ S` and `P` while keys are few,
    and as `Eᵀ` and `S P` where they are many.

    Attributes:
        module: name of the projection.
        left, right: float32, `[out, n]` and `[n, in]`.
        keys, residuals: `K [n, in]` and `E [n, out]`, float32: what was to be written.
        ridge: `λ`; None: every row stands by itself, and `E` is what all of them change of the answers.
        edits: `n` numbers: to which record each row belongs.
        stream: what all keys and gradients so far are like, where a method normalises by it (`Stream`).
    """

    module: str
    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    keys: Tensor = field(repr=False)
    residuals: Tensor = field(repr=False)
    ridge: float | None
    edits: tuple[int, ...]
    stream: Tensor | None = field(default=None, repr=False)

    def apply_(self, projection: Projection) -> None:
        """Do the write again."""
        add_(projection, self.left, self.right)

    def without(self, number: int) -> Write | None:
        """The write without one edit, the later ones renumbered; None where nothing is left of it."""
        kept = [place for place, edit in enumerate(self.edits) if edit != number]
        gone = [place for place, edit in enumerate(self.edits) if edit == number]
        edits = tuple(self.edits[place] - (self.edits[place] > number) for place in kept)
        if not kept:
            return None
        if not gone:
            return replace(self, edits=edits)
        keys, residuals = self.keys[kept], self.residuals[kept]
        if self.ridge is None:
            left, right = self.left[:, kept], self.right[kept]
            residuals = ((keys.double() @ right.double().T) @ left.double().T).float()
        elif torch.equal(self.left.T, self.residuals):
            # `K rightᵀ = I − λS`, and the inverse of a part of a matrix comes from blocks of its inverse.
            whole = self.right.double()
            leverage = self.keys.double() @ whole.T
            _check_joint(leverage, leverage.T)
            leverage = leverage[:, gone]
            identity = torch.eye(len(gone), dtype=whole.dtype, device=whole.device)
            own = torch.linalg.solve(identity - leverage[gone], whole[gone])
            left, right = residuals.T, (whole[kept] + leverage[kept] @ own).float()
        else:
            _check_joint(left_factor(self.keys, self.right, self.residuals, self.ridge), self.left)
            right = self.right[kept]
            left = left_factor(keys, right, residuals, self.ridge)
        return Write(self.module, left, right, keys, residuals, self.ridge, edits, self.stream)


@dataclass
class EditedModule:
    """One matrix that was written.

    Attributes:
        module: name of the projection.
        layer: index of the decoder layer.
        transposed: whether the model keeps the matrix as `[in, out]`.
        base_checksum: of the weight before the first write.
        edited_checksum: of the weight after the last; None where the writes were never done in this order.
        experts: how many experts share the tensor that it is a part of, the name's last number being its own;
            None where it is a weight by itself.
        dtype: of the weight, such as "bfloat16".
    """

    module: str
    layer: int
    transposed: bool
    base_checksum: str
    edited_checksum: str | None
    experts: int | None
    dtype: str

    @classmethod
    def of(cls, projection: Projection) -> EditedModule:
        """The matrix as it is now."""
        return cls(
            module=projection.name,
            layer=projection.layer,
            transposed=projection.transposed,
            base_checksum=matrix_checksum(projection),
            edited_checksum=None,
            experts=getattr(projection.module, "count", None),
            dtype=str(projection.module.weight.dtype).removeprefix("torch."),
        )


def _check_joint(found: Tensor, expected: Tensor) -> None:
    """Raise unless keys, residuals and ridge determine a write: some methods multiply it afterwards."""
    if (found - expected).norm() > 1e-2 * expected.norm():
        raise EngramError(
            "number: expected an edit of a write that its keys and residuals determine, got one whose method "
            "multiplies updates afterwards; revert it, and edit without that one"
        )


def joint_write(writes: Sequence[Write]) -> Write:
    """One write of all keys and residuals of several writes of a matrix, made for the same weights and `C`.

    Each holds `P = K C⁻¹`, or `S P` with `S = (λI + P Kᵀ)⁻¹ = (I − K (S P)ᵀ) / λ`, from which `P` comes back.

    Raises:
        LinAlgError: the keys of all are dependent, and there is no ridge.
    """
    first = writes[0]
    keys = torch.cat([write.keys for write in writes])
    residuals = torch.cat([write.residuals for write in writes])
    right = torch.cat([_preconditioned(write) for write in writes])
    edits = tuple(edit for write in writes for edit in write.edits)
    left = left_factor(keys, right, residuals, first.ridge)
    return Write(first.module, left, right.float(), keys, residuals, first.ridge, edits)


def _preconditioned(write: Write) -> Tensor:
    """`K C⁻¹ [n, in]`, float64."""
    right = write.right.double()
    if not _carries_residuals(write):
        return right
    system = torch.eye(len(right), dtype=right.dtype, device=right.device) - write.keys.double() @ right.T
    return torch.linalg.solve(system / write.ridge, right)


def _carries_residuals(write: Write) -> bool:
    """Whether the left factor is the residuals alone, and the right one is solved for."""
    return write.ridge > 0 and torch.equal(write.left.T, write.residuals)


def left_factor(keys: Tensor, right: Tensor, residuals: Tensor, ridge: float) -> Tensor:
    """`((λI + K Pᵀ)⁻¹ E)ᵀ [out, n]` with `P = right`, solved in float64 and rounded to float32.

    Raises:
        LinAlgError: the system is singular.
    """
    system = keys.double() @ right.double().T
    system.diagonal().add_(ridge)
    return torch.linalg.solve(system, residuals.double()).T.float()


def joined_factors(writes: Iterable[Write]) -> tuple[Tensor, Tensor]:
    """`left [out, n]` and `right [n, in]` of all writes of one matrix, beside each other."""
    left, right = zip(*((write.left, write.right) for write in writes), strict=True)
    return torch.cat(left, dim=1), torch.cat(right, dim=0)

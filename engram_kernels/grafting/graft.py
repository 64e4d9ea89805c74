"""A graft: positions of a model and the fine-tuned values that belong there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks as check
from .._hashing import tensor_checksum
from .._progress import Progress
from ..errors import EngramError
from ..hf.hub import HubFolder
from ..hf.placement import without_wrappers
from ..hf.weights import first_names
from ..ops import pack_mask, sparse_diff, unpack_mask
from .applied import AppliedGraft
from .density import Density, layer_and_kind, percent
from .files import read_files, write_files
from .joining import Options
from .merging import RULES, by_method, by_rule, check_method, common_base
from .parameters import by_inner_name, tensors_of
from .refit import refit


class Overlap(NamedTuple):
    """How many positions two grafts share: `shared`, of `mine` and `theirs`; `jaccard = shared / either`."""

    shared: int
    mine: int
    theirs: int
    jaccard: float


@dataclass(repr=False, eq=False)
class Graft(HubFolder):
    """A skill as a sparse patch: `weight[indices] = values`, absolute fine-tuned values, bit for bit.

    Attributes:
        indices: by parameter name, ascending row-major positions `[n]`, int32 (int64 in tensors of more than
            2³¹ entries). Parameters without entries are left out.
        values: by parameter name, `[n]`, in the base's dtype.
        shapes: by name, of every parameter that could have been grafted.
        checksums: by name, of the same parameters of the base: dtype, shape and bits.
        base_model: name or folder of the base, as its configuration says.
        base_revision: the base's commit on the Hub, where it is known.
        recipe: how the positions were found.
        metrics: whatever was measured; written to the configuration.

    Raises:
        ValueError: positions that are not ascending or not within their shape, or not one value for each.

    Example:
        >>> graft = Graft.from_pretrained("my-skill")
        >>> with graft.apply(model):
        ...     model.generate(**inputs)
        >>> # here the model is as it was, bit for bit
        >>> graft.push_to_hub("user/my-skill")

    Source: Panigrahi et al. 2023 (arXiv 2302.06600).
    """

    indices: dict[str, Tensor]
    values: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    checksums: dict[str, str]
    base_model: str | None = None
    base_revision: str | None = None
    recipe: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, at in self.indices.items():
            check.expect(name in self.shapes, "indices", "names that have a shape", repr(name))
            size, values = _count(self.shapes[name]), self.values.get(name)
            whole = at.dtype in (torch.int32, torch.int64) and at.dim() == 1
            check.expect(whole, "indices", f"integers [n] in {name!r}", f"{at.dtype} {list(at.shape)}")
            got = "none" if values is None else list(values.shape)
            paired = values is not None and values.shape == at.shape
            check.expect(paired, "values", f"shape {list(at.shape)} in {name!r}", got)
            ascending = not at.numel() or (
                0 <= int(at[0]) and int(at[-1]) < size and bool((at[1:] > at[:-1]).all())
            )
            check.expect(
                ascending, "indices", f"ascending positions from 0 to {size - 1} in {name!r}", "others"
            )

    @classmethod
    def from_masks(
        cls,
        pre: Mapping[str, Tensor],
        ft: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        **attributes: Any,
    ) -> Graft:
        """Make a graft of the entries of `ft` where packed masks are 1.

        Args:
            pre: the base's graftable tensors by name, for their shapes and checksums.
            ft: the fine-tuned tensors.
            masks: packed masks of `ek.pack_mask`, or of `ek.graft_top_k`.
            **attributes: of the graft: base_model, recipe, metrics.

        Raises:
            EngramError: the masks choose nothing that changed.
        """
        indices, values = {}, {}
        changed = False
        for name, weight in pre.items():
            at = unpack_mask(masks[name], (weight.numel(),)).nonzero().flatten()
            if at.numel():
                values[name] = ft[name].detach().reshape(-1)[at].cpu()
                changed = changed or not _same_bits(values[name], weight.detach().reshape(-1)[at].cpu())
                indices[name] = at.to(torch.int32 if weight.numel() <= 2**31 else torch.int64).cpu()
        if indices and not changed:
            count = sum(at.numel() for at in indices.values())
            raise EngramError(
                f"ft: expected values that differ from pre's, got the same at all {count} positions"
            )
        return cls.from_entries(pre, indices, values, **attributes)

    @classmethod
    def from_entries(
        cls,
        pre: Mapping[str, Tensor],
        indices: dict[str, Tensor],
        values: dict[str, Tensor],
        **attributes: Any,
    ) -> Graft:
        """Make a graft of positions and values for a base, whose shapes and checksums are taken.

        Args:
            pre: the base's tensors by name, of all names that are set.
            indices, values, **attributes: of the graft.
        """
        shapes = {name: tuple(weight.shape) for name, weight in pre.items()}
        checksums = {name: tensor_checksum(weight) for name, weight in pre.items()}
        return cls(indices, values, shapes, checksums, **attributes)

    @classmethod
    def from_difference(
        cls,
        pre: Mapping[str, Tensor],
        ft: Mapping[str, Tensor],
        threshold: float | None = None,
        **attributes: Any,
    ) -> Graft:
        """Make a graft of all entries that differ, bit for bit or by more than a threshold.

        Of weights that are tied in `pre`, which a state dict has under each of their names, the first name
        is grafted. Tensors of integers must be the same.

        Args:
            pre, ft: tensors by name on one device, the base's and the fine-tuned ones, of one dtype each.
            threshold: as for `ek.sparse_diff`.
            **attributes: of the graft.

        Raises:
            EngramError: a tensor is missing or of another shape or type, weights that are tied in `pre`
                differ in `ft`, or nothing differs.

        Example:
            >>> graft = Graft.from_difference(base.state_dict(), tuned.state_dict())
        """
        pre, ft = without_wrappers(pre), by_inner_name(ft)
        _check_alike(pre, ft)
        pre = {name: tensor for name, tensor in _tied_once(pre, ft).items() if tensor.is_floating_point()}
        found = sparse_diff([pre[name] for name in pre], [ft[name] for name in pre], threshold)
        entries = {
            name: (at.cpu(), value.cpu()) for name, at, value in zip(pre, *found, strict=True) if at.numel()
        }
        if not entries:
            raise EngramError("ft: expected tensors that differ from pre's, got the same")
        indices, values = ({name: entry[i] for name, entry in entries.items()} for i in range(2))
        return cls.from_entries(pre, indices, values, **attributes)

    def masks(self) -> dict[str, Tensor]:
        """The packed masks of the graft's positions, by name of every graftable parameter.

        Returns:
            What `from_masks` was given: `[⌈entries / 8⌉]`, uint8, as `ek.unpack_mask` and
            `ek.graft_blend_packed` take them.
        """
        masks = {}
        for name, shape in self.shapes.items():
            mask = torch.zeros(_count(shape), dtype=torch.bool, device="cpu")
            if name in self.indices:
                mask[self.indices[name].long()] = True
            masks[name] = pack_mask(mask)
        return masks

    @property
    def size(self) -> int:
        """The number of weights that the graft sets."""
        return sum(at.numel() for at in self.indices.values())

    @property
    def sparsity(self) -> float:
        """That number as a share of the graftable weights: 1e-4 is 0.01 %."""
        return self.size / max(1, sum(map(_count, self.shapes.values())))

    def __repr__(self) -> str:
        total = sum(map(_count, self.shapes.values()))
        return (
            f"Graft({self.size:,} of {total:,} weights ({percent(self.sparsity)}) in {len(self.indices)} of "
            f"{len(self.shapes)} parameters,\n      base {self.base_model!r}, "
            f"recipe {self.recipe.get('name')!r})"
        )

    def apply(self, model: nn.Module, force: bool = False) -> AppliedGraft:
        """Write the values into a model; what is returned takes them back, bit for bit.

        Args:
            model: the base that the graft was made for.
            force: write even if its weights are others; values are rounded to the model's dtype then.

        Returns:
            The applied graft: `revert()` it, or use it as a context manager, or leave it in. It holds on to
            the model's tensors: revert it before the model is moved or converted.

        Raises:
            TypeError: `model` is none.
            EngramError: the model lacks a parameter, or its weights are not the base's; it is unchanged.
        """
        applied = AppliedGraft(model, self, force)
        applied.write()
        return applied

    def merge_and_unload(self, model: nn.Module, force: bool = False) -> nn.Module:
        """Write the values into a model for good, and return the model.

        Raises:
            TypeError, EngramError: as `apply`.
        """
        self.apply(model, force)
        return model

    def refit(
        self,
        model: nn.Module,
        batches: Iterable,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        steps: int = 100,
        lr: float | None = None,
        progress: Progress | None = None,
    ) -> Graft:
        """Train the values, and let the positions be: `min over v of loss(weight[indices] = v)`.

        Fine-tuned values belong to a whole that a graft has not: where few weights are set, other values do
        more. Adam in fp32, from the graft's values on, its learning rate falling to 0 in a line. Gradients
        are freed as they come in the backward pass but for the graft's positions.

        Args:
            model: the base that the graft was made for; it is given back as it was, after errors too.
            batches, loss_fn: as for `localize`. For several skills in one graft: batches of each by turns.
            steps: of Adam, one batch each.
            lr: Adam's learning rate at the start: about what each value moves in a step. Default: 0.01, or
                `0.3 / √k` of k values where that is less, so that they move by 0.3 together at most.
            progress: called as `progress("refit", steps done, steps)` after every step.

        Returns:
            A new graft. Its recipe says `refit`; its metrics hold the first and the last step's loss.

        Raises:
            ValueError, TypeError: an argument that cannot be used.
            EngramError: the model is not the graft's base, no batch, a loss or gradients that are not finite.

        Example:
            >>> graft = localize(base, tuned, loader, sparsity=1e-5).refit(base, loader)
            >>> both = Graft.merge([sentiment, questions]).refit(base, loader_of_both)

        Source: Ansell et al. 2022 (arXiv 2110.07560), who begin at the base's values.
        """
        check.integer("steps", steps, at_least=1)
        check.expect(self.size > 0, "indices", "positions, whose values are refitted", "none")
        lr = min(1e-2, 0.3 * self.size**-0.5) if lr is None else lr
        check.number("lr", lr, above=0)
        values, losses = refit(model, self, batches, loss_fn, steps, lr, progress)
        kept = {key: value for key, value in self.metrics.items() if key == "changed_outside"}
        return replace(
            self,
            values=values,
            recipe=self.recipe | {"refit": {"steps": steps, "lr": lr}},
            metrics=kept | {"first_loss": losses[0], "last_loss": losses[-1]},
        )

    def density(self) -> list[Density]:
        """Entries by layer and kind of module, in the model's order; layer −1 for what is in no layer."""
        table: dict[tuple[int, str], list[int]] = {}
        for name, shape in self.shapes.items():
            row = table.setdefault(layer_and_kind(name), [0, 0])
            row[0] += self.indices[name].numel() if name in self.indices else 0
            row[1] += _count(shape)
        return [Density(layer, kind, entries, size) for (layer, kind), (entries, size) in table.items()]

    def overlap(self, other: Graft) -> Overlap:
        """Count the positions that both grafts set."""
        check.expect(isinstance(other, Graft), "other", "a Graft", type(other).__name__, TypeError)
        shared = sum(
            int(torch.isin(at, other.indices[name], assume_unique=True).sum())
            for name, at in self.indices.items()
            if name in other.indices
        )
        either = self.size + other.size - shared
        return Overlap(shared, self.size, other.size, shared / either if either else 0.0)

    @classmethod
    def merge(
        cls,
        grafts: Iterable[Graft],
        method: str = "average",
        base: nn.Module | Mapping[str, Tensor] | str | os.PathLike | None = None,
        weights: Sequence[float] | None = None,
        density: float = 1.0,
        scale: float = 1.0,
        seed: int = 0,
        **options: Any,
    ) -> Graft:
        """Make one graft of several of one base.

        Args:
            grafts: at least one.
            method: what is set where several grafts set one position: "average", the mean of their values
                (taken in fp32, rounded once); "first", the value of the first graft that sets it; or, by
                their changes from the base, a method of `join_state_dicts`, such as "ties". A tensor's
                entries are then the positions that any of the grafts sets.
            base: the model that they were made for, or its tensors; for the methods by changes alone.
            weights: one a graft, for these methods. Default: 1 each.
            density, scale, seed, **options: of `join_state_dicts`.

        Returns:
            A new graft, without metrics.

        Raises:
            TypeError: something else than grafts.
            ValueError: no graft, an unknown method, a base where none is used or none where one is.
            EngramError: the grafts were made for different bases, or another one, or nothing is left.

        Example:
            >>> both = Graft.merge([sentiment, questions])
            >>> both = Graft.merge([sentiment, questions], "ties", base=model)
        """
        check_method(method)
        several = isinstance(grafts, Iterable)
        check.expect(several, "grafts", "a list of grafts", type(grafts).__name__, TypeError)
        grafts = list(grafts)
        check.expect(len(grafts) > 0, "grafts", "at least one", "none")
        for graft in grafts:
            check.expect(isinstance(graft, Graft), "grafts", "grafts", type(graft).__name__, TypeError)
        shapes, checksums = common_base(grafts)
        recipe: dict[str, Any] = {"name": "merge", "method": method, "merged": [x.recipe for x in grafts]}
        if method in RULES:
            asked = base is not None or weights is not None or (density, scale) != (1, 1) or options
            check.expect(not asked, "method", "one by changes from a base, for these arguments", repr(method))
            indices, values = by_rule(grafts, method)
        else:
            check.expect(base is not None, "base", f"the grafts' base, for {method!r}", "None")
            given = tuple(weights) if weights is not None else (1.0,) * len(grafts)
            check.expect(len(given) == len(grafts), "weights", f"{len(grafts)} numbers", len(given))
            chosen = Options(given, density, scale, **options)
            names = list(dict.fromkeys(name for graft in grafts for name in graft.indices))
            tensors = tensors_of(base, names, "base")
            indices, values = by_method(grafts, tensors, checksums, method, chosen, seed)
            recipe |= {"weights": list(given), "density": density, "scale": scale, "seed": seed, **options}
        first = grafts[0]
        return cls(indices, values, shapes, checksums, first.base_model, first.base_revision, recipe)

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for name, at in self.indices.items():
            tensors |= {f"{name}.indices": at, f"{name}.values": self.values[name]}
        config = {
            "base_model": self.base_model,
            "base_revision": self.base_revision,
            "entries": self.size,
            "sparsity": self.sparsity,
            "recipe": self.recipe,
            "metrics": self.metrics,
            "parameters": {
                name: {"shape": list(shape), "base_checksum": self.checksums[name]}
                for name, shape in self.shapes.items()
            },
        }
        try:
            write_files(save_directory, config, tensors)
        except ValueError as error:
            raise ValueError(
                f"metrics: expected finite numbers, texts, lists and mappings, got others ({error})"
            ) from error

    @classmethod
    def _read_folder(cls, folder: Path) -> Graft:  # type: ignore[override]
        from safetensors import SafetensorError

        try:
            config, tensors = read_files(folder)
            names = [key.removesuffix(".indices") for key in tensors if key.endswith(".indices")]
            parameters = config["parameters"]
            return cls(
                indices={name: tensors[f"{name}.indices"] for name in names},
                values={name: tensors[f"{name}.values"] for name in names},
                shapes={name: tuple(entry["shape"]) for name, entry in parameters.items()},
                checksums={name: entry["base_checksum"] for name, entry in parameters.items()},
                **{key: config[key] for key in ("base_model", "base_revision", "recipe", "metrics")},
            )
        except (OSError, KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
            raise EngramError(
                f"name_or_directory: expected a saved graft, got {str(folder)!r} ({error})"
            ) from error


def _check_alike(pre: Mapping[str, Tensor], ft: Mapping[str, Tensor]) -> None:
    """Name the tensor of `ft` that is missing, of another shape or type, or a counter that differs."""
    for name, tensor in pre.items():
        if name not in ft:
            raise EngramError(f"ft: expected a tensor {name!r}, got none of that name")
        expected, got = (f"{list(x.shape)} of {x.dtype}" for x in (tensor, ft[name]))
        if expected != got:
            raise EngramError(f"ft: expected {expected} in {name!r}, got {got}")
        if not (tensor.is_floating_point() or torch.equal(tensor, ft[name])):
            raise EngramError(
                f"ft: expected in {name!r}, which holds {tensor.dtype}, what pre has, got others"
            )


def _tied_once(pre: Mapping[str, Tensor], ft: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor of `pre` once, where those of `ft` under its other names are the same."""
    firsts = first_names(pre)
    for name, first in firsts.items():
        if name != first and not _same_bits(ft[name].detach().flatten(), ft[first].detach().flatten()):
            raise EngramError(
                f"ft: expected one tensor as {first!r} and as {name!r}, which are tied in pre, got two: "
                "untie them in pre too"
            )
    return {name: pre[name] for name in dict.fromkeys(firsts.values())}


def _same_bits(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def _count(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()

"""Argument checks that word their errors alike: the argument, what was expected, what came."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def expect(
    condition: bool, name: str, expected: str, got: object, error: type[Exception] = ValueError
) -> None:
    """Raise `error` unless `condition` holds."""
    if not condition:
        raise error(f"{name}: expected {expected}, got {got}")


def excerpt(text: str, most: int = 60) -> str:
    """A text as an error shows it: as Python writes it, its beginning where it is long."""
    return repr(text if len(text) <= most else f"{text[:most]}…")


def several(name: str, texts: object) -> None:
    """Check that texts do not come as one text, which would be taken letter by letter."""
    expect(not isinstance(texts, str), name, "a list of texts", "one text", TypeError)


def number(name: str, value: object, at_least: float = -math.inf, above: float = -math.inf) -> None:
    """Check that a value is a finite number, and not under a bound."""
    if type(value) is not float:
        # A symbol while code is traced.
        known = isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
        expect(known, name, "a number", type(value).__name__, TypeError)
    if not (-math.inf < value < math.inf and value >= at_least and value > above):
        bound = f" of at least {at_least:g}" if at_least > -math.inf else ""
        bound = f" above {above:g}" if above > -math.inf else bound
        raise ValueError(f"{name}: expected a finite number{bound}, got {value}")


def integer(name: str, value: object, at_least: int | None = None) -> None:
    """Check that a value is an integer, and not under a bound; True and False are none."""
    is_integer = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    expect(is_integer, name, "an integer", type(value).__name__, TypeError)
    expect(at_least is None or value >= at_least, name, f"at least {at_least}", value)


def shape(name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Check a tensor's whole shape; `meaning` names its dimensions, such as "[n, in]"."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)} ({meaning}), got {list(tensor.shape)}")


def dimensions(name: str, tensor: Tensor, meaning: str) -> None:
    """Check the number of a tensor's dimensions; `meaning` names them, such as "[n, in]"."""
    if tensor.dim() != meaning.count(",") + 1:
        raise ValueError(f"{name}: expected shape {meaning}, got {list(tensor.shape)}")


def tensor(name: str, value: object, dtypes: Sequence[torch.dtype]) -> None:
    """Check that a value is a tensor of one of the dtypes."""
    if not (isinstance(value, Tensor) and value.dtype in dtypes):
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        got = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a tensor of {names}, got {got}")


def floating(name: str, value: object, dtypes: Sequence[torch.dtype] = WEIGHT_DTYPES) -> None:
    """Check that a value is a tensor, and of one of the floating dtypes."""
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        expect(isinstance(value, Tensor), name, "a tensor", type(value).__name__, TypeError)
        tensor(name, value, dtypes)


def same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Check that a tensor lies where the first argument lies."""
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")


def no_overlap(name: str, tensor: Tensor) -> None:
    """Check that no two indices name one element: writing to such a tensor has no meaning."""
    # Compiled code calls the operator, which looks again, at numbers and not at symbols.
    if tensor.is_contiguous() or torch.compiler.is_compiling():
        return
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                raise ValueError(
                    f"{name}: expected elements that do not overlap, got strides {tensor.stride()}"
                )
            reach = stride * size


def span(tensor: Tensor) -> tuple[int, int]:
    """Return the address of a tensor's first byte, and the one behind its last."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    if tensor.numel() == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def own_memory(written: Tensor, **tensors: Tensor) -> None:
    """Check that no tensor reaches into the memory that is about to be written."""
    first, last = span(written)
    for name, tensor in tensors.items():
        begin, end = span(tensor)
        if begin < last and first < end:
            expect(False, name, "memory of its own", "a view of the tensor to be written")


def is_finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite, without a mask as large as the tensor."""
    if tensor.numel() == 0:
        return True
    wide = torch.promote_types(tensor.dtype, torch.float32)
    if math.isfinite(tensor.sum(dtype=wide).item()):
        return True
    low, high = torch.aminmax(tensor)  # finite entries may overflow a sum; both ends carry any NaN
    return -math.inf < low.item() <= high.item() < math.inf


def not_finite(*tensors: Tensor) -> Tensor:
    """Return on the device, without a wait, whether an entry of a tensor is NaN or infinite."""
    # The largest size is NaN where an entry is.
    sizes = [torch.linalg.vector_norm(x, math.inf) for x in tensors if x.numel()]
    if not sizes:
        return torch.zeros((), dtype=torch.bool, device=tensors[0].device)
    largest = sizes[0]
    for size in sizes[1:]:
        largest = torch.maximum(largest, size)
    return (largest < math.inf).logical_not_()


def finite(name: str, tensor: Tensor) -> None:
    """Check that no entry is NaN or infinite."""
    if not is_finite(tensor):
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        raise ValueError(f"{name}: expected finite values, got {bad} NaN or infinite of {tensor.numel()}")

"""The memory of the device: CPU tensors that a backend's function takes or makes.

Inside `device_memory` a tensor's data_ptr() is a device address of its own, far from all others: an access
that leaves the tensor is seen. What torch.empty gives holds nothing until a kernel or an operator of torch
writes it.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .library import Machine

_ALLOCATIONS = {
    getattr(packet, overload)
    for packet in (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided,
                   torch.ops.aten.new_empty, torch.ops.aten.new_empty_strided)
    for overload in packet.overloads()
}  # fmt: skip
_host_address = torch.Tensor.data_ptr


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor begins on the host, and how many bytes lie from there to its last entry's end."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _host_address(tensor), (steps + 1) * tensor.element_size() if tensor.numel() else 0


class _Definedness(TorchDispatchMode):
    """Tells the machine which memory torch's operators allocate, and which they write."""

    def __init__(self, machine: Machine):
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = function(*args, **kwargs)
        schema = function._schema
        mark = self.machine.undefine if function in _ALLOCATIONS else self.machine.define
        returned = results if isinstance(results, tuple | list) and len(schema.returns) > 1 else [results]
        for declared, result in zip(schema.returns, returned, strict=True):
            if declared.alias_info is None:  # memory that was free before, and no view
                self._mark(mark, result)
        for i, declared in enumerate(schema.arguments):
            if declared.alias_info is not None and declared.alias_info.is_write:
                self._mark(self.machine.define, args[i] if i < len(args) else kwargs.get(declared.name))
        return results

    @staticmethod
    def _mark(mark, values) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                mark(*_place(tensor))


class Addresses:
    """Where tensors lie on the device, for blocks that share them: until `release`."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.of: dict[tuple[int, int], int] = {}
        self.kept: list[torch.Tensor] = []  # nothing is freed inside: another tensor could get its place

    def release(self) -> None:
        for address in self.of.values():
            self.machine.unmap(address)
        self.of.clear()


@contextlib.contextmanager
def device_memory(machine: Machine, shared: Addresses | None = None):
    """Make CPU tensors the device's memory inside the block, at addresses of its own or at shared ones."""
    own = Addresses(machine) if shared is None else shared
    addresses, kept = own.of, own.kept

    def device_address(tensor: torch.Tensor) -> int:
        place = _place(tensor)
        if not place[1]:
            return 0
        if place not in addresses:
            kept.append(tensor)
            name = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            addresses[place] = machine.map(*place, name)
        return addresses[place]

    torch.Tensor.data_ptr = device_address
    try:
        with _Definedness(machine):
            yield
    finally:
        torch.Tensor.data_ptr = _host_address
        if shared is None:
            own.release()
        machine.define_all()

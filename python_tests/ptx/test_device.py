"""GPUs that the CUDA kernels were not compiled for, or of which a call has a part: another backend serves."""

import pytest

from . import child

REASON = child.missing()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

START = """
import warnings
import torch
from ptx.plugin import start
machine = start()
import engram_kernels as ek
from engram_kernels import backends
warnings.simplefilter("always")
"""
OTHER_GPU = """
machine.set_device("A100", 4)
torch.cuda.get_device_capability = lambda device=None: (8, 0)
mask = torch.arange(100) % 3 == 0
with warnings.catch_warnings(record=True) as warned, ek.use_backend("cuda"):
    packed = [ek.pack_mask(mask) for _ in range(3)]
    (_, refused), (served, _) = backends.explain("pack_mask", "cpu", (mask,))
with ek.use_backend("torch"):
    assert all(torch.equal(p, ek.pack_mask(mask)) for p in packed)
assert served == "torch"
print(len(warned), warned[0].message, refused, sep="|")
"""
PART = """
torch.manual_seed(0)
call = torch.eye(200), torch.randn(200, 120), torch.randn(5, 200) / 200**0.5, torch.randn(5, 120)
with warnings.catch_warnings(record=True) as warned, ek.use_backend("cuda"):
    results = [ek.memory_stream(*call) for _ in range(3)]
with ek.use_backend("torch"):
    truth = ek.memory_stream(*call)
for result in results:
    assert all(torch.equal(*pair) for pair in zip(result, truth))
print(len(warned), warned[0].message, sep="|")
"""


def test_a_gpu_without_a_kernel_is_declined_with_one_warning():
    count, warned, refused = child.run("-c", START + OTHER_GPU, PTX_DEVICE="H100:4").strip().split("|")
    reason = "the module _cuda, built for sm_90, runs no kernel on cuda:-1, sm_80: no kernel image"
    assert count == "1" and refused.startswith(reason)
    assert warned == f"{refused}. Other backends serve there; ENGRAM_CUDA_ARCHS=80 builds the module for it."


def test_a_part_of_a_gpu_that_refuses_a_cooperative_launch_is_served_by_the_reference():
    printed = child.run("-c", START + PART, PTX_DEVICE="A100:4", PTX_OPTIONS="partition=2")
    count, warned = printed.strip().split("|")
    assert count == "1" and warned.startswith("memory_stream: this part of the GPU")

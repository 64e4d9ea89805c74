"""torch.library.opcheck of every operator: schemas tell the truth, fakes match, tracing works."""

import pytest
import test_graft
import test_low_rank
import test_memory
import torch

from engram_kernels._ops import OPERATORS, ops

FAMILIES = (test_low_rank, test_graft, test_memory)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_keeps_its_promises_to_torch(name):
    torch.manual_seed(0)
    (args,) = (calls[name] for family in FAMILIES if name in (calls := family.operator_calls()))
    torch.library.opcheck(getattr(ops, name).default, args)

"""torch.library.opcheck of every operator: schemas tell the truth, fakes match, tracing works."""

import pytest
import torch
from operator_calls import operator_calls

from engram_kernels.ops.define import OPERATORS, ops


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_keeps_its_promises_to_torch(name):
    torch.manual_seed(0)
    torch.library.opcheck(getattr(ops, name).default, operator_calls()[name])

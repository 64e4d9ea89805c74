"""torch.library.opcheck of every operator: schemas tell the truth, fakes match, tracing works."""

import pytest
import torch
from operator_calls import operator_calls

from engram_kernels.ops.define import OPERATORS, ops


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_keeps_its_promises_to_torch(name):
    torch.manual_seed(0)
    torch.library.opcheck(getattr(ops, name).default, operator_calls()[name])
    assert {torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides} <= set(
        getattr(ops, name).default.tags
    )


def test_what_a_cuda_graph_does_not_keep_is_tagged():
    unsafe = {name for name in OPERATORS if torch.Tag.cudagraph_unsafe in getattr(ops, name).default.tags}
    assert unsafe == {"_foreach_graft_blend_", "graft_mask_step_", "sparse_diff"}
    assert torch.Tag.dynamic_output_shape in ops.sparse_diff.default.tags

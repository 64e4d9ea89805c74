"""Faults that are put into the PTX of every kernel are found: a test that finds none proves nothing."""

import os

import pytest

from . import child

REASON = child.missing()


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_every_kind_of_fault_is_caught_in_every_kernel():
    each = 16 if os.environ.get("PTX") == "all" else 3
    print(child.run("-m", "ptx.faults", "--each", each))

"""The machine that kernels written by hand run on."""

import pytest

from .handwritten import Handwritten


@pytest.fixture(scope="session")
def handwritten():
    return Handwritten()


@pytest.fixture
def ptx(handwritten):
    """The machine with its defaults, on which all memory is defined."""
    handwritten.defaults()
    yield handwritten
    handwritten.machine.define_all()

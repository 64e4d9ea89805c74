"""A tokenizer and the cases of every layout, for all tests of evaluation."""

import pytest
from evaluation_helpers import ALL, written
from model_zoo import byte_level_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return written(tmp_path_factory.mktemp("rows") / "all.json", ALL, zsre="easyedit")

"""What two ranks do together: one program runs all cases, as its start takes longer than each of them."""

import json
import sys

import child
import pytest

pytest.importorskip("transformers")

from distributed.cases import CASES

RANKS = 2
RUN = "import runpy, sys; sys.argv[0] = 'cases'; runpy.run_module('distributed.cases', run_name='__main__')"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        # More threads would wait for each other.
        patch.setenv("OMP_NUM_THREADS", "1")
        processes = [child.start(RUN, folder, rank, RANKS) for rank in range(RANKS)]
    for process in processes:
        _, errors = process.communicate(timeout=600)
        sys.stderr.write(errors)
    return folder


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
@pytest.mark.parametrize("rank", range(RANKS))
def test_case(folder, case, rank):
    outcome = folder / f"{case} {rank}.json"
    assert outcome.exists(), "its rank ended before"
    failure = json.loads(outcome.read_text())
    assert not failure, failure

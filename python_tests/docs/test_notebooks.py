"""The notebooks run from the first cell to the last, and are kept with small outputs."""

import importlib.util
import json
import os

import pytest
from documents import ROOT

FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_as_it_ran_and_small(name):
    path = FOLDER / f"{name}.ipynb"
    cells = [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and all(output["output_type"] != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    assert path.stat().st_size < 150_000


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    pytest.importorskip("nbclient", reason="nbclient is in requirements/docs.txt: make docs runs this")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    runner.run(FOLDER / f"{name}.ipynb", tmp_path)

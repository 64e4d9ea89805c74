"""Run the notebooks, and keep what they print: `make notebooks`, or `python docs/notebooks/run.py NAME …`."""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Execute a notebook from scratch, with `folder` for what it writes; an error in a cell is raised."""
    notebook = nbformat.read(path, as_version=4)
    (folder / "docs").mkdir()
    # As from docs/notebooks, with the pages one folder up, and no file left there.
    for page in FOLDER.parent.glob("*.md"):
        (folder / "docs" / page.name).symlink_to(page)
    (folder / "docs" / "notebooks").mkdir()
    resources = {"metadata": {"path": str(folder / "docs" / "notebooks")}}
    settings = {"timeout": 1800, "kernel_name": "python3", "coalesce_streams": True}
    NotebookClient(notebook, resources=resources, **settings).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if "outputs" in cell:  # without what libraries warn of
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", ()):
            output.get("metadata", {}).clear()
    return notebook


def main(names: list[str]) -> None:
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            with tempfile.TemporaryDirectory() as folder:
                nbformat.write(run(path, Path(folder)), path)
            print(f"{path.name}: {path.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])

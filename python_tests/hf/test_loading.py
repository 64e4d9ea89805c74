"""What is imported before a model is loaded keeps quiet."""

import subprocess
import sys
from pathlib import Path

import pytest

LOUD = """
import logging, sys, warnings
print("printed")
print("printed to stderr", file=sys.stderr)
warnings.warn("warned", FutureWarning)
logging.getLogger("torchao").warning("logged")
"""
# As transformers does: models are imported when they are asked for, and with them what quantised ones need.
LAZY = """
def __getattr__(name):
    if name == "PreTrainedModel":
        import torchao
        return torchao
    raise AttributeError(name)
"""


def run(folder, script, **packages):
    for name, source in packages.items():
        (folder / f"{name}.py").write_text(source)
    root = str(Path(__file__).parents[2])
    # The fakes come before what is installed.
    start = f"import sys\nsys.path[:0] = [{str(folder)!r}, {root!r}]\nfrom engram_kernels.hf import loading\n"
    return subprocess.run([sys.executable, "-c", start + script], capture_output=True, text=True, check=False)


def test_packages_that_transformers_imports_are_not_heard(tmp_path):
    script = """
import logging, warnings
assert loading.import_transformers().__name__ == "transformers" and "torchao" in sys.modules
print("own")
warnings.warn("ours", FutureWarning)
logging.getLogger("ours").warning("logged by us")
"""
    done = run(tmp_path, script, transformers=LAZY, torchao=LOUD)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "own\n"
    assert "FutureWarning: ours" in done.stderr and "logged by us" in done.stderr
    assert not any(word in done.stderr for word in ("printed", "warned", "torchao"))


@pytest.mark.parametrize(
    ("transformers", "error"),
    [
        ("raise ImportError('none')", "EngramError: this needs transformers: pip install"),
        (LAZY, "ImportError: torchao is broken"),
    ],
)
def test_errors_are_heard(tmp_path, transformers, error):
    done = run(
        tmp_path,
        "loading.import_transformers()",
        transformers=transformers,
        torchao="raise ImportError('torchao is broken')",
    )
    assert done.returncode == 1 and error in done.stderr.splitlines()[-1]

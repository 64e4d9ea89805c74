"""What the Hub's kernel loader asks of a package: it is imported by a path, under another name, and twice."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import engram_kernels as ek
from engram_kernels._namespace import NAMESPACE
from engram_kernels.ops.define import OPERATORS

PACKAGE = Path(ek.__file__).parent
SOURCES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
# The operators and what they stand on: what a kernel for the Hub would carry.
OPERATOR_PARTS = ("_namespace", "_checks", "_linalg", "errors", "backends", "ops")

# Loads a copy the way the loader does, with nothing to be found under the package's own name.
LOAD = """
import importlib, importlib.util, json, pkgutil, sys
from pathlib import Path
import torch
def load(name, folder):
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
sys.modules["engram_kernels"] = None
folder = sys.argv[1]
"""


def run(program: str) -> str:
    command = [sys.executable, "-c", LOAD + program, str(PACKAGE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_imports_within_the_package_are_relative():
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module)
            assert not any(name.split(".")[0] == "engram_kernels" for name in names), f"{path}:{node.lineno}"


def test_the_namespace_of_the_operators_is_said_once():
    assert NAMESPACE == "engram_kernels"
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(
                ("torch.ops", "torch.library")
            ):
                assert path == "ops/define.py", where
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "engram_kernels::" not in node.value, where
    defining = ast.unparse(SOURCES["ops/define.py"])
    assert "engram_kernels" not in defining and "NAMESPACE" in defining


def test_operators_import_torch_and_triton_alone():
    for path, tree in SOURCES.items():
        if path.split("/")[0].removesuffix(".py") not in OPERATOR_PARTS:
            continue
        for node in ast.walk(tree):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module)
            for name in names:
                known = {*sys.stdlib_module_names, "torch", "triton"}
                assert name.split(".")[0] in known, f"{path}:{node.lineno}"


def test_a_copy_under_another_name_is_whole():
    """Every module imports, and none asks for the package by its own name."""
    program = """
kernel = load("engram_kernels_0123abc", folder)
kernel.backends()  # these import what can run here
for module in pkgutil.walk_packages(kernel.__path__, kernel.__name__ + "."):
    if ".backends." not in module.name and not module.name.endswith(("_cpu", "_cuda")):
        importlib.import_module(module.name)
print(sum(name.startswith(kernel.__name__ + ".") for name in sys.modules))
"""
    assert int(run(program)) > 60


def test_two_copies_in_one_process_do_not_meet():
    program = """
one, two = load("engram_kernels_0123abc", folder), load("engram_kernels_4567def", folder)
left, right = torch.arange(8.0).view(4, 2), torch.arange(6.0).view(2, 3)
found = []
for kernel in (one, two):
    with kernel.use_backend("torch"):
        weight = torch.ones(4, 3)
        kernel.apply_low_rank_(weight, left, right)
    namespace = getattr(torch.ops, kernel.__name__)
    again = torch.ones(4, 3)
    torch.compile(kernel.apply_low_rank_, fullgraph=True, backend="eager")(again, left, right)
    assert weight.equal(1 + left @ right) and again.equal(weight)
    found.append([name for name in kernel.ops.define.OPERATORS if hasattr(namespace, name)])
assert one.EngramError is not two.EngramError
assert one.backends()["cpu"] == two.backends()["cpu"]
assert not hasattr(torch.ops.engram_kernels, "apply_low_rank_")
print(json.dumps(found))
"""
    assert json.loads(run(program)) == [OPERATORS, OPERATORS]


def test_kernels_in_c_know_nothing_of_torch():
    sources = sorted((Path(__file__).parents[2] / "csrc").rglob("*.*"))
    assert len(sources) > 20
    for path in sources:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.lstrip().startswith("#include"):
                assert not any(name in line for name in ("torch", "ATen", "c10")), f"{path.name}: {line}"

"""What the example in a public docstring calls can be imported by who reads it."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import engram_kernels as ek

PARTS = ("editing", "evaluation", "grafting", "integrations", "larimar", "layers", "memory", "tracing")
MODULES = [ek, *(importlib.import_module(f"engram_kernels.{part}") for part in PARTS)]
EXPORTED = {name for module in MODULES for name in module.__all__}
OWN = {
    node.name
    for path in Path(ek.__file__).parent.rglob("*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
}


def examples() -> Iterator[tuple[str, str]]:
    """Of every public function, class and method: its name, and the code of its examples."""
    for module in MODULES:
        for name in module.__all__:
            found = getattr(module, name)
            parts = {name: found}
            if inspect.isclass(found):
                parts |= {f"{name}.{part}": value for part, value in vars(found).items() if part[0] != "_"}
            for part, value in parts.items():
                lines = map(str.strip, (inspect.getdoc(value) or "").splitlines())
                code = [line[4:] for line in lines if line.startswith((">>> ", "... "))]
                if code:
                    yield part, "\n".join(code)


def test_examples_call_what_is_exported():
    found = list(examples())
    assert len(found) > 50
    for name, code in found:
        tree = ast.parse(code)
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        called = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert (called & OWN) - made <= EXPORTED, name

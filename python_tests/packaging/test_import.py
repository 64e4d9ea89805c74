"""What `import engram_kernels as ek` gives: the operators at once, the systems at their first use."""

import subprocess
import sys

import pytest

import engram_kernels as ek
from engram_kernels import ops

SYSTEMS = (
    "editing",
    "evaluation",
    "grafting",
    "hf",
    "integrations",
    "larimar",
    "layers",
    "memory",
    "tracing",
)


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_needs_no_import_of_its_own(system):
    assert run(f"import engram_kernels as ek; print(ek.{system}.__name__)") == f"engram_kernels.{system}"


def test_the_import_brings_neither_a_system_nor_transformers():
    program = "import sys, engram_kernels as ek; print(*sys.modules)"
    loaded = set(run(program).split())
    assert "engram_kernels.ops" in loaded
    assert not loaded & {f"engram_kernels.{system}" for system in SYSTEMS}
    assert not loaded & {"transformers", "safetensors", "huggingface_hub", "typer", "rich", "matplotlib"}


def test_every_public_operator_is_exported_without_being_named():
    assert set(ops.__all__) < set(ek.__all__)
    assert all(getattr(ek, name) is getattr(ops, name) for name in ops.__all__)


def test_dir_names_the_systems_and_an_unknown_name_is_an_attribute_error():
    assert {name for name in dir(ek) if not name.startswith("__")} == {*ek.__all__, *SYSTEMS, "ops"}
    assert set(ek.larimar.__all__) <= set(dir(ek.larimar))
    with pytest.raises(AttributeError, match="module 'engram_kernels' has no attribute 'nothing'"):
        ek.nothing  # noqa: B018

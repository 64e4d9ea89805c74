"""The kernel for the Hugging Face Hub, as `make hub-kernel` lays it out."""

import ast
import base64
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import engram_kernels as ek

RELEASE = Path(__file__).parents[2] / "release"
VARIANTS = ("torch-cpu", "torch-cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    command = [sys.executable, str(RELEASE / "hub.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def kernels():
    return pytest.importorskip("kernels", reason="the package kernels is not installed")


@pytest.fixture(scope="module")
def kernel(kernels, folder, tmp_path_factory):
    # A copy, as the interpreter leaves bytecode in what it loads.
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("hub") / "copy")
    return kernels.get_local_kernel(copy, backend="cpu")


def test_sources_import_torch_and_triton_alone(folder):
    """But for safetensors, by which a Covariance is saved, in the functions that save and load it."""
    known = {*sys.stdlib_module_names, "torch", "triton"}
    sources = sorted((folder / "build" / "torch-cpu").rglob("*.py"))
    assert len(sources) > 40
    for path in sources:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {
            id(node)
            for outer in ast.walk(tree)
            if isinstance(outer, ast.FunctionDef)
            for node in ast.walk(outer)
        }
        for node in ast.walk(tree):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module)
            for name in names:
                allowed = known | {"safetensors"} if id(node) in inner else known
                assert name.split(".")[0] in allowed, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_metadata(folder, variant):
    built = folder / "build" / variant
    metadata = json.loads((built / "metadata.json").read_text())
    assert metadata["id"].isidentifier() and metadata["name"] == "engram-kernels"
    assert metadata["backend"] == {"type": variant.removeprefix("torch-")}
    files = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    assert files == {*metadata["digest"]["files"], "metadata.json"}
    for name, digest in metadata["digest"]["files"].items():
        assert base64.b64decode(digest) == hashlib.sha256((built / name).read_bytes()).digest()


def test_variants_are_registered_apart(folder):
    names = [
        json.loads((folder / "build" / variant / "metadata.json").read_text())["id"] for variant in VARIANTS
    ]
    assert len(set(names)) == 2


def test_card(folder):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    assert f"`engram_kernels` {ek.__version__}," in card and "{functions}" not in card
    for name in ek.ops.__all__:
        assert f"| `{name}` |" in card


def test_the_card_s_program_runs(kernel, folder):
    program = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    program = program.replace("from kernels import get_kernel\n", "")
    lines = [line for line in program.splitlines() if not line.startswith("ek = ")]
    torch.manual_seed(0)
    exec("\n".join(lines), {"ek": kernel})


def test_the_loader_takes_it(kernels, kernel, folder):
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    for variant in VARIANTS:
        built = folder / "build" / variant
        metadata = Metadata.read_from_file(built / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, built))
    assert kernel.__name__ != "engram_kernels"
    assert sorted(kernel.__all__) == sorted(
        ["Covariance", "EngramError", "backends", "use_backend", *ek.ops.__all__]
    )
    assert set(dir(getattr(torch.ops, kernel.__name__))) >= {"apply_low_rank_", "graft_blend"}


def test_the_kernel_is_the_package_s_reference(kernel):
    torch.manual_seed(0)
    weight, key, value = torch.randn(24, 40), torch.randn(3, 40), torch.randn(3, 24)
    inverse = torch.eye(40)
    with ek.use_backend("torch"):
        expected = ek.low_rank_update(weight, key, value, inverse_covariance=inverse, mode="joint")
    assert kernel.low_rank_update(weight, key, value, inverse_covariance=inverse, mode="joint").equal(
        expected
    )
    compiled = torch.compile(kernel.apply_low_rank_, fullgraph=True, backend="eager")
    left, right = torch.randn(24, 2), torch.randn(2, 40)
    torch.testing.assert_close(compiled(weight.clone(), left, right), weight + left @ right)


@pytest.mark.parametrize("name", ["LowRank.apply", "Graft.blend", "Memory.stream"])
def test_benchmarks_are_verified(kernel, folder, name):
    spec = importlib.util.spec_from_file_location("benchmark", folder / "benchmarks" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind, workload = name.split(".")
    case = getattr(module, kind)()
    case.kernel = kernel
    torch.manual_seed(case.seed)
    case.setup()
    getattr(case, f"benchmark_{workload}")()
    torch.testing.assert_close(case.out, getattr(case, f"verify_{workload}")(), rtol=1e-3, atol=1e-3)

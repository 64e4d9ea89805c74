"""The build: what is in the modules and the sdist, and what a failing build says."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import engram_kernels as ek

ROOT = Path(__file__).parents[2]


def setup_py(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env={**os.environ, "ENGRAM_CPU": "auto", "ENGRAM_CUDA": "off", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of what the build needs."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text("")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "engram_kernels").mkdir()
    shutil.copy(ek.__file__, tmp_path / "engram_kernels")  # of an installed wheel the tree has no package
    return tmp_path


def test_cpu_module():
    cpu = pytest.importorskip("engram_kernels._cpu", exc_type=ImportError)
    info = cpu.build_info()
    assert info["isa"] in info["isa_compiled"]
    assert info["compiler"]


def test_the_best_instruction_set_is_chosen():
    cpu = pytest.importorskip("engram_kernels._cpu", exc_type=ImportError)
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = found[1].split() if found else []
    needed = {"baseline": [], "avx2": ["avx2", "fma", "f16c"]}
    needed["avx512"] = [*needed["avx2"], "avx512f", "avx512bw", "avx512vl", "avx512dq"]
    info = cpu.build_info()
    usable = [level for level in info["isa_compiled"] if set(needed[level]) <= set(flags)]
    if "ENGRAM_CPU_ISA" in os.environ:
        pytest.skip("ENGRAM_CPU_ISA lowers it")
    assert info["isa"] == usable[-1]


def test_cuda_module_imports_without_a_gpu():
    cuda = pytest.importorskip("engram_kernels._cuda", exc_type=ImportError)
    info = cuda.build_info()
    assert info["archs"].split() and info["cuda"] and info["driver"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["ptxas"])
    assert cuda.small_solve_limit() >= 64


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_instruction_set_can_be_lowered(level):
    cpu = pytest.importorskip("engram_kernels._cpu", exc_type=ImportError)
    compiled = cpu.build_info()["isa_compiled"]
    if level not in compiled or compiled.index(level) > compiled.index(cpu.build_info()["isa"]):
        pytest.skip(f"this machine does not run {level}")
    # From the file alone: the package would bring torch.
    code = (
        "import importlib.util as u; s = u.spec_from_file_location('_cpu', {!r});"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.build_info()['isa'])"
    ).format(importlib.import_module("engram_kernels._cpu").__file__)
    environment = {**os.environ, "ENGRAM_CPU_ISA": level}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == level


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ENGRAM_CUDA": "maybe"}, "ENGRAM_CUDA: expected auto, on or off, got 'maybe'"),
        ({"ENGRAM_CPU": "1"}, "ENGRAM_CPU: expected auto, on or off, got '1'"),
        ({"ENGRAM_CUDA_ARCHS": "hopper"}, "ENGRAM_CUDA_ARCHS: expected architectures such as 80;90;100;120"),
        ({"MAX_JOBS": "none"}, "MAX_JOBS: expected a positive number, got 'none'"),
    ],
)
def test_bad_settings_are_one_sentence(source, environment, message):
    done = setup_py(source, "build_ext", **environment)
    assert done.returncode != 0
    assert f"engram_kernels: {message}" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_asked_for_and_missing_is_an_error(source, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    environment = {"PATH": str(empty), "CXX": "", "CUDACXX": "", "CUDA_HOME": "", "CUDA_PATH": ""}
    done = setup_py(source, "build_ext", ENGRAM_CPU="on", **environment)
    assert done.returncode != 0 and "need a C++ compiler" in done.stderr
    done = setup_py(source, "build_ext", **environment)
    assert done.returncode == 0, done.stderr


def test_a_failing_compiler_is_one_message(source):
    kernels = source / "csrc" / "cpu" / "isa.cpp"
    kernels.write_text("#error no such machine\n" + kernels.read_text())
    done = setup_py(source, "build_ext")
    assert done.returncode != 0
    assert "engram_kernels: building the C++ kernels failed" in done.stderr
    assert "no such machine" in done.stderr
    assert "Set ENGRAM_CPU=off to install without them" in done.stderr
    assert "Traceback" not in done.stderr


def test_sdist_carries_the_sources(source):
    done = setup_py(source, "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= names

"""Build the extension modules with CMake and ninja; everything declarative is in pyproject.toml.

Environment:
    ENGRAM_CPU         auto (default: on Linux, when a C++ compiler is found), on, off
    ENGRAM_CUDA        auto (default: on Linux, when nvcc is found), on, off
    ENGRAM_PYTHON      a folder: headers of the Python to build for, if it is not the one that runs this
    ENGRAM_CUDA_ARCHS  GPU architectures, default 80;90;100;120; the last one also as PTX for later GPUs
    MAX_JOBS           processes at a time, default the number of cores
    CXX, CUDACXX       the compilers
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def fail(message: str) -> None:
    sys.exit(f"\nengram_kernels: {message}\n")


def setting(name: str) -> str:
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "on", "off"):
        fail(f"{name}: expected auto, on or off, got {value!r}")
    # The kernels were only ever built on Linux. Elsewhere a compiler that is found, as macOS's c++, which may
    # only ask for Xcode, must not stop an installation that works without them.
    return "off" if value == "auto" and sys.platform != "linux" else value


def find_compiler() -> str | None:
    """Return a C++ compiler, $CXX first. The kernels need GCC's vector extensions: GCC or Clang."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name.split()[0])):
            return path
    return None


def find_nvcc() -> str | None:
    """Return nvcc from $CUDACXX, $CUDA_HOME, the search path or its usual place."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for name in (
        os.environ.get("CUDACXX"),
        *(f"{home}/bin/nvcc" for home in homes if home),
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ):
        if name and (path := shutil.which(name)):
            return path
    return None


def wanted_modules() -> list[str]:
    """Decide what to build; what is asked for and cannot be built is an error, never a silent omission."""
    cpu, cuda = setting("ENGRAM_CPU"), setting("ENGRAM_CUDA")
    compiler, nvcc = find_compiler(), find_nvcc()
    if compiler is None and "on" in (cpu, cuda):
        fail("ENGRAM_CPU=on and ENGRAM_CUDA=on need a C++ compiler (GCC or Clang), found none; set CXX to it")
    if cuda == "on" and nvcc is None:
        fail("ENGRAM_CUDA=on needs nvcc, found none; set CUDACXX or CUDA_HOME, or ENGRAM_CUDA=off")
    modules = []
    if compiler is not None and cpu != "off":
        modules.append("_cpu")
    if compiler is not None and nvcc is not None and cuda != "off":
        modules.append("_cuda")
    return modules


def cuda_architectures() -> str:
    archs = re.sub(r"[,\s]+", ";", os.environ.get("ENGRAM_CUDA_ARCHS", "").strip())
    if not re.fullmatch(r"(\d+[af]?(;\d+[af]?)*)?", archs):
        fail(f"ENGRAM_CUDA_ARCHS: expected architectures such as 80;90;100;120, got {archs!r}")
    return archs


def jobs() -> int:
    text = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not text.isdigit() or int(text) == 0:
        fail(f"MAX_JOBS: expected a positive number, got {text!r}")
    return int(text)


class FreshBuild(build):
    """Gather the package anew: a wheel would carry whatever else an earlier build left, a module too many."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Build every module in one CMake tree, which stays under build/: a second build is incremental."""

    def build_extensions(self) -> None:
        names = [extension.name.rpartition(".")[2] for extension in self.extensions]
        tree = ROOT / "build" / f"cmake-{self.plat_name}"
        self._configure(tree, names)
        for extension, name in zip(self.extensions, names, strict=True):
            self._step(["cmake", "--build", str(tree), "--target", name, "--parallel", str(jobs())], name)
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # Never write into a library that a running process may have mapped.
            target.unlink(missing_ok=True)
            shutil.copy2(next((tree / "modules").glob(f"{name}.*")), target)

    def _configure(self, tree: Path, names: list[str]) -> None:
        import pybind11

        tools = {
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "CMAKE_CXX_COMPILER": os.environ.get("CXX") and find_compiler(),
            "CMAKE_CUDA_COMPILER": find_nvcc(),
        }
        options = {
            "PYTHON_INCLUDE_DIR": os.environ.get("ENGRAM_PYTHON") or sysconfig.get_path("include"),
            "PYBIND11_INCLUDE_DIR": pybind11.get_include(),
            "ENGRAM_BUILD_CPU": "ON" if "_cpu" in names else "OFF",
            "ENGRAM_BUILD_CUDA": "ON" if "_cuda" in names else "OFF",
            "ENGRAM_CUDA_ARCHS": cuda_architectures(),
            "ENGRAM_JOBS": jobs(),
        }
        given = {key: value for key, value in (tools | options).items() if value is not None}
        # CMake keeps the tools that it once found: with others (another compiler, the temporary directory of
        # a build that pip isolates) the tree starts afresh. Options it takes anew, and what they do not
        # touch stays: for another Python the bindings alone are compiled.
        record = tree / "tools.json"
        same = record.exists() and record.read_text() == json.dumps(tools)
        record.unlink(missing_ok=True)
        fresh = [] if same else ["--fresh"]
        arguments = [f"-D{key}={value}" for key, value in given.items()]
        self._step(["cmake", *fresh, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", *arguments], names[-1])
        record.write_text(json.dumps(tools))

    def _step(self, command: list[str], module: str) -> None:
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        except FileNotFoundError:
            fail("building needs cmake >= 3.25 and ninja: pip install cmake ninja")
        if self.verbose > 1:
            print(done.stdout)
        if done.returncode:
            kind, switch = ("CUDA", "ENGRAM_CUDA") if module == "_cuda" else ("C++", "ENGRAM_CPU")
            tail = "\n".join(f"    {line[:200]}" for line in done.stdout.strip().splitlines()[-15:])
            fail(
                f"building the {kind} kernels failed; the last lines of the build:\n\n{tail}\n\n"
                f"Set {switch}=off to install without them: the operators then run on another backend."
            )


setup(
    ext_modules=[Extension(f"engram_kernels.{name}", sources=[]) for name in wanted_modules()],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
)

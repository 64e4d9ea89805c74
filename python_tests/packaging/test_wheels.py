"""Wheels: what is in them, what they ask for, and what is built on which system."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import engram_kernels as ek

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what a wheel without native modules is built from, beside what an earlier build left."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    package = folder / "engram_kernels"
    (package / "part").mkdir(parents=True)
    shutil.copy(ek.__file__, package)  # of an installed wheel the tree has no package
    (package / "py.typed").touch()
    (package / "part" / "__init__.py").write_text("")
    left = folder / "build" / "lib" / "engram_kernels"
    left.mkdir(parents=True)
    for name in ("gone.py", "_cuda.so"):
        (left / name).write_text("")
    return folder


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    environment = {**os.environ, "ENGRAM_CPU": "off", "ENGRAM_CUDA": "off"}
    command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = (source / "dist").glob("*.whl")
    return found


def test_without_native_modules_one_wheel_is_for_every_system(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_nothing_of_an_earlier_build_gets_in(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith("info")}
    assert names == {f"engram_kernels/{name}" for name in ("__init__.py", "py.typed", "part/__init__.py")}


def test_what_a_wheel_asks_for(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(archive.read(name))
    from packaging.requirements import Requirement

    needed = {
        requirement.name: requirement
        for requirement in map(Requirement, metadata.get_all("Requires-Dist"))
        if "extra" not in str(requirement.marker)
    }
    assert metadata["Version"] == ek.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert str(needed["torch"].specifier) == ">=2.10"
    assert [name for name, requirement in needed.items() if requirement.marker] == ["triton"]
    for system, machine, wanted in (
        ("Linux", "x86_64", True),
        ("Linux", "aarch64", False),
        ("Darwin", "arm64", False),
        ("Windows", "AMD64", False),
    ):
        environment = {"platform_system": system, "platform_machine": machine}
        assert needed["triton"].marker.evaluate(environment) is wanted


@pytest.mark.parametrize("system", ["linux", "darwin"])
@pytest.mark.parametrize("asked", ["auto", "on"])
def test_native_modules_are_built_on_linux_or_where_they_are_asked_for(source, system, asked, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    program = (
        "import json, runpy, sys, setuptools, setuptools.command.build_ext\n"
        "setuptools.setup = lambda **given: print(json.dumps([e.name for e in given['ext_modules']]))\n"
        "sys.platform = sys.argv[1]\n"
        "runpy.run_path('setup.py')\n"
    )
    environment = {**os.environ, "CXX": str(compiler), "CUDACXX": str(compiler), "ENGRAM_CPU": asked}
    environment["ENGRAM_CUDA"] = asked
    command = [sys.executable, "-c", program, system]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = system == "linux" or asked == "on"
    assert json.loads(done.stdout) == (["engram_kernels._cpu", "engram_kernels._cuda"] if built else [])

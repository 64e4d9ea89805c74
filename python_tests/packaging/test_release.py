"""What a release is made with: headers, checks of wheels, workflows, and what is said of the version."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import engram_kernels as ek
from engram_kernels.backends import unavailable

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(autouse=True)
def release_in_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "release"))


def module(name: str):
    spec = importlib.util.spec_from_file_location(f"release_{name}", ROOT / "release" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_headers_of_an_interpreter(tmp_path):
    headers = module("headers")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if headers.interpreter(version) is None:
        pytest.skip(f"no python{version} in the path")
    text = (headers.headers(version, tmp_path / "include") / "patchlevel.h").read_text()
    assert f"#define PY_MINOR_VERSION        {sys.version_info.minor}\n" in text


def test_headers_that_debian_splits_by_processor_are_put_together(tmp_path):
    """A compiler for another system must find them without /usr/include in its path."""
    include = tmp_path / "include"
    (include / "python3.99").mkdir(parents=True)
    (include / "x86_64-linux-gnu" / "python3.99").mkdir(parents=True)
    (include / "x86_64-linux-gnu" / "python3.99" / "pyconfig.h").write_text("#define SIZEOF_LONG 8\n")
    (include / "python3.99" / "pyconfig.h").write_text(
        "# if defined(__x86_64__)\n#  include <x86_64-linux-gnu/python3.99/pyconfig.h>\n# endif\n"
    )
    module("headers")._settle_pyconfig(include / "python3.99", include)
    assert (include / "python3.99" / "pyconfig.h").read_text() == "#define SIZEOF_LONG 8\n"


def test_a_python_that_is_not_to_be_had_is_one_sentence(tmp_path, monkeypatch):
    headers = module("headers")
    monkeypatch.setattr(headers, "_debian", lambda version, scratch: None)
    with pytest.raises(SystemExit, match=r"no headers of Python 3\.99: install it"):
        headers.headers("3.99", tmp_path / "include")


PUBLIC = 'extern "C" __attribute__((visibility("default"))) '
TOO_MUCH = {
    "exports f": (f"{PUBLIC} int f() {{ return 1; }}", []),
    "needs missing": (f'extern "C" int missing(); {PUBLIC} int PyInit_m() {{ return missing(); }}', []),
    "needs .*GLIBC_2": (
        f"#include <dlfcn.h>\n{PUBLIC} void* PyInit_m() {{ return dlsym(0, 0); }}",
        ["-lc"],
    ),
    "needs .*libgomp": (f"{PUBLIC} int PyInit_m() {{ return 1; }}", ["-Wl,--no-as-needed", "-lgomp"]),
}


@pytest.mark.parametrize("complaint", TOO_MUCH)
def test_a_module_that_asks_too_much_is_refused(tmp_path, monkeypatch, complaint):
    pytest.importorskip("elftools", reason="pyelftools is not installed: requirements/release.txt brings it")
    check = module("check")
    monkeypatch.setattr(check, "GLIBC", "2.1")  # below whatever this machine has
    source, libraries = TOO_MUCH[complaint]
    (tmp_path / "m.cpp").write_text(source + "\n")
    command = [
        "c++",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-nodefaultlibs",
        "m.cpp",
        *libraries,
        "-o",
        "m.so",
    ]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("no C++ compiler with OpenMP here")
    with pytest.raises(AssertionError, match=complaint):
        check.module(tmp_path / "m.so", "x86_64")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("engram_kernels-0.1.0-cp310-cp310-manylinux_2_28_aarch64.whl", True),
        ("engram_kernels-0.1.0+cu130-cp314-cp314-manylinux_2_28_x86_64.whl", True),
        ("engram_kernels-0.1.0-py3-none-any.whl", True),
        ("engram_kernels-0.1.0-cp311-cp311-linux_x86_64.whl", False),
        ("engram_kernels-0.1.0-cp311-cp311-manylinux_2_34_x86_64.whl", False),
    ],
)
def test_names_of_wheels(name, known):
    pytest.importorskip("elftools", reason="pyelftools is not installed: requirements/release.txt brings it")
    assert bool(module("check").WHEEL.fullmatch(name)) is known


def test_wheels_are_built_for_every_python_from_the_oldest():
    wheels = module("wheels")
    minors = [int(version.partition(".")[2]) for version in wheels.PYTHONS]
    assert minors == list(range(minors[0], minors[0] + len(minors)))
    assert f'requires-python = ">={wheels.PYTHONS[0]}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.skipif(unavailable("cpu", "cpu") is not None, reason="the CPU kernels are not built")
def test_the_run_of_a_wheel_without_torch_knows_the_module():
    """It calls the module as the backend does, so it changes with it: here on the one that is installed."""
    installed = Path(ek.__file__).parents[1]
    command = [sys.executable, "-I", str(ROOT / "release" / "smoke.py"), str(installed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "_cpu (" in done.stdout


def test_one_version_everywhere():
    assert f"\nversion: {ek.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def steps(path: Path) -> list[dict]:
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_targets_of_the_makefile(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = path.read_text()
    called = set(re.findall(r"make ([a-z-]+)", "\n".join(step.get("run", "") for step in steps(path))))
    for listed in re.findall(r"target: \[(.*)\]", text):
        called |= set(listed.split(", "))
    assert called and called <= targets


def test_only_a_tag_publishes_and_with_no_token():
    yaml = pytest.importorskip("yaml")
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    assert release[True]["push"] == {"tags": ["v*"]}  # YAML reads the key `on` as true
    assert release["permissions"] == {"contents": "read"}
    writing = {name: job for name, job in release["jobs"].items() if "permissions" in job}
    assert {name: job["permissions"] for name, job in writing.items()} == {
        "pypi": {"id-token": "write"},
        "page": {"contents": "write"},
    }
    assert all(job["if"] == "github.ref_type == 'tag'" for job in writing.values())
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()

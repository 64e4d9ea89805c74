"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, at each instruction set there is.

Their threads under ThreadSanitizer.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU = ROOT / "csrc" / "cpu"
NATIVE = Path(__file__).parents[1] / "native"
FAMILIES = ("low_rank", "graft", "memory", "ridge")
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
X86 = platform.machine() in ("x86_64", "AMD64")
# As in CMakeLists.txt.
LEVELS = {"baseline": []}
if X86:
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = [*LEVELS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")]


OPTIONS = ["-std=c++17", "-O1", "-g1", "-pthread", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]


def sanitized(folder: Path, *names: str) -> list[str]:
    """The compiler's options for sanitizers, where it can link them."""
    options = [*OPTIONS, f"-fsanitize={','.join(names)}", "-fno-sanitize-recover=all"]
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}")
    if subprocess.run([COMPILER, *options, probe, "-o", folder / "probe"], capture_output=True).returncode:
        pytest.skip(f"{COMPILER} cannot link the sanitizers: {', '.join(names)}")
    return options


@pytest.fixture(scope="module")
def drivers(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sanitizers")
    options = [*sanitized(folder, "address", "undefined"), *["-DENGRAM_X86"] * X86]
    jobs = [(NATIVE / f"sanitize_{family}.cpp", [], folder / f"{family}-driver.o") for family in FAMILIES]
    for source in CPU.glob("*.cpp"):
        if not source.stem.endswith("_kernels"):
            jobs.append((source, [], folder / f"{source.stem}.o"))
            continue
        for level, flags in LEVELS.items():
            jobs.append((source, [*flags, f"-DENGRAM_ISA={level}"], folder / f"{source.stem}-{level}.o"))

    def build(source: Path, flags: list[str], target: Path) -> Path:
        subprocess.run([COMPILER, *options, *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: build(*job), jobs))
    kernels = objects[len(FAMILIES) :]
    for family, driver in zip(FAMILIES, objects, strict=False):
        subprocess.run([COMPILER, *options, driver, *kernels, "-o", folder / family], check=True)
    return {family: folder / family for family in FAMILIES}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_report(drivers, family, level):
    environment = {
        **os.environ,
        "ENGRAM_CPU_ISA": level,
        "ASAN_OPTIONS": "detect_leaks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run(
        [drivers[family], level], env=environment, capture_output=True, text=True, timeout=300
    )
    if done.returncode == 77:
        pytest.skip(f"this machine does not run {level}")
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert "runtime error" not in report and "Sanitizer" not in report, report


def test_threads(tmp_path):
    sources = NATIVE / "threads.cpp", CPU / "threads.cpp"
    driver = tmp_path / "threads"
    subprocess.run([COMPILER, *sanitized(tmp_path, "thread"), *sources, "-o", driver], check=True)
    done = subprocess.run([driver], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

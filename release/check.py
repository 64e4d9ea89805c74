"""Check what `release/wheels.py` left in dist/, and write dist/manifest.json: `python release/check.py`.

Of every wheel: its tags, the files, what its modules ask of a system, and, where its Python is here, that the
kernels compute. Nothing is installed.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from elftools.elf.elffile import ELFFile
from headers import interpreter
from wheels import DIST, GLIBC, MACHINES, ROOT, run, tool

# What every Linux with that glibc has: no libgomp, no libstdc++, nothing of CUDA's.
LIBRARIES = re.compile(r"lib(c|m|dl|rt|pthread)\.so\.\d|ld-linux-[\w-]+\.so\.\d")
WHEEL = re.compile(
    r"engram_kernels-(?P<version>[\d.]+)(\+(?P<cuda>cu\d+))?-"
    rf"(cp(?P<python>3\d+)-cp\d+-manylinux_{GLIBC.replace('.', '_')}_(?P<machine>{'|'.join(MACHINES)})|"
    r"py3-none-any)\.whl"
)


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def module(path: Path, machine: str) -> str:
    """Check an extension module and return the newest version of glibc that it needs."""
    with path.open("rb") as file:
        elf = ELFFile(file)
        assert elf.get_machine_arch() == {"x86_64": "x64", "aarch64": "AArch64"}[machine], path
        needed = [tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]
        assert all(map(LIBRARIES.fullmatch, needed)), f"{path.name} needs {needed}"
        required = elf.get_section_by_name(".gnu.version_r")
        versions = [use.name for _, uses in required.iter_versions() for use in uses] if required else []
        assert all(name.startswith("GLIBC_") for name in versions), f"{path.name} needs {versions}"
        newest = max((number(name.removeprefix("GLIBC_")) for name in versions), default=(2, 0))
        assert newest <= number(GLIBC), f"{path.name} needs {versions}"
        symbols = list(elf.get_section_by_name(".dynsym").iter_symbols())
        tied = elf.get_section_by_name(".gnu.version")
        for index, symbol in enumerate(symbols):
            if not symbol.name:
                continue
            if symbol["st_shndx"] != "SHN_UNDEF":
                assert symbol.name.startswith("PyInit_"), f"{path.name} exports {symbol.name}"
            elif symbol["st_info"]["bind"] != "STB_WEAK" and not re.match("_?Py", symbol.name):
                # A symbol without a version is one that no library here promises.
                known = tied and tied.get_symbol(index)["ndx"] not in ("VER_NDX_LOCAL", "VER_NDX_GLOBAL")
                assert known, f"{path.name} needs {symbol.name}"
    return ".".join(map(str, newest))


def sources(names: list[str]) -> set[str]:
    return {name for name in names if name.startswith("engram_kernels/") and not name.endswith((".so", "/"))}


def wheel(path: Path, pure: set[str]) -> dict:
    """Check a wheel and return what the manifest says of it."""
    match = WHEEL.fullmatch(path.name)
    assert match, f"{path.name}: not a name that a release has"
    said = {"name": path.name}
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        modules = sorted(name for name in names if name.endswith(".so"))
        assert sources(names) == pure, f"{path.name}: {sources(names) ^ pure}"
        if match["python"] is None:
            assert not modules, modules
            return said
        machine, version = match["machine"], f"3.{match['python'][1:]}"
        wanted = ["_cpu", "_cuda"] if match["cuda"] else ["_cpu"]
        suffix = f".cpython-{match['python']}-{machine}-linux-gnu.so"
        assert modules == [f"engram_kernels/{name}{suffix}" for name in wanted], modules
        archive.extractall(folder)
        needs = [module(Path(folder, name), machine) for name in modules]
        said |= {
            "python": version,
            "machine": machine,
            "modules": wanted,
            "glibc": max(needs, key=number),
            "run": smoke(Path(folder), version, machine),
        }
    return said


def smoke(folder: Path, version: str, machine: str) -> str | None:
    """Compute with the modules of an unpacked wheel; return on which Python, or None where there is none."""
    python = interpreter(version)
    if python is None or machine != os.uname().machine:
        return None
    command = [python, "-I", str(ROOT / "release" / "smoke.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def main() -> None:
    paths = sorted(path for path in DIST.iterdir() if path.suffix in (".whl", ".gz"))
    run(tool("twine"), "check", "--strict", *paths)
    (universal,) = (path for path in paths if path.name.endswith("-py3-none-any.whl"))
    pure = sources(zipfile.ZipFile(universal).namelist())
    files = []
    for path in paths:
        said = wheel(path, pure) if path.suffix == ".whl" else {"name": path.name}
        said |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        files.append(said)
        print(f"{path.name}: {said['bytes'] / 1e6:.2f} MB; {said.get('run') or 'not run'}", flush=True)
    (DIST / "manifest.json").write_text(json.dumps({"files": files}, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except AssertionError as error:
        sys.exit(f"release: {error}")

"""Where the headers of a Python are: all of it that a wheel is built with."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def headers(version: str, into: Path) -> Path:
    """Copy the headers of a Python, "3.12", into a folder and return it.

    They are those of an interpreter that is installed. Where there is none, Debian's package manager is asked
    for testing's. They serve every processor of 64 bits: what `pyconfig.h` says of a processor is for the
    interpreter's own sources.

    Raises:
        SystemExit: none are to be had.
    """
    source = _installed(version)
    with tempfile.TemporaryDirectory() as scratch:
        source = source or _debian(version, Path(scratch))
        if source is None:
            sys.exit(
                f"release: no headers of Python {version}: install it, as by `uv python install {version}`"
            )
        shutil.rmtree(into, ignore_errors=True)
        shutil.copytree(source, into)
        _settle_pyconfig(into, source.parent)
    return into


def interpreter(version: str) -> str | None:
    """Return an interpreter of a version that is installed: in the path, or kept by uv or pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [
        shutil.which(f"python{version}"),
        *Path.home().glob(f".local/share/uv/python/cpython-{version}.*/bin/python{version}"),
        *pyenv.glob(f"versions/{version}.*/bin/python{version}"),
    ]
    for python in filter(None, found):
        # pyenv's stand-ins in the path are there for versions that they do not start.
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return str(python)
    return None


def _installed(version: str) -> Path | None:
    if (python := interpreter(version)) is None:
        return None
    ask = "import sysconfig; print(sysconfig.get_path('include'))"
    include = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    return Path(include) if Path(include, "Python.h").exists() else None


def _debian(version: str, scratch: Path) -> Path | None:
    """Unpack testing's headers, installing nothing."""
    if shutil.which("apt-get") is None:
        return None
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    sources = scratch / "sources.list"
    sources.write_text(f"deb [signed-by={keyring}] http://deb.debian.org/debian testing main\n")
    (scratch / "lists" / "partial").mkdir(parents=True)
    (scratch / "archives" / "partial").mkdir(parents=True)
    apt = [
        *("apt-get", "-qq", "-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=/dev/null"),
        *("-o", f"Dir::State::lists={scratch / 'lists'}", "-o", f"Dir::Cache={scratch}"),
        *("-o", "APT::Sandbox::User=root"),
    ]
    for command in ([*apt, "update"], [*apt, "download", f"libpython{version}-dev"]):
        if subprocess.run(command, cwd=scratch, stderr=subprocess.DEVNULL).returncode:
            return None
    (package,) = scratch.glob("*.deb")
    subprocess.run(["dpkg", "-x", package, scratch], check=True)
    return scratch / "usr" / "include" / f"python{version}"


def _settle_pyconfig(folder: Path, beside: Path) -> None:
    """Put the file itself where Debian's `pyconfig.h` chooses one by the processor."""
    text = (folder / "pyconfig.h").read_text()
    if chosen := re.search(r"<(x86_64-linux-gnu/python[\d.]+/pyconfig\.h)>", text):
        shutil.copy(beside / chosen[1], folder / "pyconfig.h")

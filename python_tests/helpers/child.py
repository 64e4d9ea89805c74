"""Python in a process of its own, which imports what this one does."""

import os
import subprocess
import sys


def start(code, *arguments, **options):
    """A process that runs the code, on its way."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


def run(code, *arguments):
    """The exit status of the code, and what it wrote to stderr."""
    process = start(code, *arguments)
    _, errors = process.communicate()
    return process.returncode, errors

"""Other people's editing code, imported from checkouts, for tests and benchmarks.

    ENGRAM_EASYEDIT, ENGRAM_ROME, ENGRAM_MEMIT     the folders of the checkouts

ROME's and MEMIT's code was written for a GPU and for transformers 4, and EasyEdit's package imports far more
than it needs for an edit. So their modules are imported with `"cuda"` read as `"cpu"`, with a layer's output
read as the tensor that it is in transformers 5, and without EasyEdit's `__init__`. Nothing is written into a
checkout.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

VARIABLES = {"easyeditor": "ENGRAM_EASYEDIT", "rome": "ENGRAM_ROME", "memit": "ENGRAM_MEMIT"}
PORTED = {'"cuda"': '"cpu"', "cur_out[0][": "cur_out[", ".output[0][": ".output["}
BARE = ("easyeditor", "easyeditor.models")
# What hyper-parameters call the modules of a family.
NAMES = {
    "gpt2": {
        "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
        "layer_module_tmp": "transformer.h.{}",
        "mlp_module_tmp": "transformer.h.{}.mlp",
        "attn_module_tmp": "transformer.h.{}.attn",
        "ln_f_module": "transformer.ln_f",
        "lm_head_module": "transformer.wte",
    },
    "llama": {
        "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
        "layer_module_tmp": "model.layers.{}",
        "mlp_module_tmp": "model.layers.{}.mlp",
        "attn_module_tmp": "model.layers.{}.self_attn",
        "ln_f_module": "model.norm",
        "lm_head_module": "lm_head",
    },
}


def location(library: str) -> Path | None:
    """The folder of a library's checkout, or None."""
    folder = os.environ.get(VARIABLES[library])
    return Path(folder).resolve() if folder else None


@contextmanager
def checkout(library: str) -> Iterator[None]:
    """Let a library be imported by its name from its checkout; afterwards nothing of it stays imported."""
    root, before, here = location(library), set(sys.modules), Path.cwd()
    finder = _Finder(str(root))
    if library == "easyeditor":
        for name in BARE:
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")))]
    if importlib.util.find_spec("datasets") is None:
        # Their statistics import it; files that are there are read without it.
        sys.modules["datasets"] = ModuleType("datasets")
        sys.modules["datasets"].load_dataset = None
    sys.meta_path.insert(0, finder)
    try:
        os.chdir(root)  # their globals.yml is looked for there, at import
        yield
    finally:
        os.chdir(here)
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("easyeditor", "rome", "memit", "util", "datasets"):
                del sys.modules[name]


class _Finder:
    """Finds the modules of a checkout, and no others."""

    def __init__(self, root: str):
        self.root = root

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, [self.root] if path is None else path, target)
        if spec is None or not (spec.origin or "").startswith(self.root + os.sep):
            return None
        spec.loader = _Ported(name, spec.origin)
        return spec


class _Ported(SourceFileLoader):
    def get_code(self, fullname):
        source = Path(self.path).read_text(encoding="utf-8")
        for old, new in PORTED.items():
            source = source.replace(old, new)
        return compile(source, self.path, "exec", dont_inherit=True)

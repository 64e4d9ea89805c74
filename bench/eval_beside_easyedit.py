"""`engram eval` with EasyEdit's methods from a checkout, whose package asks for more than an edit needs.

    ENGRAM_EASYEDIT=../EasyEdit python bench/eval_beside_easyedit.py --data counterfact_dev.json --rows 8 \
        --baseline easyedit:rome --baseline easyedit:wise --report three.json
"""

import importlib
import os
import sys
from pathlib import Path

import checkouts

from engram_kernels.cli import main

if __name__ == "__main__":
    here = Path.cwd()
    with checkouts.checkout("easyeditor"):
        # EasyEdit looks for a file of settings where it is imported; ours are named from here.
        importlib.import_module("easyeditor.util.globals")
        os.chdir(here)
        sys.argv.insert(1, "eval")
        main()

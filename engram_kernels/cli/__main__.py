"""`python -m engram_kernels.cli`, which `torchrun … -m engram_kernels.cli` starts on every rank."""

from . import main

if __name__ == "__main__":
    main()

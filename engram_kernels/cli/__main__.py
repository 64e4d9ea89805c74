"""`python -m engram_kernels.cli`, which `torchrun … -m engram_kernels.cli` starts on every rank."""

from . import main

main()

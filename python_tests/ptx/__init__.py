"""The package's Triton and CUDA kernels on CPU tensors: their compiled PTX on the machine of machine/."""

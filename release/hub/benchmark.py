"""The operators against plain PyTorch, at the shapes of a model's MLP: `kernels benchmark REPOSITORY`."""

import torch
from kernels.benchmark import Benchmark


class LowRank(Benchmark):
    """A write of rank 8 into a weight [2048, 8192], and its inverse, so that the weight stays as it is."""

    seed = 0

    def setup(self):
        self.weight = torch.randn(2048, 8192, device=self.device)
        self.left = torch.randn(2048, 8, device=self.device)
        self.right = torch.randn(8, 8192, device=self.device)
        self.out = self.weight.clone()

    def benchmark_apply(self):
        self.out.copy_(self.weight)
        self.kernel.apply_low_rank_(self.out, self.left, self.right)

    def verify_apply(self):
        return torch.addmm(self.weight, self.left, self.right)


class Graft(Benchmark):
    """A weight [2048, 8192] blended with a fine-tuned one by a mask of logits."""

    seed = 0

    def setup(self):
        self.pre, self.ft, self.logits = torch.randn(3, 2048, 8192, device=self.device)

    def benchmark_blend(self):
        self.out = self.kernel.graft_blend(self.pre, self.ft, self.logits)

    def verify_blend(self):
        return self.pre + torch.sigmoid(self.logits) * (self.ft - self.pre)


class Memory(Benchmark):
    """64 facts streamed into a memory of 128 slots, one after the other, with the readout of each."""

    seed = 0

    def setup(self):
        self.inverse = torch.eye(128, device=self.device)
        self.memory = torch.zeros(128, 512, device=self.device)
        self.weights = torch.randn(64, 128, device=self.device) / 12
        self.latents = torch.randn(64, 512, device=self.device)

    def benchmark_stream(self):
        _, self.out, *_ = self.kernel.memory_stream(self.inverse, self.memory, self.weights, self.latents)

    def verify_stream(self):
        precision = torch.eye(128, device=self.device) + self.weights.T @ self.weights
        return torch.linalg.solve(precision, self.weights.T @ self.latents)

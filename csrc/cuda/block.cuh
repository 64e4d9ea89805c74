// What all kernels share: the threads of a block, and what warps and blocks sum together.
#pragma once

#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "compute capability 8.0 or later is needed: leave older GPUs out of ENGRAM_CUDA_ARCHS"
#endif

#define ENGRAM_DEVICE __device__ __forceinline__

namespace engram::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;

// The sum over kLanes neighbours, in an order that never varies.
template <int kLanes, typename T>
ENGRAM_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Adds to a sum that other threads add to at the same time. The order varies, so the sums are integers.
ENGRAM_DEVICE void add(uint32_t& sum, uint32_t amount) { atomicAdd(&sum, amount); }

ENGRAM_DEVICE void add(uint64_t& sum, uint64_t amount) {
  static_assert(sizeof(uint64_t) == sizeof(unsigned long long));
  atomicAdd(reinterpret_cast<unsigned long long*>(&sum), static_cast<unsigned long long>(amount));
}

}  // namespace engram::cuda

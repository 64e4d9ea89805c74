// How a thread block's work is written, so that the same code runs on a GPU and, thread by thread, on a host.
//
// A block's program is a function of a `Block`. `block.step(f)` runs f(thread, registers) on every thread and
// then waits for all; what a thread keeps from one step to the next lives in its `Registers`, what threads
// share lives in shared memory. Between steps the program may read shared memory that the next step does not
// write, but must take the same way in every thread. A host test gives it a Block whose steps run the threads
// in any order: a missing barrier then shows as a result that depends on that order.
#pragma once

#include <cstdint>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "compute capability 8.0 or later is needed: leave older GPUs out of ENGRAM_CUDA_ARCHS"
#endif

#ifdef __CUDACC__
#define ENGRAM_DEVICE __device__ __forceinline__
#else
#define ENGRAM_DEVICE inline
#endif

namespace engram::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;

#ifdef __CUDACC__
template <typename Registers>
struct DeviceBlock {
  Registers registers;

  template <typename Step>
  ENGRAM_DEVICE void step(const Step& run) {
    run(static_cast<int>(threadIdx.x), registers);
    __syncthreads();
  }

  // Every thread's select(registers) becomes the sum over its kLanes neighbours, in an order that never
  // varies.
  template <int kLanes, typename Select>
  ENGRAM_DEVICE void warp_sum(const Select& select) {
    auto& value = select(registers);
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
};
#endif

// Adds to a sum that other threads add to in the same step. The order varies, so the sums are integers.
ENGRAM_DEVICE void add(uint32_t& sum, uint32_t amount) {
#ifdef __CUDACC__
  atomicAdd(&sum, amount);
#else
  sum += amount;
#endif
}

ENGRAM_DEVICE void add(uint64_t& sum, uint64_t amount) {
#ifdef __CUDACC__
  static_assert(sizeof(uint64_t) == sizeof(unsigned long long));
  atomicAdd(reinterpret_cast<unsigned long long*>(&sum), static_cast<unsigned long long>(amount));
#else
  sum += amount;
#endif
}

}  // namespace engram::cuda

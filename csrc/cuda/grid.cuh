// Blocks of one launch that wait for one another, all of them on the device at once (a cooperative launch).
#pragma once

#include "block.cuh"

namespace engram::cuda {

// What other blocks wrote before the last barrier of the grid: read past the first-level cache, which may
// still hold what stood there before.
template <typename T>
ENGRAM_DEVICE T load_exchanged(const T* from) {
  if constexpr (sizeof(T) == 16) {
    const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(from));
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
  } else {
    return __ldcg(from);
  }
}

// Ends when `arrivals` blocks have come, counted from when *counter was 0 and modulo 2^32. What they wrote
// before is then seen by every thread.
ENGRAM_DEVICE void grid_barrier(uint32_t* counter, uint32_t arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    while (static_cast<int32_t>(*static_cast<volatile uint32_t*>(counter) - arrivals) < 0) {
    }
    __threadfence();
  }
  __syncthreads();
}

}  // namespace engram::cuda

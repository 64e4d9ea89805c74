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
    // Cheaper than fences around a plain atomic: what is ordered is ordered once, and by no stronger rule.
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter))
                 : "memory");
    uint32_t arrived;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                   : "=r"(arrived)
                   : "l"(__cvta_generic_to_global(counter))
                   : "memory");
    } while (static_cast<int32_t>(arrived - arrivals) < 0);
  }
  __syncthreads();
}

}  // namespace engram::cuda

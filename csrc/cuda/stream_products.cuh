// products[column, t] (+)= sum over slots of state[column, slot] * tile[slot, t], of all columns of a block.
//
// Few results from long sums: a thread sums kLines by kLines of them over some of the slots, so that two
// vectors from shared memory serve kLines^2 products each; then threads of a warp meet by shuffles, and warps
// in shared memory.
#pragma once

#include "numeric.cuh"
#include "stream_plan.cuh"

namespace engram::cuda {

template <typename T>
struct StreamProducts {
  static constexpr int kWrites = StreamPlan::kWrites;
  static constexpr int kGroup = StreamPlan::kGroup;
  static constexpr int kVec = kVector<T>;
  static constexpr int kPitch = kWrites + kVec;  // of the tile's rows, so that they begin in different banks
  static constexpr int kLines = 4;
  static constexpr int kShares = kWarp / (kWrites / kLines * kGroup / kLines);  // threads of a warp a sum
  // Rounds whose columns are on their way at once: a state that does not fit is far. In fp64 two would fill
  // the registers.
  static constexpr int kAhead = sizeof(T) == 4 ? 2 : 1;
  static_assert(kShares == kLines, "each of the threads with the same sums writes those of one column");

  using Vector = Pack<T, kVec>;

  const T* state;  // [columns, pitch], from the first of the tile's slots on
  int64_t pitch;
  int columns;
  const T* tile;  // [slots, kPitch] in shared memory
  int slots;      // a multiple of kVec
  T* sums;        // [kWarps, kGroup, kWrites] in shared memory
  T* products;    // [columns, kWrites]

  ENGRAM_DEVICE void run(bool add) const {
    const int thread = threadIdx.x;
    for (int group = 0; group < columns; group += kGroup) {
      T sum[kLines][kLines];
      multiply(group, thread, sum);
      T* const to = sums + (thread / kWarp * kGroup + column(thread)) * kWrites + write(thread);
#pragma unroll
      for (int i = 0; i < kLines; ++i)
#pragma unroll
        for (int t = 0; t < kLines; ++t) {
          const T shared_sum = warp_sum<kShares>(sum[i][t]);
          if (thread % kShares == i) to[i * kWrites + t] = shared_sum;
        }
      __syncthreads();
      if (thread < kGroup * kWrites && group + thread / kWrites < columns) {
        T total = 0;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) total += sums[warp * kGroup * kWrites + thread];
        T& product = products[group * kWrites + thread];
        product = add ? product + total : total;
      }
      __syncthreads();
    }
  }

 private:
  // The first of the columns of a group, and of the rows of W, whose products a thread sums.
  static ENGRAM_DEVICE int column(int thread) { return thread % kWarp / (kWarp / 2) * kLines; }
  static ENGRAM_DEVICE int write(int thread) { return thread / kShares % (kWrites / kLines) * kLines; }

  // A column past the last stands for it, and is not written.
  ENGRAM_DEVICE void multiply(int group, int thread, T (&sum)[kLines][kLines]) const {
    const T* from[kLines];
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const int at = group + column(thread) + i;
      from[i] = state + (at < columns ? at : columns - 1) * pitch;
#pragma unroll
      for (int t = 0; t < kLines; ++t) sum[i][t] = 0;
    }
    const int share = thread / kWarp * kShares + thread % kShares;
#pragma unroll kAhead
    for (int slot = share * kVec; slot < slots; slot += kWarps * kShares * kVec) {
      Vector x[kLines];
#pragma unroll
      for (int i = 0; i < kLines; ++i) x[i] = *reinterpret_cast<const Vector*>(from[i] + slot);
#pragma unroll
      for (int v = 0; v < kVec; ++v)
#pragma unroll
        for (int t = 0; t < kLines; t += kVec) {
          const auto w = *reinterpret_cast<const Vector*>(tile + (slot + v) * kPitch + write(thread) + t);
#pragma unroll
          for (int u = 0; u < kVec; ++u)
#pragma unroll
            for (int i = 0; i < kLines; ++i) sum[i][t + u] += x[i].at[v] * w.at[u];
        }
    }
  }
};

}  // namespace engram::cuda

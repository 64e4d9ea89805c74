// products[column, t] (+)= sum over slots of state[column, slot] * tile[slot, t], of all columns of a block.
//
// Few results from long sums: a thread sums kLines columns by kRows rows over some of the slots, so that
// kLines + kRows vectors from shared memory serve kLines * kRows products each of their entries; then threads
// of a warp meet by shuffles, and warps in shared memory. kLines follows the columns of a block, so that no
// column is summed that is not there.
#pragma once

#include "numeric.cuh"
#include "stream_plan.cuh"

namespace engram::cuda {

template <typename T>
struct StreamProducts {
  static constexpr int kWrites = StreamPlan::kWrites;
  static constexpr int kVec = kVector<T>;
  static constexpr int kPitch = kWrites + kVec;  // of the tile's rows, so that they begin in different banks
  static constexpr int kRows = 4;                // of W, a thread
  static constexpr int kShares = kWarp / (kWrites / kRows * StreamPlan::kHalves);  // threads of a warp a sum
  // Rounds whose columns are on their way at once: a state that does not fit is far. In fp64 two would fill
  // the registers.
  static constexpr int kAhead = sizeof(T) == 4 ? 2 : 1;
  static_assert(kShares == kRows, "each of the threads with the same sums keeps those of kLines");

  using Vector = Pack<T, kVec>;

  const T* state;  // [columns, pitch], from the first of the tile's slots on
  int64_t pitch;
  int columns, group;  // of them, whose products are summed together
  const T* tile;       // [slots, kPitch] in shared memory
  int slots;           // a multiple of kVec
  T* sums;             // [kWarps, group, kWrites] in shared memory
  T* products;         // [columns, kWrites]

  ENGRAM_DEVICE void run(bool add) const {
    switch (group / StreamPlan::kHalves) {
      case 4:
        return run<4>(add);
      case 5:
        return run<5>(add);
      default:
        return run<6>(add);
    }
  }

 private:
  // The first of the columns of a group, and of the rows of W, whose products a thread sums.
  template <int kLines>
  static ENGRAM_DEVICE int column(int thread) {
    return thread % kWarp / (kWarp / StreamPlan::kHalves) * kLines;
  }
  static ENGRAM_DEVICE int write(int thread) { return thread / kShares % (kWrites / kRows) * kRows; }

  template <int kLines>
  ENGRAM_DEVICE void run(bool add) const {
    constexpr int kEntries = StreamPlan::kHalves * kLines * kWrites;
    const int thread = threadIdx.x;
    for (int first = 0; first < columns; first += StreamPlan::kHalves * kLines) {
      T sum[kLines * kRows];
      multiply<kLines>(first, thread, sum);
      meet<kLines>(thread, sum);
      // What is left of them is of one row of W: the share's.
      T* const to = sums + thread / kWarp * kEntries + column<kLines>(thread) * kWrites + write(thread) +
                    thread % kShares;
#pragma unroll
      for (int i = 0; i < kLines; ++i) to[i * kWrites] = sum[i];
      __syncthreads();
      if (thread < kEntries && first + thread / kWrites < columns) {
        T total = 0;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) total += sums[warp * kEntries + thread];
        T& product = products[first * kWrites + thread];
        product = add ? product + total : total;
      }
      __syncthreads();
    }
  }

  // Sums [row of W, column] over the kShares threads: each keeps half of what it has, and gives the other.
  template <int kLines, int kDistance = kShares / 2>
  static ENGRAM_DEVICE void meet(int thread, T* sum) {
    constexpr int kHalf = kLines * kDistance;
    const bool upper = thread & kDistance;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const T given = upper ? sum[i] : sum[kHalf + i];
      const T kept = upper ? sum[kHalf + i] : sum[i];
      sum[i] = kept + __shfl_xor_sync(0xffffffffu, given, kDistance);
    }
    if constexpr (kDistance > 1) meet<kLines, kDistance / 2>(thread, sum);
  }

  // A column past the last stands for it, and is not written.
  template <int kLines>
  ENGRAM_DEVICE void multiply(int first, int thread, T (&sum)[kLines * kRows]) const {
    const T* from[kLines];
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const int at = first + column<kLines>(thread) + i;
      from[i] = state + (at < columns ? at : columns - 1) * pitch;
    }
#pragma unroll
    for (int i = 0; i < kLines * kRows; ++i) sum[i] = 0;
    const int share = thread / kWarp * kShares + thread % kShares;
#pragma unroll kAhead
    for (int slot = share * kVec; slot < slots; slot += kWarps * kShares * kVec) {
      Vector x[kLines];
#pragma unroll
      for (int i = 0; i < kLines; ++i) x[i] = *reinterpret_cast<const Vector*>(from[i] + slot);
#pragma unroll
      for (int v = 0; v < kVec; ++v)
#pragma unroll
        for (int t = 0; t < kRows; t += kVec) {
          const auto w = *reinterpret_cast<const Vector*>(tile + (slot + v) * kPitch + write(thread) + t);
#pragma unroll
          for (int u = 0; u < kVec; ++u)
#pragma unroll
            for (int i = 0; i < kLines; ++i) sum[(t + u) * kLines + i] += x[i].at[v] * w.at[u];
        }
    }
  }
};

}  // namespace engram::cuda

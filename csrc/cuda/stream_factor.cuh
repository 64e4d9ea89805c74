// The small algebra of a chunk of streaming writes: I + G = L D L^T for its Gram matrix G, and products with
// L^-T.
//
// D - 1 stays on the diagonal of what is G at first: adding the 1 only where it is divided by keeps the
// digits of small gains.
#pragma once

#include "numeric.cuh"
#include "stream_plan.cuh"

namespace engram::cuda {

template <typename T>
struct StreamFactor {
  static constexpr int kWrites = StreamPlan::kWrites;
  static constexpr int kVec = kVector<T>;

  T* lower;  // [kWrites, kWrites] in shared memory: G, then L below the diagonal and D - 1 on it

  ENGRAM_DEVICE T gain(int t) const { return lower[t * (kWrites + 1)]; }  // D - 1 of a row

  // Rows from `valid` on are zero: they are factored already.
  ENGRAM_DEVICE void factor(int valid) const {
    const int thread = threadIdx.x, i = thread / kWrites, j = thread % kWrites;
    for (int k = 0; k + 1 < valid; ++k) {
      if (j > k && j <= i) lower[thread] -= lower[i * kWrites + k] / (1 + gain(k)) * lower[j * kWrites + k];
      __syncthreads();
    }
    if (j < i) lower[thread] /= 1 + gain(j);
    __syncthreads();
  }

  // x = x L^-T for rows x.
  template <int kCount>
  ENGRAM_DEVICE void eliminate(T (&x)[kCount][kWrites]) const {
#pragma unroll
    for (int t = 1; t < kWrites; ++t)
#pragma unroll
      for (int s = 0; s < t; s += kVec) {
        const auto l = *reinterpret_cast<const Pack<T, kVec>*>(lower + t * kWrites + s);
#pragma unroll
        for (int v = 0; v < kVec; ++v)
#pragma unroll
          for (int i = 0; i < kCount; ++i)
            if (s + v < t) x[i][t] -= l.at[v] * x[i][s + v];
      }
  }
};

}  // namespace engram::cuda

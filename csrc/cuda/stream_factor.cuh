// The small algebra of a chunk of streaming writes: I + G = L D L^T for its Gram matrix G, and its solutions.
//
// One warp factors, in registers: a lane has a row of G, and each step costs shuffles of the pivot and of
// what was below it, no barrier. A column of right-hand sides is a thread's, in registers too: what waits for
// another is a product and a sum.
#pragma once

#include "numeric.cuh"
#include "stream_plan.cuh"

namespace engram::cuda {

ENGRAM_DEVICE double reciprocal(double value) { return 1 / value; }

// One Newton step from the approximation: to the last bit or its neighbour, and a third of a division.
ENGRAM_DEVICE float reciprocal(float value) {
  float near;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(near) : "f"(value));
  return fmaf(near, fmaf(-value, near, 1.0f), near);
}

template <typename T>
struct StreamFactor {
  static constexpr int kWrites = StreamPlan::kWrites;
  static constexpr int kVec = kVector<T>;
  static constexpr int kPitch = kWrites + kVec;  // so that neighbouring rows begin in different banks
  static constexpr int kEntries = StreamPlan::factor(kVec);
  using Vector = Pack<T, kVec>;

  T* gram;     // [kWrites, kWrites] in shared memory, by columns: the lower triangle of G, and zeros
  T* rows;     // [kWrites, kPitch]: L below its diagonal, by rows
  T* columns;  // [kWrites, kPitch]: the same by columns
  T* gains;    // [kWrites]: D - 1, which keeps the digits of small gains
  T* shares;   // [kWrites]: 1 / D

  ENGRAM_DEVICE explicit StreamFactor(T* memory)
      : gram(memory),
        rows(gram + kWrites * kWrites),
        columns(rows + kWrites * kPitch),
        gains(columns + kWrites * kPitch),
        shares(gains + kWrites) {}

  // By the first warp, between two barriers of the block. Its upper half does what the lower does; above the
  // diagonal all lanes compute what nobody reads.
  ENGRAM_DEVICE void factor(int lane) const {
    constexpr unsigned kAll = 0xffffffffu;
    const int i = lane % kWrites;
    T row[kWrites], gain = 0, share = 0;
#pragma unroll
    for (int j = 0; j < kWrites; ++j) row[j] = gram[j * kWrites + i];
#pragma unroll
    for (int k = 0; k < kWrites; ++k) {
      const T pivot = __shfl_sync(kAll, row[k], k, kWrites), inverted = reciprocal(1 + pivot);
      const T below = row[k], l = below * inverted;
#pragma unroll
      for (int j = k + 1; j < kWrites; ++j) row[j] -= l * __shfl_sync(kAll, below, j, kWrites);
      if (i == k) gain = pivot, share = inverted;
      row[k] = i > k ? l : T(0);
    }
    if (lane >= kWrites) return;
    gains[i] = gain;
    shares[i] = share;
#pragma unroll
    for (int j = 0; j < kWrites; j += kVec) {
      Vector values;
#pragma unroll
      for (int v = 0; v < kVec; ++v) values.at[v] = row[j + v];
      *reinterpret_cast<Vector*>(rows + i * kPitch + j) = values;
    }
#pragma unroll
    for (int j = 0; j < kWrites; ++j) columns[j * kPitch + i] = row[j];
  }

  // x = D^-1 L^-1 x
  ENGRAM_DEVICE void eliminate(T (&x)[kWrites]) const {
#pragma unroll
    for (int s = 0; s < kWrites; ++s) {
#pragma unroll
      for (int t = (s + 1) / kVec * kVec; t < kWrites; t += kVec) {
        const auto l = *reinterpret_cast<const Vector*>(columns + s * kPitch + t);
#pragma unroll
        for (int v = 0; v < kVec; ++v)
          if (t + v > s) x[t + v] -= l.at[v] * x[s];
      }
    }
#pragma unroll
    for (int t = 0; t < kWrites; t += kVec) {
      const auto share = *reinterpret_cast<const Vector*>(shares + t);
#pragma unroll
      for (int v = 0; v < kVec; ++v) x[t + v] *= share.at[v];
    }
  }

  // x = L^-T x
  ENGRAM_DEVICE void substitute(T (&x)[kWrites]) const {
#pragma unroll
    for (int t = kWrites - 1; t > 0; --t)
#pragma unroll
      for (int s = 0; s < t; s += kVec) {
        const auto l = *reinterpret_cast<const Vector*>(rows + t * kPitch + s);
#pragma unroll
        for (int v = 0; v < kVec; ++v)
          if (s + v < t) x[s + v] -= l.at[v] * x[t];
      }
  }
};

}  // namespace engram::cuda

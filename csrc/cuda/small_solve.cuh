// solution[b] = system[b]^-1 @ rhs[b] for systems that fit in shared memory, in fp64.
//
// A symmetric system is eliminated as L D L^T, its columns left as L D: no step scales what another thread
// reads, so that each pivot costs one barrier. The right-hand side is eliminated along with it.
#pragma once

#include "numeric.cuh"

namespace engram::cuda {

// Every block factors its system again: the factorisation is as cheap as the solution of a tile of columns,
// and a second launch, which would have to wait for a first, is not.
template <typename Value>
struct SmallSolve {
  static constexpr int kTileCols = kWarp;
  static constexpr int kLimit = 128;

  const double* system;
  const Value* rhs;
  SystemKind kind;
  int n;
  int64_t batch, columns;
  Value* solution;
  int32_t* info;

  // Without a column there is still a system whose definiteness is asked for.
  int64_t tiles() const { return columns > 0 ? ceil_divide(columns, kTileCols) : 1; }
  int64_t blocks() const { return batch * tiles(); }

  // Packed rows of the triangle, then the tile of columns. The packing also spreads a column of the triangle
  // over the banks: i (i + 1) / 2 takes every value modulo 16 in any 16 neighbouring rows.
  static constexpr int64_t shared_bytes(int64_t n) { return (n * (n + 1) / 2 + n * kTileCols) * 8; }

  static ENGRAM_DEVICE int packed(int i, int j) { return i * (i + 1) / 2 + j; }

  ENGRAM_DEVICE void run(int64_t index, int64_t column_tiles, double* shared) const {
    const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
    const int64_t b = index / column_tiles, first_column = index % column_tiles * kTileCols;
    double* const triangle = shared;
    double* const x = shared + packed(n, 0);  // [n, kTileCols]
    const bool factor = kind == SystemKind::cholesky;
    const bool upper = kind == SystemKind::unit_upper;
    // An upper triangle is kept transposed, which is what the back substitution wants.
    const int64_t row_stride = upper ? 1 : n, column_stride = upper ? n : 1;

    for (int i = warp; i < n; i += kWarps) {
      for (int j = lane; j < (factor ? i + 1 : i); j += kWarp)
        triangle[packed(i, j)] = system[b * n * n + i * row_stride + j * column_stride];
      if (first_column + lane < columns)
        x[i * kTileCols + lane] = rhs[(b * n + i) * columns + first_column + lane];
      else
        x[i * kTileCols + lane] = 0;
    }
    __syncthreads();

    int failed = 0;
    for (int k = 0; k < n && !upper; ++k) {
      const double pivot = factor ? triangle[packed(k, k)] : 1.0;
      // A singular system need not meet a zero: what rounding leaves of a diagonal entry is no pivot either.
      const double rounding = factor ? n * 0x1p-52 * system[(b * n + k) * n + k] : 0.0;
      if (!(pivot > rounding && pivot < INFINITY)) {
        failed = k + 1;
        break;
      }
      const double inverse = 1.0 / pivot;
      for (int i = k + 1 + warp; i < n; i += kWarps) {
        const double multiplier = triangle[packed(i, k)] * inverse;
        x[i * kTileCols + lane] -= multiplier * x[k * kTileCols + lane];
        for (int j = k + 1 + lane; factor && j <= i; j += kWarp)
          triangle[packed(i, j)] -= multiplier * triangle[packed(j, k)];
      }
      __syncthreads();
    }
    for (int k = n - 1; k > 0 && !failed && kind != SystemKind::unit_lower; --k) {
      const double solved = x[k * kTileCols + lane] / (factor ? triangle[packed(k, k)] : 1.0);
      for (int i = warp; i < k; i += kWarps) x[i * kTileCols + lane] -= triangle[packed(k, i)] * solved;
      __syncthreads();
    }

    if (thread == 0 && first_column == 0) info[b] = failed;
    for (int i = warp; i < n && first_column + lane < columns; i += kWarps) {
      const double solved = x[i * kTileCols + lane] / (factor ? triangle[packed(i, i)] : 1.0);
      solution[(b * n + i) * columns + first_column + lane] = static_cast<Value>(failed ? NAN : solved);
    }
  }
};

}  // namespace engram::cuda

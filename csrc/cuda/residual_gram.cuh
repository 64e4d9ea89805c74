// residual[b] = values[b] - keys[b] @ weight[b]^T, and gram[b] = keys[b] @ preconditioned[b]^T in fp64.
//
// Both are dots of a matrix's rows with keys, written [keys, rows]. The floor of the first is reading the
// weight once. A thread takes kRows rows at a time, so that a key fetched from the first-level cache serves
// kRows products: that cache, not memory, would otherwise be the limit. The warps of a block read the same
// keys at nearly the same time; staging them in shared memory would put a barrier between a block and its
// next loads from the weight.
#pragma once

#include "numeric.cuh"

namespace engram::cuda {

template <typename Matrix, typename Key, typename Sum>
struct RowDots {
  // In fp64 a tile of sums as large would not fit the registers; and where the Gram matrix of a few keys is
  // the work of a few blocks, each must have more loads on their way.
  static constexpr bool kWide = sizeof(Sum) == 8;
  static constexpr int kVec = kVector<Key> < kVector<Matrix> ? kVector<Key> : kVector<Matrix>;
  static constexpr int kLanes = kWide ? kWarp : kWarp / 2;  // threads that share rows
  static constexpr int kRows = kWide ? 2 : 4;               // rows a thread
  static constexpr int kKeys = kWide ? 4 : 8;               // keys a block
  static constexpr int kAhead = kWide ? 4 : 2;              // vectors of each row on their way at once
  static constexpr int kWarpRows = kWarp / kLanes * kRows;
  static constexpr int64_t kEnoughBlocks = 256;  // about two for each multiprocessor of the largest devices

  struct Shared {
    Sum dot[kWarps][kWarpRows][kKeys];
  };

  const Matrix* matrix;
  WeightShape shape;
  const Key* keys;
  const Sum* values;  // what the dots are taken from; null: the result is the dots themselves
  Sum* result;
  int64_t count;
  bool vector;
  int slices;  // warps that share rows, each a part of the columns: more of them where rows are few
  int tile_rows;
  int64_t row_tiles, key_tiles;

  RowDots(const Matrix* matrix, const WeightShape& shape, const Key* keys, const Sum* values, Sum* result,
          int64_t count)
      : matrix(matrix),
        shape(shape),
        keys(keys),
        values(values),
        result(result),
        count(count),
        vector(rows_aligned(matrix, shape) && shape.cols % kVec == 0 &&
               aligned(keys, alignof(Pack<Key, kVec>))),
        slices(1),
        tile_rows(kWarps * kWarpRows),
        row_tiles(ceil_divide(shape.rows, tile_rows)),
        key_tiles(ceil_divide(count, kKeys)) {
    while (slices < kWarps && blocks() < kEnoughBlocks) {
      slices *= 2;
      tile_rows /= 2;
      row_tiles = ceil_divide(shape.rows, tile_rows);
    }
  }

  int64_t blocks() const { return shape.batch * row_tiles * key_tiles; }

  // Blocks that read the same rows are neighbours, so that the weight comes from memory once.
  ENGRAM_DEVICE void run(int64_t index, Shared& shared) const {
    const int thread = threadIdx.x;
    const int64_t b = index / (key_tiles * row_tiles);
    const int64_t first_row = index / key_tiles % row_tiles * tile_rows;
    const int64_t first_key = index % key_tiles * kKeys;
    const int active = static_cast<int>(count - first_key < kKeys ? count - first_key : kKeys);

    const Matrix* rows[kRows];
    Sum dots[kRows][kKeys];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // a row past the end stands for the last one, and is not written
      const int64_t row =
          first_row + thread / kWarp / slices * kWarpRows + thread % kWarp / kLanes * kRows + r;
      rows[r] =
          matrix + b * shape.batch_stride + (row < shape.rows ? row : shape.rows - 1) * shape.row_stride;
#pragma unroll
      for (int j = 0; j < kKeys; ++j) dots[r][j] = 0;
    }
    const Key* key = keys + (b * count + first_key) * shape.cols;
    int64_t vectors = thread / kWarp % slices * kLanes + thread % kLanes;
    if (vector) {
      vectors = accumulate<kVec, kAhead>(rows, key, active, vectors, dots);
      accumulate<kVec, 1>(rows, key, active, vectors, dots);
    } else {
      accumulate<1, 1>(rows, key, active, vectors, dots);
    }
#pragma unroll
    for (int j = 0; j < kKeys; ++j)
      if (j < active)
#pragma unroll
        for (int r = 0; r < kRows; ++r) dots[r][j] = warp_sum<kLanes>(dots[r][j]);
#pragma unroll
    for (int i = 0; i < kRows * kKeys; ++i)
      if (thread % kLanes == i % kLanes)
        shared.dot[thread / kWarp][thread % kWarp / kLanes * kRows + i / kKeys][i % kKeys] =
            dots[i / kKeys][i % kKeys];
    __syncthreads();
    for (int i = thread; i < tile_rows * active; i += kThreads) {
      const int row = i % tile_rows, j = i / tile_rows;
      if (first_row + row >= shape.rows) continue;
      Sum dot = 0;
      for (int s = 0; s < slices; ++s) dot += shared.dot[row / kWarpRows * slices + s][row % kWarpRows][j];
      const int64_t at = (b * count + first_key + j) * shape.rows + first_row + row;
      result[at] = values ? values[at] - dot : dot;
    }
  }

 private:
  // Adds the products of every (kLanes * slices)-th vector of N columns from number `at` on, `Ahead` of them
  // at once as long as that many are left. Returns the number of the first vector that it leaves.
  template <int N, int Ahead>
  ENGRAM_DEVICE int64_t accumulate(const Matrix* const (&rows)[kRows], const Key* key, int active, int64_t at,
                                   Sum (&dots)[kRows][kKeys]) const {
    const int64_t stride = kLanes * slices;
    for (; (at + (Ahead - 1) * stride) * N < shape.cols; at += Ahead * stride) {
      Pack<Matrix, N> m[Ahead][kRows];
#pragma unroll
      for (int a = 0; a < Ahead; ++a)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          m[a][r] = load_streaming(reinterpret_cast<const Pack<Matrix, N>*>(rows[r] + (at + a * stride) * N));
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        if (j > 0 && j >= active) continue;
#pragma unroll
        for (int a = 0; a < Ahead; ++a) {
          const auto k = *reinterpret_cast<const Pack<Key, N>*>(key + j * shape.cols + (at + a * stride) * N);
#pragma unroll
          for (int v = 0; v < N; ++v)
#pragma unroll
            for (int r = 0; r < kRows; ++r)
              dots[r][j] += static_cast<Sum>(widen(m[a][r].at[v])) * static_cast<Sum>(k.at[v]);
        }
      }
    }
    return at;
  }
};

}  // namespace engram::cuda

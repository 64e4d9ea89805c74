// residual[b] = values[b] - keys[b] @ weight[b]^T, and gram[b] = keys[b] @ preconditioned[b]^T in fp64.
//
// Both are dots of a matrix's rows with keys, written [keys, rows]. The floor of the first is reading the weight
// once. A warp takes kRows rows at a time, so that a key fetched from the first-level cache serves kRows products:
// that cache, not memory, would otherwise be the limit. The warps of a block read the same keys at nearly the same
// time; staging them in shared memory would put a barrier between a block and its next loads from the weight.
#pragma once

#include "numeric.cuh"

namespace engram::cuda {

template <typename Matrix, typename Key, typename Sum>
struct RowDots {
  static constexpr int kVec = kVector<Matrix>;
  static constexpr int kRows = 4;
  static constexpr int kKeys = 64 / (kRows * static_cast<int>(sizeof(Sum) / 4) * (sizeof(Sum) / 4));
  static constexpr int kDots = kRows * kKeys;
  static constexpr int64_t kEnoughBlocks = 256;  // about two for each multiprocessor of the largest devices

  struct Shared {
    Sum dot[kWarps][kDots];
  };

  struct Registers {
    Sum dot[kRows][kKeys];
  };

  const Matrix* matrix;
  WeightShape shape;
  const Key* keys;
  const Sum* values;  // what the dots are taken from; null: the result is the dots themselves
  Sum* result;
  int64_t count;
  bool vector;
  int slices;  // warps that share kRows rows, each a part of the columns: more of them where rows are few
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
        tile_rows(kWarps * kRows),
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
  template <typename Block>
  ENGRAM_DEVICE void run(Block& block, int64_t index, Shared& shared) const {
    const int64_t b = index / (key_tiles * row_tiles);
    const int64_t first_row = index / key_tiles % row_tiles * tile_rows;
    const int64_t first_key = index % key_tiles * kKeys;
    const int active = static_cast<int>(count - first_key < kKeys ? count - first_key : kKeys);
    const Key* key = keys + (b * count + first_key) * shape.cols;

    block.step([&](int thread, Registers& mine) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int j = 0; j < kKeys; ++j) mine.dot[r][j] = 0;
      if (vector)
        accumulate<kVec>(b, first_row, key, active, thread, mine);
      else
        accumulate<1>(b, first_row, key, active, thread, mine);
    });
#pragma unroll
    for (int j = 0; j < kKeys; ++j)
      if (j < active) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          block.warp_sum([=](Registers& mine) -> Sum& { return mine.dot[r][j]; });
      }
    block.step([&](int thread, Registers& mine) {
#pragma unroll
      for (int i = 0; i < kDots; ++i)
        if (thread % kWarp == i % kWarp) shared.dot[thread / kWarp][i] = mine.dot[i / kKeys][i % kKeys];
    });
    block.step([&](int thread, Registers&) {
      for (int i = thread; i < tile_rows * active; i += kThreads) {
        const int row = i % tile_rows, j = i / tile_rows;
        if (first_row + row >= shape.rows) continue;
        Sum dot = 0;
        for (int s = 0; s < slices; ++s)
          dot += shared.dot[row / kRows * slices + s][row % kRows * kKeys + j];
        const int64_t at = (b * count + first_key + j) * shape.rows + first_row + row;
        result[at] = values ? values[at] - dot : dot;
      }
    });
  }

 private:
  template <int N>
  ENGRAM_DEVICE void accumulate(int64_t b, int64_t row, const Key* key, int active, int thread,
                                Registers& mine) const {
    const int warp = thread / kWarp, lane = thread % kWarp;
    row += warp / slices * kRows;
    const Matrix* rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)  // rows past the end repeat the last one, and are not written
      rows[r] = matrix + b * shape.batch_stride + (row + r < shape.rows ? row + r : shape.rows - 1) * shape.row_stride;
    for (int64_t c = (warp % slices * kWarp + lane) * N; c < shape.cols; c += slices * kWarp * N) {
      Pack<Matrix, N> m[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        m[r] = load_streaming(reinterpret_cast<const Pack<Matrix, N>*>(rows[r] + c));
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        if (j >= active) continue;
        const auto k = *reinterpret_cast<const Pack<Key, N>*>(key + j * shape.cols + c);
#pragma unroll
        for (int v = 0; v < N; ++v)
#pragma unroll
          for (int r = 0; r < kRows; ++r)
            mine.dot[r][j] += static_cast<Sum>(widen(m[r].at[v])) * static_cast<Sum>(k.at[v]);
      }
    }
  }
};

}  // namespace engram::cuda

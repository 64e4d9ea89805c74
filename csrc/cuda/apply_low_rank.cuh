// weight[b] += scale * left[b] @ right[b], rounded once.
//
// The floor is reading and writing the weight. A thread block owns a tile of it; a thread owns kRows rows of one
// 16-byte vector, all read before anything else so that they are on their way while the factors are fetched. Sum
// and weight meet only at the end: an update is often far smaller than the weight that it is added to.
#pragma once

#include "numeric.cuh"

namespace engram::cuda {

template <typename Weight>
struct LowRankUpdate {
  using Sum = Compute<Weight>;
  static constexpr int kVec = kVector<Weight>;
  static constexpr int kRows = 8;
  static constexpr int kDepth = 16;  // ranks a step
  static constexpr int kTileRows = kWarps * kRows;
  static constexpr int kTileCols = kWarp * kVec;
  static constexpr int kQuad = kVector<Sum>;

  struct Shared {
    Pack<Sum, kTileCols> right[kDepth];
    Pack<Sum, kTileRows + kQuad> left[kDepth];  // the padding spreads the transposing stores over the banks
  };

  struct Registers {
    Pack<Weight, kVec> weight[kRows];
    Sum sum[kRows][kVec];
  };

  Weight* weight;
  WeightShape shape;
  const Sum* left;
  const Sum* right;
  int64_t rank;
  Sum scale;
  bool vector;
  int64_t row_tiles, column_tiles;

  LowRankUpdate(Weight* weight, const WeightShape& shape, const Sum* left, const Sum* right, int64_t rank,
                double scale)
      : weight(weight),
        shape(shape),
        left(left),
        right(right),
        rank(rank),
        scale(static_cast<Sum>(scale)),
        vector(rows_aligned(weight, shape)),
        row_tiles(ceil_divide(shape.rows, kTileRows)),
        column_tiles(ceil_divide(shape.cols, kTileCols)) {}

  int64_t blocks() const { return rank > 0 ? shape.batch * row_tiles * column_tiles : 0; }

  // Where a lane finds its kVec columns of `right` in shared memory: split in 16-byte pieces, so that the warp's
  // accesses are contiguous and no bank is asked twice.
  static ENGRAM_DEVICE int slot(int column) {
    const int lane = column / kVec, element = column % kVec;
    return element / kQuad * (kWarp * kQuad) + lane * kQuad + element % kQuad;
  }

  template <typename Block>
  ENGRAM_DEVICE void run(Block& block, int64_t index, Shared& shared) const {
    const int64_t b = index / (row_tiles * column_tiles);
    const int64_t first_row = index / column_tiles % row_tiles * kTileRows;
    const int64_t first_column = index % column_tiles * kTileCols;

    block.step([&](int thread, Registers& mine) { load_weight(b, first_row, first_column, thread, mine); });
    for (int64_t k = 0; k < rank; k += kDepth) {
      const int depth = static_cast<int>(rank - k < kDepth ? rank - k : kDepth);
      block.step([&](int thread, Registers&) {
        for (int i = thread; i < depth * kTileRows; i += kThreads) {
          const int row = i / depth, d = i % depth;
          shared.left[d].at[row] = first_row + row < shape.rows
                                       ? left[(b * shape.rows + first_row + row) * rank + k + d]
                                       : Sum(0);
        }
#pragma unroll 4
        for (int i = thread; i < depth * kTileCols; i += kThreads) {
          const int d = i / kTileCols, column = i % kTileCols;
          shared.right[d].at[slot(column)] =
              first_column + column < shape.cols
                  ? right[(b * rank + k + d) * shape.cols + first_column + column]
                  : Sum(0);
        }
      });
      block.step([&](int thread, Registers& mine) { accumulate(shared, depth, thread, mine); });
    }
    block.step([&](int thread, Registers& mine) { store_weight(b, first_row, first_column, thread, mine); });
  }

 private:
  ENGRAM_DEVICE Weight* position(int64_t b, int64_t row, int64_t column) const {
    return weight + b * shape.batch_stride + row * shape.row_stride + column;
  }

  ENGRAM_DEVICE void load_weight(int64_t b, int64_t row, int64_t column, int thread, Registers& mine) const {
    row += thread / kWarp * kRows;
    column += thread % kWarp * kVec;
    const bool whole = vector && column + kVec <= shape.cols;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int v = 0; v < kVec; ++v) mine.sum[r][v] = 0;
      if (row + r >= shape.rows) continue;
      const Weight* from = position(b, row + r, column);
      if (whole) {
        mine.weight[r] = load_streaming(reinterpret_cast<const Pack<Weight, kVec>*>(from));
      } else {
#pragma unroll
        for (int v = 0; v < kVec; ++v)
          if (column + v < shape.cols) mine.weight[r].at[v] = from[v];
      }
    }
  }

  ENGRAM_DEVICE void accumulate(const Shared& shared, int depth, int thread, Registers& mine) const {
    const int row = thread / kWarp * kRows, lane = thread % kWarp;
    for (int d = 0; d < depth; ++d) {
      const auto& l = *reinterpret_cast<const Pack<Sum, kRows>*>(shared.left[d].at + row);
      Pack<Sum, kQuad> r[kVec / kQuad];
#pragma unroll
      for (int q = 0; q < kVec / kQuad; ++q)
        r[q] = *reinterpret_cast<const Pack<Sum, kQuad>*>(shared.right[d].at + (q * kWarp + lane) * kQuad);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int v = 0; v < kVec; ++v) mine.sum[i][v] += l.at[i] * r[v / kQuad].at[v % kQuad];
    }
  }

  ENGRAM_DEVICE void store_weight(int64_t b, int64_t row, int64_t column, int thread, Registers& mine) const {
    row += thread / kWarp * kRows;
    column += thread % kWarp * kVec;
    const bool whole = vector && column + kVec <= shape.cols;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= shape.rows) continue;
      Weight* to = position(b, row + r, column);
#pragma unroll
      for (int v = 0; v < kVec; ++v)
        narrow(widen(mine.weight[r].at[v]) + scale * mine.sum[r][v], mine.weight[r].at[v]);
      if (whole) {
        store_streaming(reinterpret_cast<Pack<Weight, kVec>*>(to), mine.weight[r]);
      } else {
#pragma unroll
        for (int v = 0; v < kVec; ++v)
          if (column + v < shape.cols) to[v] = mine.weight[r].at[v];
      }
    }
  }
};

}  // namespace engram::cuda

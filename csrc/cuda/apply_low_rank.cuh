// weight[b] += scale * left[b] @ right[b], rounded once.
//
// The floor is reading and writing the weight. A thread block owns a tile of it; a thread owns one 16-byte
// vector of kRows rows, all read before anything else, so that they are on their way while the factors are
// fetched. Sum and weight meet only at the end: an update is often far smaller than the weight that it is
// added to. Nothing is written where `refused` points at a number that is not 0.
#pragma once

#include "numeric.cuh"

namespace engram::cuda {

template <typename Weight>
struct LowRankUpdate {
  using Sum = Compute<Weight>;
  static constexpr int kVec = kVector<Weight>;
  static constexpr int kQuad = kVector<Sum>;
  static constexpr int kDepth = 16;  // ranks a step
  // Half a warp spans the columns, so that two threads share each fetch of `right` and the tile is nearer
  // square.
  static constexpr int kLanes = kWarp / 2;
  static constexpr int kRows = 4;
  static constexpr int kTileRows = kThreads / kLanes * kRows;
  static constexpr int kTileCols = kLanes * kVec;
  // A multiprocessor, as many as its registers allow: for sm_120 the same code is given more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  static constexpr int kBlocks = kVec == 8 ? 1 : 2;
#else
  static constexpr int kBlocks = kVec == 8 ? 2 : 3;
#endif

  struct Shared {
    Pack<Sum, kTileCols> right[kDepth];
    Pack<Sum, kTileRows + kQuad> left[kDepth];  // the padding spreads the transposing stores over the banks
  };

  Weight* weight;
  WeightShape shape;
  const Sum* left;
  const Sum* right;
  int64_t rank;
  Sum scale;
  const int32_t* refused;
  bool vector;
  int64_t row_tiles, column_tiles;

  LowRankUpdate(Weight* weight, const WeightShape& shape, const Sum* left, const Sum* right, int64_t rank,
                double scale, const int32_t* refused)
      : weight(weight),
        shape(shape),
        left(left),
        right(right),
        rank(rank),
        scale(static_cast<Sum>(scale)),
        refused(refused),
        vector(rows_aligned(weight, shape)),
        row_tiles(ceil_divide(shape.rows, kTileRows)),
        column_tiles(ceil_divide(shape.cols, kTileCols)) {}

  int64_t blocks() const { return rank > 0 ? shape.batch * row_tiles * column_tiles : 0; }

  ENGRAM_DEVICE void run(int64_t index, Shared& shared) const {
    const int thread = threadIdx.x;
    const int64_t b = index / (row_tiles * column_tiles);
    const int64_t row = index / column_tiles % row_tiles * kTileRows;
    const int64_t column = index % column_tiles * kTileCols;
    const int rows = smaller(shape.rows - row, kTileRows);
    const int columns = smaller(shape.cols - column, kTileCols);
    Weight* const tile = weight + b * shape.batch_stride + row * shape.row_stride + column;

    const bool writes = refused == nullptr || *refused == 0;
    Pack<Weight, kVec> before[kRows];
    visit(tile, rows, columns, thread, [&](int r, const Weight* from, int valid) {
      if (vector && valid >= kVec)
        before[r] = load_streaming(reinterpret_cast<const Pack<Weight, kVec>*>(from));
    });
    Sum sum[kRows][kVec];
#pragma unroll
    for (int i = 0; i < kRows * kVec; ++i) sum[i / kVec][i % kVec] = 0;
    for (int64_t k = 0; k < rank; k += kDepth) {
      const int depth = smaller(rank - k, kDepth);
      stage_left(left + (b * shape.rows + row) * rank + k, rows, depth, thread, shared);
      stage_right(right + (b * rank + k) * shape.cols + column, columns, depth, thread, shared);
      __syncthreads();
#pragma unroll 1
      for (int d = 0; d < depth; ++d) accumulate(shared, d, thread, sum);
      __syncthreads();
    }
    if (!writes) return;
    visit(tile, rows, columns, thread, [&](int r, Weight* to, int valid) {
      if (vector && valid >= kVec) {
        Pack<Weight, kVec> after;
#pragma unroll
        for (int v = 0; v < kVec; ++v) narrow(widen(before[r].at[v]) + scale * sum[r][v], after.at[v]);
        store_streaming(reinterpret_cast<Pack<Weight, kVec>*>(to), after);
      } else {
#pragma unroll
        for (int v = 0; v < kVec; ++v)
          if (v < valid) narrow(widen(to[v]) + scale * sum[r][v], to[v]);
      }
    });
  }

 private:
  static ENGRAM_DEVICE int smaller(int64_t amount, int limit) {
    return amount < limit ? static_cast<int>(amount) : limit;
  }

  // Calls access(r, address, columns from there to the tile's end) for each of the thread's rows in the tile.
  template <typename Access>
  ENGRAM_DEVICE void visit(Weight* tile, int rows, int columns, int thread, const Access& access) const {
    const int row = thread / kLanes * kRows, column = thread % kLanes * kVec;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (row + r < rows && column < columns)
        access(r, tile + (row + r) * shape.row_stride + column, columns - column);
  }

  // All fetches of a stage come before its first store: one fetch takes hundreds of cycles, several little
  // more.
  ENGRAM_DEVICE void stage_left(const Sum* from, int rows, int depth, int thread, Shared& shared) const {
    constexpr int kStep = kThreads / kDepth, kCount = kTileRows / kStep;
    const int row = thread / kDepth, d = thread % kDepth;
    Sum fetched[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      fetched[i] = d < depth && row + i * kStep < rows ? from[(row + i * kStep) * rank + d] : Sum(0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) shared.left[d].at[row + i * kStep] = fetched[i];
  }

  // A thread's columns are split in 16-byte pieces, those of neighbouring threads side by side, so that no
  // bank is asked twice.
  ENGRAM_DEVICE void stage_right(const Sum* from, int columns, int depth, int thread, Shared& shared) const {
    constexpr int kStep = kThreads / kTileCols, kCount = kDepth / kStep;
    const int d = thread / kTileCols, column = thread % kTileCols;
    const int slot = (column % kVec / kQuad * kLanes + column / kVec) * kQuad + column % kQuad;
    Sum fetched[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      fetched[i] =
          d + i * kStep < depth && column < columns ? from[(d + i * kStep) * shape.cols + column] : Sum(0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) shared.right[d + i * kStep].at[slot] = fetched[i];
  }

  static ENGRAM_DEVICE void accumulate(const Shared& shared, int d, int thread, Sum (&sum)[kRows][kVec]) {
    using Piece = Pack<Sum, kQuad>;
    const int row = thread / kLanes * kRows, lane = thread % kLanes;
    const auto l = *reinterpret_cast<const Pack<Sum, kRows>*>(shared.left[d].at + row);
#pragma unroll
    for (int q = 0; q < kVec / kQuad; ++q) {
      const auto r = *reinterpret_cast<const Piece*>(shared.right[d].at + (q * kLanes + lane) * kQuad);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int v = 0; v < kQuad; ++v) sum[i][q * kQuad + v] += l.at[i] * r.at[v];
    }
  }
};

}  // namespace engram::cuda

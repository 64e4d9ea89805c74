// The associative write, compiled once for each instruction set (isa.h).
//
// Each result element is computed by one thread in one order that depends on the shape alone: the results are
// the same bits for every number of threads.
#include <cstddef>
#include <type_traits>

#include "engram/low_rank.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

// A thread is worth waking for this many multiply-adds, some ten microseconds.
constexpr int64_t kWorkPerThread = 1 << 18;

int threads_for(int threads, int64_t work) {
  const int64_t useful = smaller(threads, ceil_div(work, kWorkPerThread));
  return useful < 1 ? 1 : static_cast<int>(useful);
}

// ---- weight += scale * left @ right

// A register tile of the update: kTileRows x kTileVectors accumulators, beside them one row of `right` and
// one broadcast element of `left`.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;
// Products are summed in chains of this many: the error grows with the chain, not with the rank.
constexpr int64_t kChain = 256;
// Bytes of `right` that a thread keeps packed: a share of the second-level cache.
constexpr int64_t kPanelBytes = 1 << 18;
constexpr int64_t kRowsPerUnit = 48;

// One register tile of kRows rows. `panel` holds its columns of `right`, tile after tile for each k.
template <class Type, int kRows>
void update_tile(typename Type::Element* weight, const typename Type::Element* later, int64_t row_stride,
                 const typename Type::Compute* left, const typename Type::Compute* panel, int64_t rank,
                 typename Type::Compute scale) {
  using T = typename Type::Compute;
  using V = Vector<T, Type::kLanes>;
  constexpr int kLanes = Type::kLanes;
  // A later tile is asked for, or weights from memory would be waited for in each.
  constexpr int64_t kTile = kTileVectors * kLanes, kLine = 64 / sizeof(*weight);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int64_t c = 0; c < kTile; c += kLine) __builtin_prefetch(later + i * row_stride + c, 1);
  }
  V sum[kRows][kTileVectors] = {};
  const auto add_chain = [&](int64_t first, int64_t last, V(&into)[kRows][kTileVectors]) {
    for (int64_t k = first; k < last; ++k) {
      V r[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) r[v] = load<V>(panel + (k * kTileVectors + v) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const V l = left[i * rank + k] - V{};  // broadcast: x - 0 is x, -0 too
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v) into[i][v] += l * r[v];
      }
    }
  };
  add_chain(0, smaller(rank, kChain), sum);
  for (int64_t first = kChain; first < rank; first += kChain) {
    V chain[kRows][kTileVectors] = {};
    add_chain(first, smaller(rank, first + kChain), chain);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kTileVectors; ++v) sum[i][v] += chain[i][v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; v += 2) {
      typename Type::Element* w = weight + i * row_stride + v * kLanes;
      V first, second;
      Type::load_pair(w, first, second);
      Type::store_pair(w, first + scale * sum[i][v], second + scale * sum[i][v + 1]);
    }
  }
}

// kRows rows of `columns` columns. The last tile, where it is not whole, is updated in a copy.
template <class Type, int kRows>
void update_rows(typename Type::Element* weight, int64_t row_stride, const typename Type::Compute* left,
                 const typename Type::Compute* panel, int64_t rank, typename Type::Compute scale,
                 int64_t columns) {
  constexpr int64_t kTile = kTileVectors * Type::kLanes;
  int64_t c = 0;
  for (; c + kTile <= columns; c += kTile) {
    const int64_t ahead = c + kAheadBytes / int64_t{sizeof(*weight)};
    const auto* later = weight + (ahead < columns ? ahead : kRows * row_stride + ahead - columns);
    update_tile<Type, kRows>(weight + c, later, row_stride, left, panel + c * rank, rank, scale);
  }
  if (c == columns) return;
  typename Type::Element edge[kRows * kTile] = {};
  const int64_t bytes = (columns - c) * sizeof(*edge);
  for (int i = 0; i < kRows; ++i) std::memcpy(edge + i * kTile, weight + i * row_stride + c, bytes);
  update_tile<Type, kRows>(edge, edge, kTile, left, panel + c * rank, rank, scale);
  for (int i = 0; i < kRows; ++i) std::memcpy(weight + i * row_stride + c, edge + i * kTile, bytes);
}

// Columns [0, columns) of `right`, tile by tile, the last one padded with zeros, in the order of Type's
// pairs.
template <class Type>
void pack(const typename Type::Compute* right, int64_t row_stride, int64_t rank, int64_t columns,
          typename Type::Compute* panel) {
  using T = typename Type::Compute;
  constexpr int kLanes = Type::kLanes;
  constexpr int64_t kTile = kTileVectors * kLanes;
  for (int64_t column = 0; column < columns; column += kTile) {
    const int64_t width = smaller(kTile, columns - column);
    for (int64_t k = 0; k < rank; ++k, panel += kTile) {
      T tile[kTile] = {};
      std::memcpy(tile, right + k * row_stride + column, width * sizeof(T));
      for (int c = 0; c < kTile; ++c) {
        const int pair = c / (2 * kLanes) * (2 * kLanes), lane = c % kLanes, second = c / kLanes % 2;
        panel[c] = tile[Type::kInterleaved ? pair + 2 * lane + second : c];
      }
    }
  }
}

// Whether no number is NaN or infinite: x - x is 0 for the others.
template <class T>
bool all_finite(const T* numbers, int64_t count, int threads) {
  constexpr int kLanes = kVectorBytes / sizeof(T);
  using V = Vector<T, kLanes>;
  const int64_t vectors = count / kLanes;
  bool finite = true;
  threads = threads_for(threads, count);
  parallel(threads, [&](int thread) {
    V sum{};
    for (int64_t i = vectors * thread / threads; i < vectors * (thread + 1) / threads; ++i) {
      const V v = load<V>(numbers + i * kLanes);
      sum += v - v;
    }
    T all = 0;
    for (int lane = 0; lane < kLanes; ++lane) all += sum[lane];
    if (!(all == 0)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
  });
  for (int64_t i = vectors * kLanes; i < count; ++i) finite &= numbers[i] - numbers[i] == 0;
  return finite;
}

template <class Type>
void apply(typename Type::Element* weight, WeightShape shape, const typename Type::Compute* left,
           const typename Type::Compute* right, int64_t rank, double scale, int threads) {
  using T = typename Type::Compute;
  constexpr int64_t kTile = kTileVectors * Type::kLanes;
  // A unit of work is one block of rows of one panel of columns. Rows run fastest, so that a thread's units
  // are neighbours and it packs few panels.
  const int64_t budget = kPanelBytes / (rank * sizeof(T)) / kTile * kTile;
  const int64_t width = smaller(budget < kTile ? kTile : budget, ceil_div(shape.cols, kTile) * kTile);
  const int64_t panels = ceil_div(shape.cols, width);
  const int64_t blocks = ceil_div(shape.rows, kRowsPerUnit);
  const int64_t units = shape.batch * panels * blocks;
  threads = threads_for(threads, shape.batch * shape.rows * shape.cols * rank);
  const Scratch<T> scratch(threads * width * rank);
  const Scratch<int64_t> packed(threads);  // the panel that each thread has packed
  for (int i = 0; i < threads; ++i) packed.data()[i] = -1;

  parallel_for(threads, units, [&](int64_t unit, int thread) {
    T* panel = scratch.data() + thread * width * rank;
    const int64_t batch = unit / (panels * blocks);
    const int64_t column = unit / blocks % panels * width;
    const int64_t columns = smaller(width, shape.cols - column);
    if (packed.data()[thread] != unit / blocks) {
      packed.data()[thread] = unit / blocks;
      pack<Type>(right + batch * rank * shape.cols + column, shape.cols, rank, columns, panel);
    }
    const int64_t first = unit % blocks * kRowsPerUnit;
    const int64_t last = smaller(shape.rows, first + kRowsPerUnit);
    for (int64_t row = first; row < last;) {
      const int64_t step = last - row >= kTileRows ? kTileRows : 1;
      const auto update = step == 1 ? update_rows<Type, 1> : update_rows<Type, kTileRows>;
      update(weight + batch * shape.batch_stride + row * shape.row_stride + column, shape.row_stride,
             left + (batch * shape.rows + row) * rank, panel, rank, static_cast<T>(scale), columns);
      row += step;
    }
  });
}

// ---- residual = values - keys @ weight^T, gram = keys @ preconditioned^T

// Rows of the matrix that are widened together, kBlock columns at a time, and stay in the first-level cache.
constexpr int kPanelRows = 16;
constexpr int64_t kBlock = 256;
// A register tile of products: kGroup rows x kKeys keys.
constexpr int kGroup = 4;
constexpr int kKeys = kRegisters == 32 ? 6 : 3;

// sums[j][i] += panel[i] . keys[j] over `columns` columns, lane by lane.
template <class Type, int kCount>
void multiply_tile(const typename Type::Compute* panel, const typename Type::Compute* keys,
                   int64_t key_stride, int64_t columns, typename Type::Compute* sums) {
  using T = typename Type::Compute;
  using V = Vector<T, Type::kLanes>;
  constexpr int kLanes = Type::kLanes;
  V sum[kCount][kGroup] = {};
  int64_t c = 0;
  const auto step = [&](auto load_key) {
    V p[kGroup];
    for (int i = 0; i < kGroup; ++i) p[i] = load<V>(panel + i * kBlock + c);
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) {
      const V k = load_key(keys + j * key_stride + c);
#pragma GCC unroll 8
      for (int i = 0; i < kGroup; ++i) sum[j][i] += k * p[i];
    }
  };
  for (; c + kLanes <= columns; c += kLanes) step([](const T* key) { return load<V>(key); });
  if (c < columns) step([&](const T* key) { return load_some<Plain<T>>(key, columns - c); });
  for (int j = 0; j < kCount; ++j) {
    for (int i = 0; i < kGroup; ++i) {
      T* s = sums + (j * kPanelRows + i) * kLanes;
      const V after = load<V>(s) + sum[j][i];
      std::memcpy(s, &after, sizeof(after));
    }
  }
}

template <class Type, int kCount = kKeys>
void multiply(int64_t count, const typename Type::Compute* panel, const typename Type::Compute* keys,
              int64_t key_stride, int64_t columns, typename Type::Compute* sums) {
  if constexpr (kCount > 1) {
    if (count < kCount) return multiply<Type, kCount - 1>(count, panel, keys, key_stride, columns, sums);
  }
  multiply_tile<Type, kCount>(panel, keys, key_stride, columns, sums);
}

// Hands sink(i, j, matrix[i] . keys[j]) every product of `rows` <= kPanelRows rows with `count` keys.
// Sums run over kBlock columns, lane by lane, then over the blocks, then in double over the lanes.
template <class Type, class Sink>
void products(const typename Type::Element* matrix, int64_t row_stride, int64_t rows,
              const typename Type::Compute* keys, int64_t count, int64_t cols, typename Type::Compute* sums,
              Sink sink) {
  using T = typename Type::Compute;
  constexpr int kLanes = Type::kLanes;
  alignas(64) T panel[kPanelRows * kBlock];
  std::memset(sums, 0, count * kPanelRows * kLanes * sizeof(T));
  if (rows < kPanelRows) std::memset(panel, 0, sizeof(panel));
  for (int64_t column = 0; column < cols; column += kBlock) {
    const int64_t columns = smaller(kBlock, cols - column);
    // A later block is asked for, of the same rows or of the next ones.
    const int64_t later = (column + kBlock < cols ? kBlock : kPanelRows * row_stride - column) *
                          static_cast<int64_t>(sizeof(*matrix));
    for (int64_t i = 0; i < rows; ++i) {
      const auto* row = matrix + i * row_stride + column;
      T* to = panel + i * kBlock;
      int64_t c = 0;
      for (; c + kLanes <= columns; c += kLanes) {
        if (c % (64 / sizeof(*row)) == 0) ask_ahead(row + c, later);
        const auto v = Type::load(row + c);
        std::memcpy(to + c, &v, sizeof(v));
      }
      if (c < columns) {
        const auto v = load_some<Type>(row + c, columns - c);
        std::memcpy(to + c, &v, sizeof(v));
      }
    }
    for (int64_t j = 0; j < count; j += kKeys) {
      for (int64_t i = 0; i < rows; i += kGroup) {
        multiply<Type>(smaller(kKeys, count - j), panel + i * kBlock, keys + j * cols + column, cols, columns,
                       sums + (j * kPanelRows + i) * kLanes);
      }
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      double sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) sum += sums[(j * kPanelRows + i) * kLanes + lane];
      sink(i, j, sum);
    }
  }
}

// `Key` is how a key is stored where it takes the matrix's part in the Gram product, computed in double.
template <class Type, class Key>
void residual_and_gram(const typename Type::Element* weight, WeightShape shape,
                       const typename Type::Compute* keys, const typename Type::Compute* values,
                       const double* preconditioned, int64_t count, typename Type::Compute* residual,
                       double* gram, int threads) {
  using T = typename Type::Compute;
  const int64_t batch = shape.batch, rows = shape.rows, cols = shape.cols;
  const int64_t weight_panels = batch * ceil_div(rows, kPanelRows);
  const int64_t gram_panels = batch * ceil_div(count, kPanelRows);
  threads = threads_for(threads, batch * (rows + count) * cols * count);
  const int64_t sums_bytes = count * kPanelRows * kVectorBytes;
  Scratch<char> scratch(threads * sums_bytes);

  parallel(threads, [&](int thread) {
    void* sums = scratch.data() + thread * sums_bytes;
    for (int64_t unit = weight_panels * thread / threads; unit < weight_panels * (thread + 1) / threads;
         ++unit) {
      const int64_t b = unit / ceil_div(rows, kPanelRows);
      const int64_t first = unit % ceil_div(rows, kPanelRows) * kPanelRows;
      const int64_t origin = b * count * rows + first;
      products<Type>(weight + b * shape.batch_stride + first * shape.row_stride, shape.row_stride,
                     smaller(kPanelRows, rows - first), keys + b * count * cols, count, cols,
                     static_cast<T*>(sums), [&](int64_t i, int64_t j, double product) {
                       const int64_t at = origin + j * rows + i;
                       residual[at] = static_cast<T>(values[at] - product);
                     });
    }
    for (int64_t unit = gram_panels * thread / threads; unit < gram_panels * (thread + 1) / threads; ++unit) {
      const int64_t b = unit / ceil_div(count, kPanelRows);
      const int64_t first = unit % ceil_div(count, kPanelRows) * kPanelRows;
      double* to = gram + (b * count + first) * count;
      products<Key>(keys + (b * count + first) * cols, cols, smaller(kPanelRows, count - first),
                    preconditioned + b * count * cols, count, cols, static_cast<double*>(sums),
                    [&](int64_t i, int64_t j, double product) { to[i * count + j] = product; });
    }
  });
}

}  // namespace

// Calls body(storage type) for the weight's.
template <class Body>
static void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::f32:
      return body(F32{});
    case DType::bf16:
      return body(BF16{});
    case DType::f16:
      return body(F16{});
    case DType::f64:
      return body(F64{});
  }
}

bool apply_low_rank(void* weight, DType dtype, WeightShape shape, const void* left, const void* right,
                    int64_t rank, double scale, bool look, int threads) {
  bool sound = true;
  with_type(dtype, [&](auto type) {
    using Type = decltype(type);
    using T = typename Type::Compute;
    if (look) {
      sound = all_finite(static_cast<const T*>(left), shape.batch * shape.rows * rank, threads) &&
              all_finite(static_cast<const T*>(right), shape.batch * rank * shape.cols, threads);
    }
    if (!sound || shape.batch == 0 || shape.rows == 0 || shape.cols == 0 || rank == 0) return;
    apply<Type>(static_cast<typename Type::Element*>(weight), shape, static_cast<const T*>(left),
                static_cast<const T*>(right), rank, scale, threads);
  });
  return sound;
}

void residual_gram(const void* weight, DType dtype, WeightShape shape, const void* keys, const void* values,
                   const double* preconditioned, int64_t count, void* residual, double* gram, int threads) {
  if (shape.batch == 0 || count == 0) return;
  with_type(dtype, [&](auto type) {
    using Type = decltype(type);
    using T = typename Type::Compute;
    using Key = std::conditional_t<std::is_same_v<T, double>, F64, F32AsF64>;
    residual_and_gram<Type, Key>(static_cast<const typename Type::Element*>(weight), shape,
                                 static_cast<const T*>(keys), static_cast<const T*>(values), preconditioned,
                                 count, static_cast<T*>(residual), gram, threads);
  });
}

}  // namespace engram::cpu::ENGRAM_ISA

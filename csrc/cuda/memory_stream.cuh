// N sequential writes to a memory, a readout after each, kWrites rows W and their latents Z at a time.
//
// X = [P | M] is the state, Y = [0 | Z] what W X should be. A chunk is one recursion for all columns of X:
//   U = P W^T,  I + W U = L D L^T,  E = D^-1 L^-1 (Y - W X),  X += U (L^-T E)
// Row t reads z_t - E_t of M's columns, and has the leverage 1 - 1/D_t. Every block owns some columns of X.
// Once a chunk it needs U and W U of the others; both follow from X after the chunk before, so that one
// barrier of the grid a chunk is enough. P is symmetric: a column of P is the row that lies in memory. Rows
// that the last chunk lacks are zero, and change nothing.
#pragma once

#include "grid.cuh"
#include "stream_factor.cuh"
#include "stream_products.cuh"

namespace engram::cuda {

template <typename T, bool kResident>  // whether a block's columns fit in shared memory
struct MemoryStream {
  static constexpr int kWrites = StreamPlan::kWrites;
  static constexpr int kVec = kVector<T>;
  static constexpr int kTile = StreamPlan::tile(sizeof(T));
  static constexpr int kEach = kTile / kThreads;  // slots of a tile that a thread looks at

  using Factor = StreamFactor<T>;
  using Products = StreamProducts<T>;
  using Vector = Pack<T, kVec>;

  // What a block has of its own from one barrier of the grid to the next.
  struct Shared {
    T* tile;  // [slots of a tile, Products::kPitch]: rows of the chunk that comes, transposed
    T* sums;  // what the products need, and before them the sum of the Gram matrix' parts
    Factor small;
    T* weights;   // [columns, kWrites]: the tile's rows at the columns of P
    T* products;  // [columns, kWrites]: W X of the chunk that comes
    T* steps;     // [columns, kWrites]: Y, then L^-T E
    T* state;     // [columns, pitch]: X
  };

  // Rows of U or of W^T that a thread has of a tile.
  using Rows = T[kEach][kWrites];
  // Whether the registers hold the next chunk's rows from before the factorisation on.
  static constexpr bool kEarly = kResident && sizeof(T) == 4;

  // A block's part of a group's work.
  struct Member {
    int group, index;
    int first;  // of its columns
    int columns;
    int squares;  // how many of them are P's: the first
  };

  const T* precision_inverse;
  const T* memory;
  const T* weights;
  const T* latents;
  T* new_precision_inverse;
  T* new_memory;
  T* readouts;
  T* leverages;
  char* workspace;
  StreamShape shape;
  StreamPlan plan;

  ENGRAM_DEVICE Member member(int index) const {
    Member m;
    m.group = index / plan.members;
    m.index = index % plan.members;
    m.first = m.index * static_cast<int>(plan.columns);
    m.columns = smaller(shape.slots + shape.width - m.first, static_cast<int>(plan.columns));
    m.squares = m.first < shape.slots ? smaller(shape.slots - m.first, m.columns) : 0;
    return m;
  }

  ENGRAM_DEVICE Shared share(int index, T* memory_of_block) const {
    T* const sums = memory_of_block + padded(smaller(shape.slots, kTile)) * Products::kPitch;
    T* const columns = sums + StreamPlan::kSums + Factor::kEntries;
    const int64_t each = plan.columns * kWrites;
    T* state = columns + 3 * each;
    if constexpr (!kResident)
      state = reinterpret_cast<T*>(workspace + plan.state) + index * plan.columns * plan.pitch;
    return {memory_of_block,    sums, Factor(sums + StreamPlan::kSums), columns, columns + each,
            columns + 2 * each, state};
  }

  // Takes memory b, and hands out what the first chunk needs as exchange number `turn`.
  ENGRAM_DEVICE void begin(const Member& m, int64_t b, uint32_t turn, const Shared& shared) const {
    move<true>(m, b, shared);
    if (shape.count == 0) return;
    Rows weight, inverse;
    if constexpr (kEarly) fetch_weights(b, 0, 0, threadIdx.x, weight);
    sweep<false>(m, b, 0, turn, weight, inverse, shared);
    publish(m, b, 0, turn, shared);
  }

  // Between two barriers: writes the chunk that begins at `row` from exchange number `turn`, and hands out
  // what the next chunk needs as the exchange after it.
  ENGRAM_DEVICE void write(const Member& m, int64_t b, int64_t row, uint32_t turn,
                           const Shared& shared) const {
    const int thread = threadIdx.x;
    Rows weight, inverse;  // on their way while the chunk is factored
    fetch_inverse(m, turn, 0, thread, inverse);
    if constexpr (kEarly) fetch_weights(b, row + kWrites, 0, thread, weight);
    gather(m, turn, thread, shared);
    if (thread < kWarp) shared.small.factor(thread);
    __syncthreads();
    const int valid = smaller(shape.count - row, kWrites);
    if (m.index == 0 && thread < valid)
      leverages[b * shape.count + row + thread] = shared.small.gains[thread] * shared.small.shares[thread];
    eliminate(m, b, row, valid, thread, shared);
    __syncthreads();
    sweep<true>(m, b, row + kWrites, turn, weight, inverse, shared);
    if (row + kWrites < shape.count) publish(m, b, row + kWrites, turn + 1, shared);
  }

  ENGRAM_DEVICE void end(const Member& m, int64_t b, const Shared& shared) const {
    move<false>(m, b, shared);
  }

 private:
  static ENGRAM_DEVICE int smaller(int64_t amount, int limit) {
    return amount < limit ? static_cast<int>(amount) : limit;
  }
  static ENGRAM_DEVICE int padded(int amount) { return (amount + kVec - 1) / kVec * kVec; }

  // Where the blocks of a group leave U, as pieces of kVec of its entries [kWrites / kVec, K, kVec] so that
  // neighbouring threads read neighbours, and each with columns of P its part of W U, a packed lower
  // triangle.
  ENGRAM_DEVICE T* inverse_of(const Member& m, uint32_t turn) const {
    return reinterpret_cast<T*>(workspace + plan.inverse) + (2 * m.group + turn % 2) * shape.slots * kWrites;
  }
  ENGRAM_DEVICE T* gram_of(const Member& m, uint32_t turn) const {
    return reinterpret_cast<T*>(workspace + plan.gram) +
           (2 * m.group + turn % 2) * plan.holders * StreamPlan::kPart;
  }
  static ENGRAM_DEVICE bool in_lower(int thread) { return thread % kWrites <= thread / kWrites; }
  static ENGRAM_DEVICE int packed(int thread) {
    const int row = thread / kWrites;
    return row * (row + 1) / 2 + thread % kWrites;
  }

  // Brings the block's columns of memory b into the state, or out of it. Neighbours in memory are
  // neighbouring threads'; several are on their way at once.
  template <bool kIn>
  ENGRAM_DEVICE void move(const Member& m, int64_t b, const Shared& shared) const {
    constexpr int kBatch = 4;
    const int thread = threadIdx.x, slots = static_cast<int>(shape.slots), wide = m.columns - m.squares;
    for (int begin = thread; begin < m.columns * slots; begin += kBatch * kThreads) {
      T* to[kBatch];
      T values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = begin + i * kThreads, other = at - m.squares * slots;
        if (at >= m.columns * slots) continue;
        const bool square = other < 0;
        const int column = square ? at / slots : m.squares + other % wide;
        const int slot = square ? at % slots : other / wide;
        const int64_t place = square ? (b * slots + m.first + column) * slots + slot
                                     : (b * slots + slot) * shape.width + m.first + column - slots;
        T* const inside = shared.state + column * plan.pitch + slot;
        to[i] = kIn ? inside : (square ? new_precision_inverse : new_memory) + place;
        values[i] = kIn ? (square ? precision_inverse : memory)[place] : *inside;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (begin + i * kThreads < m.columns * slots) *to[i] = values[i];
    }
    const int padding = static_cast<int>(plan.pitch) - slots;
    for (int i = thread; kIn && i < m.columns * padding; i += kThreads)
      shared.state[i / padding * plan.pitch + slots + i % padding] = 0;
  }

  ENGRAM_DEVICE void fetch_inverse(const Member& m, uint32_t turn, int64_t first, int thread,
                                   Rows& inverse) const {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int64_t slot = first + e * kThreads + thread;
#pragma unroll
      for (int t = 0; t < kWrites; t += kVec) {
        Vector values = {};
        if (slot < shape.slots)
          values = load_exchanged(
              reinterpret_cast<const Vector*>(inverse_of(m, turn) + t * shape.slots + slot * kVec));
#pragma unroll
        for (int v = 0; v < kVec; ++v) inverse[e][t + v] = values.at[v];
      }
    }
  }

  // W^T of the chunk that begins at `row`, at the tile's slots from `first` on.
  ENGRAM_DEVICE void fetch_weights(int64_t b, int64_t row, int64_t first, int thread, Rows& weight) const {
    const int rows = smaller(shape.slots - first, kTile);
#pragma unroll
    for (int e = 0; e < kEach; ++e)
#pragma unroll
      for (int t = 0; t < kWrites; ++t) {
        const int slot = e * kThreads + thread;
        weight[e][t] = slot < rows && row + t < shape.count
                           ? weights[(b * shape.count + row + t) * shape.slots + first + slot]
                           : T(0);
      }
  }

  // The lower triangle of W U as the sum of its parts, in an order that never varies: teams of threads sum
  // every so many of them, a vector a thread, all on their way at once.
  ENGRAM_DEVICE void gather(const Member& m, uint32_t turn, int thread, const Shared& shared) const {
    constexpr int kPart = StreamPlan::kPart, kPieces = kPart / kVec, kTeams = kThreads / kPieces;
    constexpr int kBatch = 8;
    static_assert(kTeams * kPart <= StreamPlan::kSums);
    const int team = thread / kPieces;
    const T* const parts = gram_of(m, turn) + thread % kPieces * kVec;
    Vector sum = {};
    for (int64_t begin = team; team < kTeams && begin < plan.holders; begin += kBatch * kTeams) {
      Vector part[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t holder = begin + i * kTeams;
        part[i] = {};
        if (holder < plan.holders)
          part[i] = load_exchanged(reinterpret_cast<const Vector*>(parts + holder * kPart));
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
#pragma unroll
        for (int v = 0; v < kVec; ++v) sum.at[v] += part[i].at[v];
    }
    if (team < kTeams) *reinterpret_cast<Vector*>(shared.sums + thread * kVec) = sum;
    __syncthreads();
    T total = 0;
    if (in_lower(thread))
#pragma unroll
      for (int i = 0; i < kTeams; ++i) total += shared.sums[i * kPart + packed(thread)];
    shared.small.gram[thread % kWrites * kWrites + thread / kWrites] = total;
    __syncthreads();
  }

  // E and the readouts, then L^-T E in the place of Y: a column a thread.
  ENGRAM_DEVICE void eliminate(const Member& m, int64_t b, int64_t row, int valid, int thread,
                               const Shared& shared) const {
    for (int column = thread; column < m.columns; column += kThreads) {
      T* const steps = shared.steps + column * kWrites;
      T error[kWrites];
#pragma unroll
      for (int t = 0; t < kWrites; t += kVec) {
        const auto y = *reinterpret_cast<const Vector*>(steps + t);
        const auto product = *reinterpret_cast<const Vector*>(shared.products + column * kWrites + t);
#pragma unroll
        for (int v = 0; v < kVec; ++v) error[t + v] = y.at[v] - product.at[v];
      }
      shared.small.eliminate(error);
#pragma unroll
      for (int t = 0; t < kWrites; ++t)
        if (column >= m.squares && t < valid)
          readouts[(b * shape.count + row + t) * shape.width + m.first + column - shape.slots] =
              steps[t] - error[t];
      shared.small.substitute(error);
#pragma unroll
      for (int t = 0; t < kWrites; t += kVec) {
        Vector step;
#pragma unroll
        for (int v = 0; v < kVec; ++v) step.at[v] = error[t + v];
        *reinterpret_cast<Vector*>(steps + t) = step;
      }
    }
  }

  // Y of the chunk that begins at `row`.
  ENGRAM_DEVICE void fetch_latents(const Member& m, int64_t b, int64_t row, int thread,
                                   const Shared& shared) const {
    constexpr int kBatch = 4;
    for (int begin = thread; begin < m.columns * kWrites; begin += kBatch * kThreads) {
      T values[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = begin + i * kThreads, column = at % m.columns, t = at / m.columns;
        values[i] = t < kWrites && column >= m.squares && row + t < shape.count
                        ? latents[(b * shape.count + row + t) * shape.width + m.first + column - shape.slots]
                        : T(0);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = begin + i * kThreads, column = at % m.columns, t = at / m.columns;
        if (t < kWrites) shared.steps[column * kWrites + t] = values[i];
      }
    }
  }

  // X += U (L^-T E) if asked to, then the products of X with the chunk that begins at `next`, in one pass
  // over X. The first tile's rows of U have been fetched, and those of the chunk if that is early.
  template <bool kUpdate>
  ENGRAM_DEVICE void sweep(const Member& m, int64_t b, int64_t next, uint32_t turn, Rows& weight,
                           Rows& inverse, const Shared& shared) const {
    const int thread = threadIdx.x;
    for (int64_t first = 0; first < shape.slots; first += kTile) {
      const int rows = smaller(shape.slots - first, kTile);
      if (!kEarly || first > 0) fetch_weights(b, next, first, thread, weight);
      if constexpr (kUpdate) {
        if (first > 0) fetch_inverse(m, turn, first, thread, inverse);
        change_state(m, first, rows, thread, inverse, shared);
      }
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int slot = e * kThreads + thread;
        if (slot >= padded(rows)) continue;
        const int64_t square = first + slot - m.first;
        const bool own = 0 <= square && square < m.squares;
#pragma unroll
        for (int t = 0; t < kWrites; t += kVec) {
          Vector values;
#pragma unroll
          for (int v = 0; v < kVec; ++v) values.at[v] = weight[e][t + v];
          *reinterpret_cast<Vector*>(shared.tile + slot * Products::kPitch + t) = values;
          if (own) *reinterpret_cast<Vector*>(shared.weights + square * kWrites + t) = values;
        }
      }
      __syncthreads();
      if (next >= shape.count) continue;
      const Products products = {shared.state + first, plan.pitch,   m.columns,   plan.group,
                                 shared.tile,          padded(rows), shared.sums, shared.products};
      products.run(first > 0);
    }
  }

  ENGRAM_DEVICE void change_state(const Member& m, int64_t first, int rows, int thread, const Rows& inverse,
                                  const Shared& shared) const {
    constexpr int kBatch = kVector<T> * 2;
#pragma unroll 1
    for (int begin = 0; begin < m.columns; begin += kBatch) {
      T* const state = shared.state + begin * plan.pitch + first + thread;
      T x[kBatch][kEach];  // all on their way at once: a state that does not fit is far
#pragma unroll
      for (int c = 0; c < kBatch; ++c)
#pragma unroll
        for (int e = 0; e < kEach; ++e)
          if (begin + c < m.columns && e * kThreads + thread < rows)
            x[c][e] = state[c * plan.pitch + e * kThreads];
#pragma unroll
      for (int c = 0; c < kBatch; ++c) {
        if (begin + c >= m.columns) continue;
        T step[kWrites];
#pragma unroll
        for (int t = 0; t < kWrites; t += kVec) {
          const auto values = *reinterpret_cast<const Vector*>(shared.steps + (begin + c) * kWrites + t);
#pragma unroll
          for (int v = 0; v < kVec; ++v) step[t + v] = values.at[v];
        }
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          if (e * kThreads + thread >= rows) continue;
#pragma unroll
          for (int t = 0; t < kWrites; ++t) x[c][e] += inverse[e][t] * step[t];
          state[c * plan.pitch + e * kThreads] = x[c][e];
        }
      }
    }
  }

  // Hands out what others need. The latents are fetched on this side of the barrier: they come from memory,
  // which takes longest, and wait for nobody.
  ENGRAM_DEVICE void publish(const Member& m, int64_t b, int64_t row, uint32_t turn,
                             const Shared& shared) const {
    const int thread = threadIdx.x;
    fetch_latents(m, b, row, thread, shared);
    if (m.squares == 0) return;
    T* const inverse = inverse_of(m, turn) + m.first * kVec;
    for (int i = thread; i < m.squares * (kWrites / kVec); i += kThreads) {
      const int slot = i % m.squares, piece = i / m.squares;
      *reinterpret_cast<Vector*>(inverse + (piece * shape.slots + slot) * kVec) =
          *reinterpret_cast<const Vector*>(shared.products + slot * kWrites + piece * kVec);
    }
    if (!in_lower(thread)) return;
    T sum = 0;
    for (int i = 0; i < m.squares; ++i)
      sum += shared.weights[i * kWrites + thread / kWrites] * shared.products[i * kWrites + thread % kWrites];
    gram_of(m, turn)[m.index * StreamPlan::kPart + packed(thread)] = sum;
  }
};

}  // namespace engram::cuda

// Episodic memory, compiled once for each instruction set (isa.h).
//
// A write and the next row's products with the state are one pass over it: each element is loaded, updated,
// stored, and multiplied while it is in a register. Each result is computed by one thread in one order that
// depends on the shape alone: the results are the same bits for every number of threads.
#include "engram/memory.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

// A thread is worth starting for this many multiply-adds.
constexpr int64_t kWorkPerThread = 1 << 15;
// Vectors of a row of the state that are updated together, with as many sums beside them.
constexpr int kTileVectors = kRegisters == 32 ? 8 : 4;

// What a pass over a matrix [slots, columns] does.
enum class Do { multiply, update, both };

template <class T>
struct Pass {
  const T* from;
  T* to;  // update: to = from + scale^T row
  int64_t slots, columns;
  const T *scale, *row;
  const T* next;  // multiply: product = next to, or next from
  T* product;
};

// kVectors whole vectors of columns from `first` on, or with kSome the first `count` lanes of one.
template <Do kDo, class T, int kVectors, bool kSome>
void pass_tile(const Pass<T>& p, int64_t first, int64_t count) {
  using Type = Plain<T>;
  using V = typename Type::V;
  constexpr int kLanes = Type::kLanes;
  const auto read = [&](const T* at) {
    if constexpr (kSome) {
      return load_some<Type>(at, count);
    } else {
      return Type::load(at);
    }
  };
  const auto write = [&](T* at, V v) {
    if constexpr (kSome) {
      store_some<Type>(at, v, count);
    } else {
      Type::store(at, v);
    }
  };
  // Copies: after a store into the state the compiler would have to read the fields of `p` again.
  const T *from = p.from + first, *scale = p.scale, *next = p.next;
  T* to = p.to + first;
  const int64_t slots = p.slots, columns = p.columns;
  V row[kVectors] = {}, sum[kVectors] = {};
  if constexpr (kDo != Do::multiply) {
    for (int v = 0; v < kVectors; ++v) row[v] = read(p.row + first + v * kLanes);
  }
  for (int64_t k = 0; k < slots; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = k * columns + v * kLanes;
      V x = read(from + at);
      if constexpr (kDo != Do::multiply) {
        x += scale[k] * row[v];
        write(to + at, x);
      }
      if constexpr (kDo != Do::update) sum[v] += next[k] * x;
    }
  }
  if constexpr (kDo != Do::update) {
    for (int v = 0; v < kVectors; ++v) write(p.product + first + v * kLanes, sum[v]);
  }
}

// Columns in shares of whole cache lines, of which this is number `part`.
template <Do kDo, class T>
void pass(const Pass<T>& p, int part, int parts) {
  constexpr int kLanes = Plain<T>::kLanes;
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t lines = ceil_div(p.columns, kLine);
  const int64_t last = smaller(lines * (part + 1) / parts * kLine, p.columns);
  int64_t c = lines * part / parts * kLine;
  for (; c + kTileVectors * kLanes <= last; c += kTileVectors * kLanes) {
    pass_tile<kDo, T, kTileVectors, false>(p, c, 0);
  }
  for (; c + kLanes <= last; c += kLanes) pass_tile<kDo, T, 1, false>(p, c, 0);
  if (c < last) pass_tile<kDo, T, 1, true>(p, c, last - c);
}

template <Do kDo, class T>
void pass_both(const Pass<T>& first, const Pass<T>& second, int parts) {
  parallel(parts, [&](int part) {
    pass<kDo>(first, part, parts);
    pass<kDo>(second, part, parts);
  });
}

template <class T>
T dot(const T* a, const T* b, int64_t count) {
  using Type = Plain<T>;
  typename Type::V sum = {};
  int64_t i = 0;
  for (; i + Type::kLanes <= count; i += Type::kLanes) sum += Type::load(a + i) * Type::load(b + i);
  double total = 0;
  for (int lane = 0; lane < Type::kLanes; ++lane) total += sum[lane];
  for (; i < count; ++i) total += static_cast<double>(a[i]) * b[i];
  return static_cast<T>(total);
}

template <class T>
struct Memory {
  const T *precision_inverse, *memory, *weights, *latents;
  T *new_precision_inverse, *new_memory, *readouts, *leverages;
};

int64_t scratch_elements(const StreamShape& s) { return 4 * s.slots + s.width; }

// All writes to one memory, in scratch_elements(shape) elements of scratch.
template <class T>
void stream(const Memory<T>& m, const StreamShape& shape, T* scratch, int parts) {
  const int64_t slots = shape.slots, width = shape.width;
  T *u = scratch, *u_next = u + slots, *scale = u_next + slots, *minus = scale + slots,
    *error = minus + slots;
  // The readout's place holds w M until it is known.
  Pass<T> p{m.precision_inverse, m.new_precision_inverse, slots, slots, minus, u, m.weights, u};
  Pass<T> q{m.memory, m.new_memory, slots, width, scale, error, m.weights, m.readouts};
  pass_both<Do::multiply>(p, q, parts);
  for (int64_t t = 0; t < shape.count; ++t) {
    const T *w = m.weights + t * slots, *z = m.latents + t * width;
    T* readout = m.readouts + t * width;
    const T g = dot(w, u, slots), reciprocal = 1 / (1 + g);
    m.leverages[t] = g * reciprocal;
    for (int64_t k = 0; k < slots; ++k) {
      scale[k] = u[k] * reciprocal;
      minus[k] = -scale[k];
    }
    for (int64_t c = 0; c < width; ++c) {
      error[c] = z[c] - readout[c];
      readout[c] = z[c] - error[c] * reciprocal;
    }
    p.row = u;
    if (t + 1 == shape.count) {
      pass_both<Do::update>(p, q, parts);
      return;
    }
    p.product = u_next;
    q.product = readout + width;
    p.next = q.next = w + slots;
    pass_both<Do::both>(p, q, parts);
    p.from = p.to;
    q.from = q.to;
    T* swap = u;
    u = u_next;
    u_next = swap;
  }
}

template <class T>
void stream_all(const Memory<T>& all, const StreamShape& shape, int threads) {
  const int64_t batch = shape.batch, slots = shape.slots, width = shape.width, count = shape.count;
  const int64_t work = slots * (slots + width);
  // Many memories: each has one thread. Few large ones: each has all threads, which meet at every row.
  const int64_t most = smaller(batch, ceil_div(batch * count * work, kWorkPerThread));
  const int workers = batch < threads && work >= 2 * kWorkPerThread ? 1 : smaller(threads, most);
  const int parts =
      workers == 1 ? smaller(threads, work / kWorkPerThread < 1 ? 1 : work / kWorkPerThread) : 1;
  const int64_t elements = scratch_elements(shape);
  Scratch<T> scratch(workers * elements);
  const auto one = [&](int64_t b, int worker) {
    const int64_t p = b * slots * slots, m = b * slots * width, w = b * count * slots, z = b * count * width;
    const Memory<T> memory{
        all.precision_inverse + p,     all.memory + m,     all.weights + w,  all.latents + z,
        all.new_precision_inverse + p, all.new_memory + m, all.readouts + z, all.leverages + b * count};
    stream(memory, shape, scratch.data() + worker * elements, parts);
  };
  parallel(workers, [&](int worker) {
    for (int64_t b = batch * worker / workers; b < batch * (worker + 1) / workers; ++b) one(b, worker);
  });
}

}  // namespace

void memory_stream(const void* precision_inverse, const void* memory, const void* weights,
                   const void* latents, DType dtype, StreamShape shape, void* new_precision_inverse,
                   void* new_memory, void* readouts, void* leverages, int threads) {
  if (shape.batch == 0) return;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    stream_all<T>({static_cast<const T*>(precision_inverse), static_cast<const T*>(memory),
                   static_cast<const T*>(weights), static_cast<const T*>(latents),
                   static_cast<T*>(new_precision_inverse), static_cast<T*>(new_memory),
                   static_cast<T*>(readouts), static_cast<T*>(leverages)},
                  shape, threads);
  };
  dtype == DType::f64 ? run(double{}) : run(float{});
}

}  // namespace engram::cpu::ENGRAM_ISA

// The ridge memory of sequences, compiled once for each instruction set (isa.h).
//
// A token's write, its own read and the next token's products with the state are one pass over it: each
// element is loaded, updated, stored, and multiplied while it is in a register. A head has one thread, which
// keeps its state in the core's caches: the results are the same bits for every number of threads.
#include "engram/ridge.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

// Vectors of a row of the state that are updated together, with one or two sums of each beside them.
constexpr int kTileVectors = kRegisters == 32 ? 8 : 4;

// matrix [rows, columns] += scale^T row; product = next matrix; read = query matrix.
struct Pass {
  double* matrix;
  int64_t rows, columns;
  const double *scale, *row, *next, *query;
  double *product, *read;
};

// kVectors whole vectors of columns from `first` on, or with kSome the first `count` lanes of one.
template <bool kReads, int kVectors, bool kSome>
void pass_tile(const Pass& p, int64_t first, int64_t count) {
  using V = F64::V;
  constexpr int kLanes = F64::kLanes;
  const auto load = [&](const double* at) {
    if constexpr (kSome) {
      return load_some<F64>(at, count);
    } else {
      return F64::load(at);
    }
  };
  const auto store = [&](double* at, V v) {
    if constexpr (kSome) {
      store_some<F64>(at, v, count);
    } else {
      F64::store(at, v);
    }
  };
  // Copies: after a store into the matrix the compiler would have to read the fields of `p` again.
  const double *scale = p.scale, *next = p.next, *query = p.query;
  double* matrix = p.matrix + first;
  const int64_t rows = p.rows, columns = p.columns;
  V row[kVectors], product[kVectors] = {}, read[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) row[v] = load(p.row + first + v * kLanes);
  for (int64_t k = 0; k < rows; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      double* at = matrix + k * columns + v * kLanes;
      const V x = load(at) + scale[k] * row[v];
      store(at, x);
      product[v] += next[k] * x;
      if constexpr (kReads) read[v] += query[k] * x;
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store(p.product + first + v * kLanes, product[v]);
    if constexpr (kReads) store(p.read + first + v * kLanes, read[v]);
  }
}

template <bool kReads>
void pass(const Pass& p) {
  constexpr int kLanes = F64::kLanes;
  int64_t c = 0;
  for (; c + kTileVectors * kLanes <= p.columns; c += kTileVectors * kLanes) {
    pass_tile<kReads, kTileVectors, false>(p, c, 0);
  }
  for (; c + kLanes <= p.columns; c += kLanes) pass_tile<kReads, 1, false>(p, c, 0);
  if (c < p.columns) pass_tile<kReads, 1, true>(p, c, p.columns - c);
}

// One head of one sequence; a token's row begins `heads` rows behind the one before it.
template <class T>
struct Head {
  const T *q, *k, *v;
  const double* beta;
  double *precision_inverse, *memory;
  T* out;
};

int64_t scratch_elements(const RidgeShape& s) { return 6 * s.keys + 3 * s.values; }

template <class T>
void widen_row(const T* from, double* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

template <class T>
void run_head(const Head<T>& h, const RidgeShape& s, int64_t count, double* scratch) {
  const int64_t keys = s.keys, values = s.values, key_step = s.heads * keys, value_step = s.heads * values;
  double *key = scratch, *next = key + keys, *query = next + keys, *scale = query + keys,
         *minus = scale + keys, *u = minus + keys, *known = u + keys, *error = known + values,
         *read = error + values;
  for (int64_t i = 0; i < keys; ++i) scale[i] = minus[i] = 0;
  for (int64_t i = 0; i < values; ++i) error[i] = 0;
  // Each step writes the token before it: before the first, nothing.
  widen_row(h.k, next, keys);
  Pass p{h.precision_inverse, keys, keys, minus, u, next, nullptr, u, nullptr};
  Pass m{h.memory, keys, values, scale, error, next, query, known, read};
  for (int64_t i = 0; i < keys; ++i) u[i] = 0;
  pass<false>(p);
  pass<false>(m);
  for (int64_t t = 0; t < count; ++t) {
    double* swap = key;
    key = next;
    next = swap;
    const double b = h.beta[t * s.heads];
    double gain = 0;
    for (int64_t i = 0; i < keys; ++i) gain += key[i] * u[i];
    const double share = b / (1 + b * gain);
    for (int64_t i = 0; i < keys; ++i) {
      scale[i] = u[i] * share;
      minus[i] = -scale[i];
    }
    const T* value = h.v + t * value_step;
    for (int64_t i = 0; i < values; ++i) error[i] = value[i] - known[i];
    widen_row(h.q + t * key_step, query, keys);
    if (t + 1 < count) widen_row(h.k + (t + 1) * key_step, next, keys);
    p.next = m.next = next;
    pass<false>(p);
    pass<true>(m);
    T* out = h.out + t * value_step;
    for (int64_t i = 0; i < values; ++i) out[i] = static_cast<T>(read[i]);
  }
}

template <class T>
void run(const Head<T>& all, const int64_t* ends, const RidgeShape& s, int threads) {
  const int64_t tasks = s.sequences * s.heads, elements = scratch_elements(s);
  const int workers = static_cast<int>(smaller(threads, tasks));
  Scratch<double> scratch(workers * elements);
  parallel(workers, [&](int worker) {
    for (int64_t task = worker; task < tasks; task += workers) {
      const int64_t n = task / s.heads, head = task % s.heads, first = ends[n] * s.heads + head;
      const int64_t count = ends[n + 1] - ends[n];
      if (count == 0) continue;
      const Head<T> one{all.q + first * s.keys,
                        all.k + first * s.keys,
                        all.v + first * s.values,
                        all.beta + first,
                        all.precision_inverse + task * s.keys * s.keys,
                        all.memory + task * s.keys * s.values,
                        all.out + first * s.values};
      run_head(one, s, count, scratch.data() + worker * elements);
    }
  });
}

}  // namespace

void ridge_memory(const void* q, const void* k, const void* v, DType dtype, const double* beta,
                  const int64_t* ends, RidgeShape shape, double* precision_inverse, double* memory, void* out,
                  int threads) {
  if (shape.sequences == 0 || shape.heads == 0) return;
  const auto start = [&](auto zero) {
    using T = decltype(zero);
    run<T>({static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), beta,
            precision_inverse, memory, static_cast<T*>(out)},
           ends, shape, threads);
  };
  dtype == DType::f64 ? start(double{}) : start(float{});
}

}  // namespace engram::cpu::ENGRAM_ISA

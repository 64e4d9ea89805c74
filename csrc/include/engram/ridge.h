// The ridge memory of sequences: a rank-one write and a read at every token, without a decay.
//
// Row convention: a query, key or value is one row. Tokens are [tokens, heads, ...], all sequences one behind
// the other; every tensor is contiguous.
#pragma once

#include <cstdint>

#include "engram/dtype.h"

namespace engram {

struct RidgeShape {
  int64_t sequences;  // N
  int64_t heads;      // H
  int64_t keys;       // K
  int64_t values;     // V
};

namespace cpu {

// For the tokens ends[n] to ends[n + 1] of each sequence n and each head, in order, with u = P k^T:
//   P -= b u u^T / (1 + b k u), M += b u (v - k M) / (1 + b k u), out = q M
// P [N, H, K, K] symmetric and M [N, H, K, V] are f64 and written in place; q, k, v and out are all f32 or
// all f64, computed in f64; beta b is f64, [tokens, H].
void ridge_memory(const void* q, const void* k, const void* v, DType dtype, const double* beta,
                  const int64_t* ends, RidgeShape shape, double* precision_inverse, double* memory, void* out,
                  int threads);

}  // namespace cpu

}  // namespace engram

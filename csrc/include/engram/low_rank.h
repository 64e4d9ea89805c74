// The associative write: the residual/Gram pass, the small solves, and the low-rank update.
//
// Row convention: a key or a value is one row. Every matrix is batched by a leading dimension.
// `weight` may be strided by batch and by row, its columns are contiguous; every other array is contiguous.
// The factors, keys and values have the compute type: double for f64 weights, float for all others.
// Preconditioned keys, Gram matrices and small systems are double whatever the weight's type: at a
// covariance's condition number of 1e8 a Gram matrix rounded to float is no longer positive definite.
#pragma once

#include <cstdint>

#include "engram/dtype.h"

namespace engram {

struct WeightShape {
  int64_t batch;         // B
  int64_t rows;          // out
  int64_t cols;          // in
  int64_t batch_stride;  // elements from one matrix to the next
  int64_t row_stride;    // elements from one row to the next
};

// What a small system is, which decides how it is solved.
enum class SystemKind : int {
  cholesky = 0,    // symmetric positive definite; only the lower triangle is read
  unit_lower = 1,  // unit lower triangular; the diagonal and the upper triangle are not read
  unit_upper = 2,  // unit upper triangular; the diagonal and the lower triangle are not read
};

namespace cpu {

// weight[b] += scale * left[b] @ right[b], accumulated in the compute type and rounded once.
// left [B, out, n], right [B, n, in].
// `look`: at the factors first. False comes back if a number of them is NaN or infinite; nothing is written.
bool apply_low_rank(void* weight, DType dtype, WeightShape shape, const void* left, const void* right,
                    int64_t rank, double scale, bool look, int threads);

// residual[b] = values[b] - keys[b] @ weight[b]^T   [B, n, out]
// gram[b]     = keys[b] @ preconditioned[b]^T       [B, n, n], accumulated in double
// in one pass over each weight matrix, without a copy of it in another type.
void residual_gram(const void* weight, DType dtype, WeightShape shape, const void* keys, const void* values,
                   const double* preconditioned, int64_t count, void* residual, double* gram, int threads);

}  // namespace cpu

namespace cuda {

// As the functions of `cpu`; `device` pointers, launched on `stream`, nothing synchronised or allocated.
// Each returns the cudaError_t of its launch as an int (0: launched).
// `refused`, if there is one, becomes 0, or more where a factor has a NaN or an infinite number.
int apply_low_rank(void* weight, DType dtype, WeightShape shape, const void* left, const void* right,
                   int64_t rank, double scale, int32_t* refused, void* stream);

int residual_gram(const void* weight, DType dtype, WeightShape shape, const void* keys, const void* values,
                  const double* preconditioned, int64_t count, void* residual, double* gram, void* stream);

// solution[b] = system[b]^-1 @ rhs[b], all in one launch; system [B, n, n] double, rhs and solution [B, n, m]
// float, or double when rhs_is_double. Arithmetic is fp64 in shared memory. info[b] = 0, or i > 0 when the
// pivot of order i is not above n * 2^-52 of its diagonal entry: the leading minor of that order is not
// positive definite but for rounding (then solution[b] is NaN). n is at most small_solve_limit().
int small_solve(const double* system, const void* rhs, bool rhs_is_double, SystemKind kind, int64_t batch,
                int64_t n, int64_t columns, void* solution, int32_t* info, void* stream);

int64_t small_solve_limit();

}  // namespace cuda

}  // namespace engram

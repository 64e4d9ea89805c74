#include "engram/ridge.h"

#include "isa.h"

namespace engram::cpu {

ENGRAM_DECLARE_LEVELS(ridge_memory)

void ridge_memory(const void* q, const void* k, const void* v, DType dtype, const double* beta,
                  const int64_t* ends, RidgeShape shape, double* precision_inverse, double* memory, void* out,
                  int threads) {
  ENGRAM_DISPATCH(ridge_memory)
  (q, k, v, dtype, beta, ends, shape, precision_inverse, memory, out, threads);
}

}  // namespace engram::cpu

#include "engram/low_rank.h"

#include "isa.h"

namespace engram::cpu {

ENGRAM_DECLARE_LEVELS(apply_low_rank)
ENGRAM_DECLARE_LEVELS(residual_gram)

bool apply_low_rank(void* weight, DType dtype, WeightShape shape, const void* left, const void* right,
                    int64_t rank, double scale, bool look, int threads) {
  return ENGRAM_DISPATCH(apply_low_rank)(weight, dtype, shape, left, right, rank, scale, look, threads);
}

void residual_gram(const void* weight, DType dtype, WeightShape shape, const void* keys, const void* values,
                   const double* preconditioned, int64_t count, void* residual, double* gram, int threads) {
  ENGRAM_DISPATCH(residual_gram)(weight, dtype, shape, keys, values, preconditioned, count, residual, gram,
                                 threads);
}

}  // namespace engram::cpu

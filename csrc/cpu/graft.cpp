#include "engram/graft.h"

#include "isa.h"

namespace engram::cpu {

ENGRAM_DECLARE_LEVELS(graft_blend)
ENGRAM_DECLARE_LEVELS(graft_logits_gradient)
ENGRAM_DECLARE_LEVELS(graft_mask_step)
ENGRAM_DECLARE_LEVELS(pack_mask)
ENGRAM_DECLARE_LEVELS(unpack_mask)
ENGRAM_DECLARE_LEVELS(graft_blend_packed)
ENGRAM_DECLARE_LEVELS(top_k_mask)
ENGRAM_DECLARE_LEVELS(sparse_faults)
ENGRAM_DECLARE_LEVELS(sparse_apply)
ENGRAM_DECLARE_LEVELS(sparse_diff)

void graft_blend(const GraftTensor* tensors, int64_t count, double bias, int threads) {
  ENGRAM_DISPATCH(graft_blend)(tensors, count, bias, threads);
}

void graft_logits_gradient(const GraftTensor* tensors, int64_t count, double bias, int threads) {
  ENGRAM_DISPATCH(graft_logits_gradient)(tensors, count, bias, threads);
}

void graft_mask_step(const GraftTensor* tensors, int64_t count, double bias, double lr, double l1,
                     int threads) {
  ENGRAM_DISPATCH(graft_mask_step)(tensors, count, bias, lr, l1, threads);
}

void pack_mask(const uint8_t* mask, int64_t size, uint8_t* packed, int threads) {
  ENGRAM_DISPATCH(pack_mask)(mask, size, packed, threads);
}

void unpack_mask(const uint8_t* packed, int64_t size, uint8_t* mask, int threads) {
  ENGRAM_DISPATCH(unpack_mask)(packed, size, mask, threads);
}

void graft_blend_packed(const void* pre, const void* ft, const uint8_t* mask, int64_t size, int element_bytes,
                        void* out, int threads) {
  ENGRAM_DISPATCH(graft_blend_packed)(pre, ft, mask, size, element_bytes, out, threads);
}

int64_t top_k_mask(const GraftTensor* tensors, int64_t count, int64_t k, int threads) {
  return ENGRAM_DISPATCH(top_k_mask)(tensors, count, k, threads);
}

int64_t sparse_faults(const SparseTensor* tensors, int64_t count, bool wide_indices, int threads) {
  return ENGRAM_DISPATCH(sparse_faults)(tensors, count, wide_indices, threads);
}

void sparse_apply(const SparseTensor* tensors, int64_t count, bool wide_indices, int threads) {
  ENGRAM_DISPATCH(sparse_apply)(tensors, count, wide_indices, threads);
}

bool sparse_diff(const GraftTensor* tensors, int64_t count, double threshold, bool wide_indices, Place place,
                 void* context, int threads) {
  return ENGRAM_DISPATCH(sparse_diff)(tensors, count, threshold, wide_indices, place, context, threads);
}

}  // namespace engram::cpu

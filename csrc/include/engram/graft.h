// Grafting: the masked blend of two models, the step of its mask, packed masks, top-k masks, sparse writes,
// sparse differences.
//
// A model is a list of tensors, each flat and contiguous, of its own type: f32, bf16 or f16 (not f64, which
// is the reference's). One call goes over the whole list. Gates and logits are float.
// A mask is packed: bit i % 8 of byte i / 8 is entry i; bits beyond the last entry are 0.
#pragma once

#include <cstdint>

#include "engram/dtype.h"

namespace engram {

// One weight and what belongs to it; a call reads and writes the fields it names, the others may be null.
struct GraftTensor {
  void* out;             // theta
  const void* pre;       // pre-trained
  const void* ft;        // fine-tuned
  float* logits;         // S
  const uint8_t* base;   // packed base mask, or null: no bit is set
  const void* gradient;  // d loss / d theta, of the weight's type
  int64_t size;
  DType dtype;
};

// The entries of one tensor that are written.
struct SparseTensor {
  void* weight;
  const void* indices;  // int32 or int64
  const void* values;   // of the weight's type
  void* overwritten;    // what was there before
  int64_t count;        // entries
  int64_t size;         // elements of the weight
  int element_bytes;    // 2, 4 or 8
};

// Where the changed entries of one tensor go.
struct SparseTarget {
  void* indices;  // int32 or int64
  void* values;   // of the weight's type
};

// Called once with the number of changed entries of each tensor, to say where they go.
using Place = void (*)(void* context, const int64_t* changed, SparseTarget* targets);

namespace cpu {

// out = pre + gate * (ft - pre), gate = sigmoid(s * (S - bias)), s = -1 where the base bit is 1, else 1.
// Computed from the nearer end and rounded once: gates of 0 and 1 give pre and ft exactly.
void graft_blend(const GraftTensor* tensors, int64_t count, double bias, int threads);

// out (float) = s * gradient * (ft - pre) * gate * (1 - gate)
void graft_logits_gradient(const GraftTensor* tensors, int64_t count, double bias, int threads);

// S -= lr * s * gate * (1 - gate) * (gradient * (ft - pre) + l1), then, where out is not null, the blend of
// the new S.
void graft_mask_step(const GraftTensor* tensors, int64_t count, double bias, double lr, double l1,
                     int threads);

// mask: one byte, 0 or 1, for each entry.
void pack_mask(const uint8_t* mask, int64_t size, uint8_t* packed, int threads);
void unpack_mask(const uint8_t* packed, int64_t size, uint8_t* mask, int threads);

// out = bit ? ft : pre, for elements of 2, 4 or 8 bytes.
void graft_blend_packed(const void* pre, const void* ft, const uint8_t* mask, int64_t size, int element_bytes,
                        void* out, int threads);

// Packed masks (in `out`) of the k largest keys over all tensors; key = |ft - pre| in float, or pre where ft
// is null. Of equal keys the first count, in the order of the list. Returns how many keys are NaN or
// infinite; the masks are meaningless unless that is 0. 0 <= k <= number of entries.
int64_t top_k_mask(const GraftTensor* tensors, int64_t count, int64_t k, int threads);

// How many indices are out of range or not above the one before them.
int64_t sparse_faults(const SparseTensor* tensors, int64_t count, bool wide_indices, int threads);

// overwritten = weight[indices]; weight[indices] = values. The indices are in range and distinct. What is
// overwritten may go where the values are: that exchanges the two.
void sparse_apply(const SparseTensor* tensors, int64_t count, bool wide_indices, int threads);

// Positions, ascending, and values in `ft` of the entries whose bits differ from those in `pre`; with a
// threshold that is not negative, of these the ones whose difference, in float (double of f64), is above it
// or NaN. f64 too. Reads once, and allocates a small multiple of what changed; false where there is no memory
// for that.
bool sparse_diff(const GraftTensor* tensors, int64_t count, double threshold, bool wide_indices, Place place,
                 void* context, int threads);

}  // namespace cpu

namespace cuda {

// As the functions of `cpu`. The lists lie on the host and hold device pointers; everything else is on the
// device. Launched on `stream`, nothing synchronised or allocated: `workspace` has the bytes that the
// function beside says for a list of that many tensors, and is aligned to 16. Each returns a cudaError_t as
// an int (0: launched).
int pack_mask(const uint8_t* mask, int64_t size, uint8_t* packed, void* stream);

int64_t top_k_workspace(int64_t count, int64_t keys);
int top_k_mask(const GraftTensor* tensors, int64_t count, int64_t k, void* workspace, int64_t* invalid,
               void* stream);

// Brings a list to `workspace`, where it stays for as many calls as there are of the other two, and says
// how many chunks it has.
int64_t sparse_workspace(int64_t count);
int sparse_list(const SparseTensor* tensors, int64_t count, void* workspace, int64_t* chunks, void* stream);
int sparse_faults(const void* list, int64_t count, int64_t chunks, bool wide_indices, int64_t* faults,
                  void* stream);
// Writes nothing where `faults`, if not null, is not 0.
int sparse_apply(const void* list, int64_t count, int64_t chunks, bool wide_indices, const int64_t* faults,
                 void* stream);

}  // namespace cuda

}  // namespace engram

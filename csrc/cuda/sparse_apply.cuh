// Sparse writes over a list of tensors, and the check of their indices.
#pragma once

#include "engram/graft.h"
#include "list.cuh"

namespace engram::cuda {

constexpr int kSparseEntries = 4;  // a thread, all on their way at once
constexpr int kSparseChunk = kThreads * kSparseEntries;

// overwritten = weight[indices]; weight[indices] = values, unless there are faults.
template <typename Index>
struct SparseApply {
  List<SparseTensor> list;
  const int64_t* faults;

  int64_t blocks() const { return list.chunks; }

  ENGRAM_DEVICE void run(int64_t index) const {
    if (faults && *faults) return;
    const Listed<SparseTensor>& entry = *list.find(index);
    const int64_t first = (index - entry.first) * kSparseChunk + threadIdx.x;
    if (entry.tensor.element_bytes == 2) exchange<uint16_t>(entry.tensor, first);
    if (entry.tensor.element_bytes == 4) exchange<uint32_t>(entry.tensor, first);
    if (entry.tensor.element_bytes == 8) exchange<uint64_t>(entry.tensor, first);
  }

 private:
  template <typename Element>
  static ENGRAM_DEVICE void exchange(const SparseTensor& tensor, int64_t first) {
    auto* const weight = static_cast<Element*>(tensor.weight);
    const auto* const indices = static_cast<const Index*>(tensor.indices);
    const auto* const values = static_cast<const Element*>(tensor.values);
    auto* const overwritten = static_cast<Element*>(tensor.overwritten);
    int64_t at[kSparseEntries];
    Element before[kSparseEntries], after[kSparseEntries];
#pragma unroll
    for (int i = 0; i < kSparseEntries; ++i)
      if (first + i * kThreads < tensor.count) {
        at[i] = indices[first + i * kThreads];
        after[i] = values[first + i * kThreads];
      }
#pragma unroll
    for (int i = 0; i < kSparseEntries; ++i)
      if (first + i * kThreads < tensor.count) before[i] = weight[at[i]];
#pragma unroll
    for (int i = 0; i < kSparseEntries; ++i)
      if (first + i * kThreads < tensor.count) {
        overwritten[first + i * kThreads] = before[i];
        weight[at[i]] = after[i];
      }
  }
};

// Adds to `faults` how many indices are out of range or not above the one before them.
template <typename Index>
struct SparseFaults {
  List<SparseTensor> list;
  uint64_t* faults;

  int64_t blocks() const { return list.chunks; }

  ENGRAM_DEVICE void run(int64_t index) const {
    __shared__ uint32_t found_by_block;
    const int thread = threadIdx.x;
    if (thread == 0) found_by_block = 0;
    __syncthreads();
    const Listed<SparseTensor>& entry = *list.find(index);
    const auto* const indices = static_cast<const Index*>(entry.tensor.indices);
    const int64_t first = (index - entry.first) * kSparseChunk + thread;
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < kSparseEntries; ++i) {
      const int64_t at = first + i * kThreads;
      if (at >= entry.tensor.count) continue;
      const Index here = indices[at];
      found += here < 0 || here >= entry.tensor.size || (at > 0 && here <= indices[at - 1]);
    }
    if (found) add(found_by_block, found);
    __syncthreads();
    if (thread == 0 && found_by_block) add(*faults, found_by_block);
  }
};

}  // namespace engram::cuda

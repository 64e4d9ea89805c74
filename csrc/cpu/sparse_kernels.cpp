// Writes into scattered positions of many tensors, compiled once for each instruction set (isa.h) though no
// vector makes them faster: they wait for memory, entry by entry.
#include "chunks.h"
#include "engram/graft.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

template <class Element, class Index>
void exchange(const SparseTensor& tensor, int64_t begin, int64_t end) {
  constexpr int64_t kAhead = 128;  // entries whose cache lines are asked for before their turn
  auto* weight = static_cast<Element*>(tensor.weight);
  const auto* indices = static_cast<const Index*>(tensor.indices);
  const auto ask = [&](int64_t i) { __builtin_prefetch(weight + indices[i], 1); };
  const auto* values = static_cast<const Element*>(tensor.values);
  auto* overwritten = static_cast<Element*>(tensor.overwritten);
  for (int64_t i = begin; i < smaller(begin + kAhead, end); ++i) ask(i);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) ask(i + kAhead);
    const Element after = values[i];  // `overwritten` may be the same memory
    overwritten[i] = weight[indices[i]];
    weight[indices[i]] = after;
  }
}

template <class Index>
void exchange(const SparseTensor& tensor, int64_t begin, int64_t end) {
  if (tensor.element_bytes == 2) exchange<uint16_t, Index>(tensor, begin, end);
  if (tensor.element_bytes == 4) exchange<uint32_t, Index>(tensor, begin, end);
  if (tensor.element_bytes == 8) exchange<uint64_t, Index>(tensor, begin, end);
}

// In the indices' own type, so that they are compared a vector at a time.
template <class Index>
int64_t faults_in(const SparseTensor& tensor, int64_t begin, int64_t end) {
  const auto* indices = static_cast<const Index*>(tensor.indices);
  const int64_t most = sizeof(Index) == 4 ? INT32_MAX : INT64_MAX;
  const Index last = static_cast<Index>(smaller(tensor.size - 1, most));
  Index faults = 0;  // at most a chunk
  if (begin == 0) faults += (indices[0] < 0) | (indices[0] > last);
  for (int64_t i = begin ? begin : 1; i < end; ++i)
    faults += (indices[i] < 0) | (indices[i] > last) | (indices[i] <= indices[i - 1]);
  return faults;
}

}  // namespace

int64_t sparse_faults(const SparseTensor* tensors, int64_t count, bool wide_indices, int threads) {
  const Chunks<SparseTensor> chunks(tensors, count, &SparseTensor::count);
  int64_t faults = 0;
  chunks.for_each(threads, [&](const SparseTensor& tensor, int64_t begin, int64_t end) {
    const int64_t found =
        wide_indices ? faults_in<int64_t>(tensor, begin, end) : faults_in<int32_t>(tensor, begin, end);
    if (found) __atomic_fetch_add(&faults, found, __ATOMIC_RELAXED);
  });
  return faults;
}

void sparse_apply(const SparseTensor* tensors, int64_t count, bool wide_indices, int threads) {
  const Chunks<SparseTensor> chunks(tensors, count, &SparseTensor::count);
  chunks.for_each(threads, [&](const SparseTensor& tensor, int64_t begin, int64_t end) {
    wide_indices ? exchange<int64_t>(tensor, begin, end) : exchange<int32_t>(tensor, begin, end);
  });
}

}  // namespace engram::cpu::ENGRAM_ISA

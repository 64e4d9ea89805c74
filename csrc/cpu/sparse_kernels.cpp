// Writes into scattered positions of many tensors, compiled once for each instruction set (isa.h) though no
// vector makes them faster: they wait for memory, entry by entry.
#include "chunks.h"
#include "engram/graft.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

template <class Element, class Index>
void exchange(const SparseTensor& tensor, int64_t begin, int64_t end) {
  constexpr int64_t kAhead = 16;  // entries whose cache lines are asked for before their turn
  auto* weight = static_cast<Element*>(tensor.weight);
  const auto* indices = static_cast<const Index*>(tensor.indices);
  const auto* values = static_cast<const Element*>(tensor.values);
  auto* overwritten = static_cast<Element*>(tensor.overwritten);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) __builtin_prefetch(weight + indices[i + kAhead], 1);
    overwritten[i] = weight[indices[i]];
    weight[indices[i]] = values[i];
  }
}

template <class Index>
void exchange(const SparseTensor& tensor, int64_t begin, int64_t end) {
  if (tensor.element_bytes == 2) exchange<uint16_t, Index>(tensor, begin, end);
  if (tensor.element_bytes == 4) exchange<uint32_t, Index>(tensor, begin, end);
  if (tensor.element_bytes == 8) exchange<uint64_t, Index>(tensor, begin, end);
}

}  // namespace

int64_t sparse_faults(const SparseTensor* tensors, int64_t count, bool wide_indices, int threads) {
  const Chunks<SparseTensor> chunks(tensors, count, &SparseTensor::count);
  int64_t faults = 0;
  chunks.for_each(threads, [&](const SparseTensor& tensor, int64_t begin, int64_t end) {
    const auto check = [&](const auto* indices) {
      int64_t found = 0;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = indices[i];
        found += at < 0 || at >= tensor.size || (i > 0 && at <= static_cast<int64_t>(indices[i - 1]));
      }
      if (found) __atomic_fetch_add(&faults, found, __ATOMIC_RELAXED);
    };
    wide_indices ? check(static_cast<const int64_t*>(tensor.indices))
                 : check(static_cast<const int32_t*>(tensor.indices));
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

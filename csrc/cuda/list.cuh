// A list of tensors as one row of chunks: work for blocks that does not care where a tensor ends.
#pragma once

#include <memory>

#include "numeric.cuh"

namespace engram::cuda {

template <typename Tensor>
struct Listed {
  Tensor tensor;
  int64_t first;  // the number of its first chunk
};

// A list in the memory of the device. Tensors without a chunk may stand anywhere in it.
template <typename Tensor>
struct List {
  const Listed<Tensor>* entries;
  int64_t count;
  int64_t chunks;

  // The entry that a chunk belongs to: the last that does not begin after it.
  ENGRAM_DEVICE const Listed<Tensor>* find(int64_t chunk) const {
    int64_t low = 0, high = count;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (entries[middle].first <= chunk ? low : high) = middle;
    }
    return entries + low;
  }

  // Moves on from an earlier chunk's entry.
  ENGRAM_DEVICE void advance(const Listed<Tensor>*& entry, int64_t chunk) const {
    while (entry + 1 < entries + count && entry[1].first <= chunk) ++entry;
  }
};

// A list on the host, as `copy` brings it to `entries` on the device. No std::vector: what nvcc compiles
// calls nothing of its host compiler's standard library, so that any compiler may link the module.
template <typename Tensor>
struct HostList {
  int64_t count;
  int64_t chunks = 0;
  std::unique_ptr<Listed<Tensor>[]> entries;

  HostList(const Tensor* tensors, int64_t count, int64_t Tensor::* size, int64_t chunk)
      : count(count), entries(new Listed<Tensor>[count]) {
    for (int64_t i = 0; i < count; ++i) {
      entries[i] = {tensors[i], chunks};
      chunks += ceil_divide(tensors[i].*size, chunk);
    }
  }

  int64_t bytes() const { return count * static_cast<int64_t>(sizeof(Listed<Tensor>)); }
  List<Tensor> at(const void* device) const {
    return {static_cast<const Listed<Tensor>*>(device), count, chunks};
  }
};

}  // namespace engram::cuda

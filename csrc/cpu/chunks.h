// A list of tensors as one row of chunks: work for threads that does not care where a tensor ends.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "scratch.h"

namespace engram::cpu::ENGRAM_ISA {

// Elements a chunk: whole bytes of a packed mask, and few enough to stay in the first-level cache.
constexpr int64_t kChunk = 8192;

template <class Tensor>
class Chunks {
 public:
  Chunks(const Tensor* tensors, int64_t tensor_count, int64_t Tensor::* size)
      : tensors_(tensors), tensor_count_(tensor_count), size_(size), first_(tensor_count + 1) {
    first_.data()[0] = 0;
    for (int64_t i = 0; i < tensor_count; ++i)
      first_.data()[i + 1] = first_.data()[i] + ceil_div(tensors[i].*size, kChunk);
  }

  int64_t count() const { return first_.data()[tensor_count_]; }

  // Calls function(tensor, begin, end) for one chunk.
  template <class Function>
  void visit(int64_t chunk, const Function& function) const {
    int64_t i = 0, after = tensor_count_;  // the tensor lies in [i, after)
    while (after - i > 1) {
      const int64_t middle = i + (after - i) / 2;
      (first_.data()[middle] <= chunk ? i : after) = middle;
    }
    const int64_t begin = (chunk - first_.data()[i]) * kChunk;
    function(tensors_[i], begin, smaller(begin + kChunk, tensors_[i].*size_));
  }

  // The same for every chunk, in one parallel region; a thread is worth starting for two of them.
  template <class Function>
  void for_each(int threads, const Function& function) const {
    const int64_t useful = smaller(threads, count() / 2);
    parallel_for(useful < 1 ? 1 : useful, count(), [&](int64_t chunk, int) { visit(chunk, function); });
  }

 private:
  const Tensor* tensors_;
  int64_t tensor_count_;
  int64_t Tensor::* size_;
  Scratch<int64_t> first_;  // the number of each tensor's first chunk
};

}  // namespace engram::cpu::ENGRAM_ISA

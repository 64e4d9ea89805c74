// Adds to *refused if a number of two arrays is NaN or infinite.
#pragma once

#include "block.cuh"
#include "numeric.cuh"

namespace engram::cuda {

template <typename Value>
struct AllFinite {
  static constexpr int kEach = 8;  // numbers a thread, all on their way before the first is looked at
  static constexpr int64_t kBlock = int64_t{kThreads} * kEach;

  const Value* first;
  int64_t first_count;
  const Value* second;
  int64_t second_count;
  int32_t* refused;
  int64_t first_blocks = ceil_divide(first_count, kBlock);

  int64_t blocks() const { return first_blocks + ceil_divide(second_count, kBlock); }

  ENGRAM_DEVICE void run(int64_t index) const {
    const bool of_first = index < first_blocks;
    const Value* const from = of_first ? first : second;
    const int64_t count = of_first ? first_count : second_count;
    const int64_t begin = (of_first ? index : index - first_blocks) * kBlock + threadIdx.x;
    Value numbers[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      numbers[i] = begin + i * kThreads < count ? from[begin + i * kThreads] : Value(0);
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kEach; ++i) finite &= numbers[i] - numbers[i] == Value(0);
    if (!finite) atomicAdd(refused, 1);
  }
};

}  // namespace engram::cuda

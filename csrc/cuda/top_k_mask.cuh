// Packed masks of the k largest keys over a list of tensors, without a copy of the keys.
#pragma once

#include "top_k_threshold.cuh"

namespace engram::cuda {

// The keys above the threshold, and the first of its equals.
struct WriteMasks : KeyRanges {
  // Bits of a thread's keys.
  struct Compared {
    uint8_t above, equal;
  };

  const TopKWorkspace* workspace;

  WriteMasks(const List<GraftTensor>& list, const TopKWorkspace* workspace)
      : KeyRanges(list), workspace(workspace) {}

  ENGRAM_DEVICE void run(int64_t index) const {
    __shared__ int64_t before[kThreads];
    __shared__ int ties[kThreads], warp_ties[kWarps];
    const int thread = threadIdx.x;
    const uint32_t threshold = workspace->selection.prefix, bin = threshold % kLastBins;
    int64_t sum = 0;
    for (int64_t range = thread; range < index; range += kThreads) sum += workspace->ranges[range][bin];
    before[thread] = sum;
    __syncthreads();
    int64_t wanted = workspace->selection.remaining;
    for (int i = 0; i < kThreads; ++i) wanted -= before[i];
    const bool all = wanted >= workspace->ranges[index][bin];

    const Listed<GraftTensor>* entry = list.find(begin(index));
    if (all || wanted <= 0) {
      for (int64_t chunk = begin(index); chunk < begin(index + 1); ++chunk) {
        list.advance(entry, chunk);
        const Compared mine = compare(*entry, chunk, thread, threshold);
        store(*entry, chunk, thread, all ? mine.above | mine.equal : mine.above);
      }
      return;
    }
    // Only in one range are some of the ties taken, and their order matters.
    for (int64_t chunk = begin(index); chunk < begin(index + 1); ++chunk) {
      list.advance(entry, chunk);
      const Compared mine = compare(*entry, chunk, thread, threshold);
      ties[thread] = __popc(mine.equal);
      __syncthreads();
      if (thread < kWarps) {
        int in_warp = 0;
        for (int i = 0; i < kWarp; ++i) in_warp += ties[thread * kWarp + i];
        warp_ties[thread] = in_warp;
      }
      __syncthreads();
      int64_t left = wanted;
      for (int i = 0; i < thread / kWarp; ++i) left -= warp_ties[i];
      for (int i = thread / kWarp * kWarp; i < thread; ++i) left -= ties[i];
      uint32_t taken = 0;
      for (int i = 0; i < kKeys; ++i)
        if (mine.equal >> i & 1 && left-- > 0) taken |= 1u << i;
      store(*entry, chunk, thread, mine.above | taken);
      for (int i = 0; i < kWarps; ++i) wanted -= warp_ties[i];
      __syncthreads();
    }
  }

 private:
  static ENGRAM_DEVICE Compared compare(const Listed<GraftTensor>& entry, int64_t chunk, int thread,
                                        uint32_t threshold) {
    uint32_t above = 0, equal = 0;
    visit(entry, chunk, thread, [&](const GraftTensor&, int64_t, int valid, const uint32_t* keys) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        if (i >= valid) continue;
        above |= static_cast<uint32_t>(keys[i] > threshold) << i;
        equal |= static_cast<uint32_t>(keys[i] == threshold) << i;
      }
    });
    return {static_cast<uint8_t>(above), static_cast<uint8_t>(equal)};
  }

  static ENGRAM_DEVICE void store(const Listed<GraftTensor>& entry, int64_t chunk, int thread,
                                  uint32_t byte) {
    const int64_t at = (chunk - entry.first) * kKeyChunk + thread * kKeys;
    if (at < entry.tensor.size) static_cast<uint8_t*>(entry.tensor.out)[at / 8] = static_cast<uint8_t>(byte);
  }
};

}  // namespace engram::cuda

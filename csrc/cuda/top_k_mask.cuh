// Packed masks of the k largest keys over a list of tensors, without a copy of the keys.
#pragma once

#include "top_k_threshold.cuh"

namespace engram::cuda {

// Bits of a thread's keys.
struct Compared {
  uint8_t above, equal;

  // To a threshold, in the bits that are known.
  static ENGRAM_DEVICE Compared to(const Listed<GraftTensor>& entry, int64_t chunk, int slot, uint32_t known,
                                   uint32_t threshold) {
    uint32_t above = 0, equal = 0;
    KeyRanges::visit(entry, chunk, slot, [&](const GraftTensor&, int64_t, int valid, const uint32_t* keys) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        if (i >= valid) continue;
        above |= static_cast<uint32_t>((keys[i] & known) > threshold) << i;
        equal |= static_cast<uint32_t>((keys[i] & known) == threshold) << i;
      }
    });
    return {static_cast<uint8_t>(above), static_cast<uint8_t>(equal)};
  }
};

ENGRAM_DEVICE void store_bits(const Listed<GraftTensor>& entry, int64_t chunk, int slot, uint32_t byte) {
  const int64_t at = (chunk - entry.first) * kKeyChunk + slot * kKeys;
  if (at < entry.tensor.size) static_cast<uint8_t*>(entry.tensor.out)[at / 8] = static_cast<uint8_t>(byte);
}

// The second reading: masks of the keys above the first bin, and a list of the bytes with keys in it.
struct SplitKeys : Candidates {
  static constexpr int kRound = 8;  // chunks between two times that a block's bytes join the list

  explicit SplitKeys(const Candidates& candidates) : Candidates(candidates) {}

  ENGRAM_DEVICE void run(int64_t index) const {
    __shared__ uint32_t bytes[kRound * kThreads], count, first;
    if (!workspace->selection.listed) return;
    const uint32_t threshold = workspace->selection.prefix, known = Digit{1}.known();
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    each_in_range(index, [&](const Listed<GraftTensor>& entry, int64_t chunk, int slot) {
      const Compared mine = Compared::to(entry, chunk, slot, known, threshold);
      store_bits(entry, chunk, slot, mine.above);
      if (mine.equal) bytes[atomicAdd(&count, 1u)] = static_cast<uint32_t>(chunk * kThreads + slot);
      if ((chunk - begin(index)) % kRound == kRound - 1 || chunk + 1 == begin(index + 1)) {
        __syncthreads();
        const uint32_t found = count;
        if (slot == 0 && found) first = static_cast<uint32_t>(joined(found));
        __syncthreads();
        for (uint32_t i = slot; i < found; i += kThreads) listed.bytes[first + i] = bytes[i];
        if (slot == 0) count = 0;
        __syncthreads();
      }
    });
  }

 private:
  ENGRAM_DEVICE uint64_t joined(uint32_t bytes) const {
    return atomicAdd(reinterpret_cast<unsigned long long*>(&workspace->found),
                     static_cast<unsigned long long>(bytes));
  }
};

// The keys above the threshold, and the first of its equals.
struct WriteMasks : Candidates {
  explicit WriteMasks(const Candidates& candidates) : Candidates(candidates) {}

  ENGRAM_DEVICE void run(int64_t index) const {
    const Selection& selection = workspace->selection;
    const uint32_t threshold = selection.prefix;
    const int64_t partly = selection.range;
    // Only in one range are some of the ties taken, and their order matters.
    if (index == partly) take_first(index, threshold, selection.taken);
    const auto write = [&](const Listed<GraftTensor>& entry, int64_t chunk, int slot) {
      const int64_t range = range_of(chunk);
      if (range == partly) return;
      const Compared mine = Compared::to(entry, chunk, slot, ~0u, threshold);
      store_bits(entry, chunk, slot, range < partly ? mine.above | mine.equal : mine.above);
    };
    if (selection.listed)
      each_listed(index, write);
    else if (index != partly)
      each_in_range(index, write);
  }

 private:
  ENGRAM_DEVICE void take_first(int64_t index, uint32_t threshold, int64_t wanted) const {
    __shared__ int ties[kThreads], warp_ties[kWarps];
    each_in_range(index, [&](const Listed<GraftTensor>& entry, int64_t chunk, int thread) {
      const Compared mine = Compared::to(entry, chunk, thread, ~0u, threshold);
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
      store_bits(entry, chunk, thread, mine.above | taken);
      for (int i = 0; i < kWarps; ++i) wanted -= warp_ties[i];
      __syncthreads();
    });
  }
};

}  // namespace engram::cuda

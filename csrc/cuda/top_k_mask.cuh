// Packed masks of the k largest keys over a list of tensors, without a copy of the keys.
#pragma once

#include "top_k_threshold.cuh"

namespace engram::cuda {

// The keys above the threshold, and the first of its equals.
struct WriteMasks : KeyRanges {
  struct Shared {
    int64_t before[kThreads];
    int ties[kThreads];
    int warp_ties[kWarps];
  };
  struct Registers {
    uint8_t above, equal;
  };

  const TopKWorkspace* workspace;

  WriteMasks(const List<GraftTensor>& list, const TopKWorkspace* workspace)
      : KeyRanges(list), workspace(workspace) {}

  template <typename Block>
  ENGRAM_DEVICE void run(Block& block, int64_t index, Shared& shared) const {
    const uint32_t threshold = workspace->selection.prefix, bin = threshold % kLastBins;
    block.step([&](int thread, Registers&) {
      int64_t sum = 0;
      for (int64_t range = thread; range < index; range += kThreads) sum += workspace->ranges[range][bin];
      shared.before[thread] = sum;
    });
    int64_t wanted = workspace->selection.remaining;
    for (int i = 0; i < kThreads; ++i) wanted -= shared.before[i];
    const bool all = wanted >= workspace->ranges[index][bin];

    if (all || wanted <= 0) {
      block.step([&](int thread, Registers& mine) {
        const Listed<GraftTensor>* entry = list.find(begin(index));
        for (int64_t chunk = begin(index); chunk < begin(index + 1); ++chunk) {
          list.advance(entry, chunk);
          compare(*entry, chunk, thread, threshold, mine);
          store(*entry, chunk, thread, all ? mine.above | mine.equal : mine.above);
        }
      });
      return;
    }
    // Only in one range are some of the ties taken, and their order matters.
    const Listed<GraftTensor>* entry = list.find(begin(index));
    for (int64_t chunk = begin(index); chunk < begin(index + 1); ++chunk) {
      list.advance(entry, chunk);
      block.step([&](int thread, Registers& mine) {
        shared.ties[thread] = compare(*entry, chunk, thread, threshold, mine);
      });
      block.step([&](int thread, Registers&) {
        if (thread >= kWarps) return;
        int sum = 0;
        for (int i = 0; i < kWarp; ++i) sum += shared.ties[thread * kWarp + i];
        shared.warp_ties[thread] = sum;
      });
      block.step([&](int thread, Registers& mine) {
        int64_t left = wanted;
        for (int i = 0; i < thread / kWarp; ++i) left -= shared.warp_ties[i];
        for (int i = thread / kWarp * kWarp; i < thread; ++i) left -= shared.ties[i];
        uint32_t taken = 0;
        for (int i = 0; i < kKeys; ++i)
          if (mine.equal >> i & 1 && left-- > 0) taken |= 1u << i;
        store(*entry, chunk, thread, mine.above | taken);
      });
      for (int i = 0; i < kWarps; ++i) wanted -= shared.warp_ties[i];
    }
  }

 private:
  // Returns how many keys are equal to the threshold.
  static ENGRAM_DEVICE int compare(const Listed<GraftTensor>& entry, int64_t chunk, int thread,
                                   uint32_t threshold, Registers& mine) {
    uint32_t above = 0, equal = 0;
    int count = 0;
    visit(entry, chunk, thread, [&](const GraftTensor&, int64_t, int valid, const uint32_t* keys) {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        if (i >= valid) continue;
        above |= static_cast<uint32_t>(keys[i] > threshold) << i;
        equal |= static_cast<uint32_t>(keys[i] == threshold) << i;
        count += keys[i] == threshold;
      }
    });
    mine = {static_cast<uint8_t>(above), static_cast<uint8_t>(equal)};
    return count;
  }

  static ENGRAM_DEVICE void store(const Listed<GraftTensor>& entry, int64_t chunk, int thread,
                                  uint32_t byte) {
    const int64_t at = (chunk - entry.first) * kKeyChunk + thread * kKeys;
    if (at < entry.tensor.size) static_cast<uint8_t*>(entry.tensor.out)[at / 8] = static_cast<uint8_t>(byte);
  }
};

// Everything in its order; launch(program) returns an error code, 0 for none.
template <typename Launch>
int write_top_k_masks(const List<GraftTensor>& list, int64_t k, TopKWorkspace* workspace, int64_t* invalid,
                      const Launch& launch) {
  for (int pass = 0; pass < 3; ++pass) {
    if (const int error = launch(CountKeys(list, workspace, {pass}))) return error;
    if (const int error = launch(SelectBin{workspace, invalid, k, {pass}})) return error;
  }
  return launch(WriteMasks(list, workspace));
}

}  // namespace engram::cuda

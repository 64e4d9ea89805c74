// The k-th largest key of a list of tensors, by a radix select: eleven, eleven and ten bits at a time, from
// the histogram of the keys that agree with what is known of it. What one launch leaves for the next stays on
// the device, so that nothing waits for the host.
#pragma once

#include "top_k_keys.cuh"

namespace engram::cuda {

constexpr int kMaxBins = 2048;
constexpr int kLastBins = 1024;

struct Selection {
  uint32_t prefix;    // the known bits of the threshold, the others 0
  int64_t remaining;  // how many of the keys with this prefix are wanted
};

struct TopKWorkspace {
  Selection selection;  // this and `histogram` begin as zeros
  uint64_t histogram[3][kMaxBins];
  uint32_t ranges[kMaxRanges][kLastBins];  // the last histogram of each range by itself
};

// The bits of a key that a pass looks at.
struct Digit {
  int pass;

  ENGRAM_DEVICE int bins() const { return pass == 2 ? kLastBins : kMaxBins; }
  ENGRAM_DEVICE int shift() const { return pass == 2 ? 0 : 21 - 11 * pass; }
  ENGRAM_DEVICE int of(uint32_t key) const { return static_cast<int>(key >> shift() & (bins() - 1)); }
  // Those above them, which are known.
  ENGRAM_DEVICE uint32_t known() const { return pass == 0 ? 0 : ~0u << (32 - 11 * pass); }
};

// The histogram of the keys that begin as the threshold does.
struct CountKeys : KeyRanges {
  TopKWorkspace* workspace;
  Digit digit;

  CountKeys(const List<GraftTensor>& list, TopKWorkspace* workspace, Digit digit)
      : KeyRanges(list), workspace(workspace), digit(digit) {}

  ENGRAM_DEVICE void run(int64_t index) const {
    __shared__ uint32_t bins[kMaxBins];
    const int thread = threadIdx.x;
    const uint32_t prefix = workspace->selection.prefix;
    for (int bin = thread; bin < digit.bins(); bin += kThreads) bins[bin] = 0;
    __syncthreads();
    const Listed<GraftTensor>* entry = list.find(begin(index));
    for (int64_t chunk = begin(index); chunk < begin(index + 1); ++chunk) {
      list.advance(entry, chunk);
      visit(*entry, chunk, thread, [&](const GraftTensor&, int64_t, int valid, const uint32_t* keys) {
        // Fine-tuning in 16 bits leaves most weights as they were: equal neighbours are counted at once, lest
        // all threads queue at one bin.
        int last = 0;
        uint32_t run = 0;
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
          if (i >= valid || (keys[i] & digit.known()) != prefix) continue;
          const int bin = digit.of(keys[i]);
          if (bin != last && run) add(bins[last], run);
          run = bin == last ? run + 1 : 1;
          last = bin;
        }
        if (run) add(bins[last], run);
      });
    }
    __syncthreads();
    for (int bin = thread; bin < digit.bins(); bin += kThreads) {
      if (digit.pass == 2) workspace->ranges[index][bin] = bins[bin];
      if (bins[bin]) add(workspace->histogram[digit.pass][bin], uint64_t(bins[bin]));
    }
  }
};

// One block: the bin in which the threshold lies is the first, from the top, that completes what is wanted.
struct SelectBin {
  TopKWorkspace* workspace;
  int64_t* invalid;  // how many keys are NaN or infinite
  int64_t k;
  Digit digit;

  int64_t blocks() const { return 1; }

  ENGRAM_DEVICE void run(int64_t) const {
    __shared__ int64_t sums[kThreads];
    const int thread = threadIdx.x;
    const uint64_t* const histogram = workspace->histogram[digit.pass];
    const int64_t wanted = digit.pass == 0 ? k : workspace->selection.remaining;
    const uint32_t prefix = workspace->selection.prefix;
    const int each = digit.bins() / kThreads;

    int64_t sum = 0;
    for (int i = 0; i < each; ++i) sum += histogram[digit.bins() - 1 - thread * each - i];
    sums[thread] = sum;
    __syncthreads();
    if (thread == 0 && digit.pass == 0) {  // an exponent of all ones, of either sign
      *invalid = 0;
      for (int i = 0; i < 4; ++i) *invalid += histogram[i] + histogram[kMaxBins - 1 - i];
    }
    int64_t above = 0;
    for (int i = 0; i < thread; ++i) above += sums[i];
    if ((thread > 0 && above >= wanted) || above + sums[thread] < wanted) return;
    int bin = digit.bins() - 1 - thread * each;
    for (; above + static_cast<int64_t>(histogram[bin]) < wanted; --bin) above += histogram[bin];
    workspace->selection = {prefix | static_cast<uint32_t>(bin) << digit.shift(), wanted - above};
  }
};

}  // namespace engram::cuda

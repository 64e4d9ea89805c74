// The k-th largest key of a list of tensors, by a radix select: eleven, eleven and ten bits at a time, from
// the histogram of the keys that agree with what is known of it. What one launch leaves for the next stays on
// the device, so that nothing waits for the host.
//
// The keys are read twice: for the first histogram, and to list the bytes of the masks with a key in its bin.
// All that follows looks at those alone. Where a bin holds more keys than the list has room for, as zeros of
// weights that did not change, every pass reads all keys.
#pragma once

#include "top_k_keys.cuh"

namespace engram::cuda {

constexpr int kMaxBins = 2048;
constexpr int kLastBins = 1024;

struct Selection {
  uint32_t prefix;    // the known bits of the threshold, the others 0
  bool listed;        // whether the bytes with a key in the first bin are listed
  int64_t remaining;  // how many of the keys with this prefix are wanted
  // Ties are taken from the ranges before this one, and so many from it.
  int64_t range, taken;
};

struct TopKWorkspace {
  Selection selection;  // this, `found` and `histogram` begin as zeros
  uint64_t found;       // bytes that are listed
  uint64_t histogram[3][kMaxBins];
  uint32_t ranges[kMaxRanges][kLastBins];  // the last histogram of each range by itself
};

// Bytes of the masks, counted as kThreads a chunk.
struct ByteList {
  static constexpr int64_t kMost = int64_t(1) << 25;

  uint32_t* bytes;
  int64_t capacity;

  // One for 64 keys: a sixteenth of what the masks take.
  static int64_t room(int64_t keys) { return keys / 64 < kMost ? keys / 64 : kMost; }
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

// The keys that a launch looks at.
struct Candidates : KeyRanges {
  TopKWorkspace* workspace;
  ByteList listed;

  Candidates(const List<GraftTensor>& list, TopKWorkspace* workspace, const ByteList& listed)
      : KeyRanges(list), workspace(workspace), listed(listed) {}

  // Calls use(tensor, chunk, its thread) for a block's share of the listed bytes.
  template <typename Use>
  ENGRAM_DEVICE void each_listed(int64_t index, const Use& use) const {
    const auto found = static_cast<int64_t>(workspace->found);
    for (int64_t i = index * kThreads + threadIdx.x; i < found; i += ranges * kThreads) {
      const int64_t chunk = listed.bytes[i] / kThreads;
      use(*list.find(chunk), chunk, static_cast<int>(listed.bytes[i] % kThreads));
    }
  }

  // The same for the bytes of a block's range.
  template <typename Use>
  ENGRAM_DEVICE void each_in_range(int64_t index, const Use& use) const {
    const Listed<GraftTensor>* entry = list.find(begin(index));
    for (int64_t chunk = begin(index); chunk < begin(index + 1); ++chunk) {
      list.advance(entry, chunk);
      use(*entry, chunk, static_cast<int>(threadIdx.x));
    }
  }
};

// The histogram of the keys that begin as the threshold does.
struct CountKeys : Candidates {
  Digit digit;

  CountKeys(const Candidates& candidates, Digit digit) : Candidates(candidates), digit(digit) {}

  ENGRAM_DEVICE void run(int64_t index) const {
    __shared__ uint32_t bins[kMaxBins];
    const int thread = threadIdx.x;
    const uint32_t prefix = workspace->selection.prefix;
    const bool from_list = digit.pass > 0 && workspace->selection.listed;
    for (int bin = thread; bin < digit.bins(); bin += kThreads) bins[bin] = 0;
    __syncthreads();
    const auto count = [&](const Listed<GraftTensor>& entry, int64_t chunk, int slot) {
      visit(entry, chunk, slot, [&](const GraftTensor&, int64_t, int valid, const uint32_t* keys) {
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
          if (from_list && digit.pass == 2) add(workspace->ranges[range_of(chunk)][bin], 1u);
        }
        if (run) add(bins[last], run);
      });
    };
    from_list ? each_listed(index, count) : each_in_range(index, count);
    __syncthreads();
    for (int bin = thread; bin < digit.bins(); bin += kThreads) {
      if (digit.pass == 0 && bin < kLastBins) workspace->ranges[index][bin] = 0;
      if (digit.pass == 2 && !from_list) workspace->ranges[index][bin] = bins[bin];
      if (bins[bin]) add(workspace->histogram[digit.pass][bin], uint64_t(bins[bin]));
    }
  }
};

// One block: the bin in which the threshold lies is the first, from the top, that completes what is wanted.
struct SelectBin : Candidates {
  int64_t* invalid;  // how many keys are NaN or infinite
  int64_t k;
  Digit digit;

  SelectBin(const Candidates& candidates, int64_t* invalid, int64_t k, Digit digit)
      : Candidates(candidates), invalid(invalid), k(k), digit(digit) {}

  int64_t blocks() const { return 1; }

  ENGRAM_DEVICE void run(int64_t) const {
    __shared__ int64_t sums[kThreads];
    __shared__ Selection selected;
    const int thread = threadIdx.x;
    const uint64_t* const histogram = workspace->histogram[digit.pass];
    const int each = digit.bins() / kThreads;
    if (thread == 0) {
      selected = workspace->selection;
      if (digit.pass == 0) selected.remaining = k;
    }
    if (thread == 0 && digit.pass == 0) {  // an exponent of all ones, of either sign
      *invalid = 0;
      for (int i = 0; i < 4; ++i) *invalid += histogram[i] + histogram[kMaxBins - 1 - i];
    }
    int64_t sum = 0;
    for (int i = 0; i < each; ++i) sum += histogram[digit.bins() - 1 - thread * each - i];
    sums[thread] = sum;
    __syncthreads();
    const int64_t wanted = selected.remaining;
    int64_t above = before(sums, thread);
    const bool mine = completes(thread, above, sum, wanted);
    __syncthreads();
    if (mine) {
      int bin = digit.bins() - 1 - thread * each;
      for (; above + static_cast<int64_t>(histogram[bin]) < wanted; --bin) above += histogram[bin];
      selected.prefix |= static_cast<uint32_t>(bin) << digit.shift();
      selected.remaining = wanted - above;
      if (digit.pass == 0) selected.listed = static_cast<int64_t>(histogram[bin]) <= listed.capacity;
    }
    __syncthreads();
    if (digit.pass == 2) share_ties(sums, selected);
    if (thread == 0) workspace->selection = selected;
  }

 private:
  static ENGRAM_DEVICE int64_t before(const int64_t* sums, int thread) {
    int64_t sum = 0;
    for (int i = 0; i < thread; ++i) sum += sums[i];
    return sum;
  }
  static ENGRAM_DEVICE bool completes(int thread, int64_t before, int64_t sum, int64_t wanted) {
    return (thread == 0 || before < wanted) && before + sum >= wanted;
  }

  // Which range the last tie is taken from.
  ENGRAM_DEVICE void share_ties(int64_t* sums, Selection& selected) const {
    constexpr int kEach = static_cast<int>(kMaxRanges / kThreads);
    const int thread = threadIdx.x;
    const uint32_t bin = selected.prefix % kLastBins;
    const int64_t wanted = selected.remaining;
    const auto ties = [&](int range) {
      return range < ranges ? static_cast<int64_t>(workspace->ranges[range][bin]) : 0;
    };
    int64_t sum = 0;
    for (int i = 0; i < kEach; ++i) sum += ties(thread * kEach + i);
    sums[thread] = sum;
    __syncthreads();
    int64_t taken = before(sums, thread);
    if (completes(thread, taken, sum, wanted)) {
      int range = thread * kEach;
      for (; taken + ties(range) < wanted; ++range) taken += ties(range);
      selected.range = range;
      selected.taken = wanted - taken;
    }
    __syncthreads();
  }
};

}  // namespace engram::cuda

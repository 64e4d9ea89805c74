// The keys of a list of tensors, |ft - pre| or pre, as integers of the same order, read range by range.
#pragma once

#include "engram/graft.h"
#include "list.cuh"

namespace engram::cuda {

constexpr int kKeys = 8;  // a thread and chunk: one byte of the mask
constexpr int kKeyChunk = kThreads * kKeys;
constexpr int64_t kMaxRanges = 2048;  // a few for each multiprocessor of the largest devices

// Floats as integers of the same order, the two zeros equal.
ENGRAM_DEVICE uint32_t ordered(float value) {
  value += 0.0f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// Each block takes a contiguous range of chunks: of equal keys the first can then be told by counting them
// block by block.
struct KeyRanges {
  List<GraftTensor> list;
  int64_t ranges;

  explicit KeyRanges(const List<GraftTensor>& list)
      : list(list), ranges(list.chunks < kMaxRanges ? list.chunks : kMaxRanges) {}

  int64_t blocks() const { return ranges; }

  ENGRAM_DEVICE int64_t begin(int64_t index) const { return index * list.chunks / ranges; }
  ENGRAM_DEVICE int64_t range_of(int64_t chunk) const { return ((chunk + 1) * ranges - 1) / list.chunks; }

  // Calls use(tensor, position of the first key, how many keys, keys) for a thread's keys in a chunk.
  template <typename Use>
  ENGRAM_DEVICE static void visit(const Listed<GraftTensor>& entry, int64_t chunk, int thread,
                                  const Use& use) {
    const GraftTensor& tensor = entry.tensor;
    const int64_t at = (chunk - entry.first) * kKeyChunk + thread * kKeys;
    if (at >= tensor.size) return;
    const int valid = tensor.size - at < kKeys ? static_cast<int>(tensor.size - at) : kKeys;
    uint32_t keys[kKeys];
    if (tensor.dtype == DType::f32) load<float>(tensor, at, valid, keys);
    if (tensor.dtype == DType::bf16) load<BFloat16>(tensor, at, valid, keys);
    if (tensor.dtype == DType::f16) load<Half>(tensor, at, valid, keys);
    use(tensor, at, valid, keys);
  }

 private:
  template <typename T>
  static ENGRAM_DEVICE void load(const GraftTensor& tensor, int64_t at, int valid, uint32_t (&keys)[kKeys]) {
    const auto* const pre = static_cast<const T*>(tensor.pre) + at;
    const auto* const ft = tensor.ft ? static_cast<const T*>(tensor.ft) + at : pre;
    Pack<T, kKeys> from{}, to{};  // both on their way before either is used
    if (valid == kKeys && reinterpret_cast<uintptr_t>(pre) % 16 == 0 &&
        reinterpret_cast<uintptr_t>(ft) % 16 == 0) {
      fetch(pre, from);
      if (tensor.ft) fetch(ft, to);
    } else {
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        if (i >= valid) continue;
        from.at[i] = pre[i];
        to.at[i] = ft[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const float value = widen(from.at[i]);
      keys[i] = ordered(tensor.ft ? fabsf(widen(to.at[i]) - value) : value);
    }
  }

  template <typename T>
  static ENGRAM_DEVICE void fetch(const T* from, Pack<T, kKeys>& keys) {
    constexpr int kVec = kVector<T>;
#pragma unroll
    for (int i = 0; i < kKeys; i += kVec) {
      const auto some = load_streaming(reinterpret_cast<const Pack<T, kVec>*>(from + i));
#pragma unroll
      for (int v = 0; v < kVec; ++v) keys.at[i + v] = some.at[v];
    }
  }
};

}  // namespace engram::cuda

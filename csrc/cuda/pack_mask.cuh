// Packed masks: eight bytes of 0 or 1 become one byte of bits.
#pragma once

#include "numeric.cuh"

namespace engram::cuda {

struct PackMask {
  static constexpr int kBytes = 4;  // of the packed mask, a thread

  const uint8_t* mask;
  int64_t size;
  uint8_t* packed;

  int64_t blocks() const { return ceil_divide(size, 8 * kThreads * kBytes); }

  ENGRAM_DEVICE void run(int64_t index) const {
    const int64_t first = index * kBytes * kThreads;
    const bool whole = (first + kBytes * kThreads) * 8 <= size && reinterpret_cast<uintptr_t>(mask) % 8 == 0;
    if (whole)
      pack_whole(first + threadIdx.x);
    else
      pack_some(first + threadIdx.x);
  }

 private:
  using Bools = Pack<uint8_t, 8>;

  // All loads come before the first store: for all the compiler knows, it could change what they read.
  ENGRAM_DEVICE void pack_whole(int64_t byte) const {
    Bools bools[kBytes];
#pragma unroll
    for (int i = 0; i < kBytes; ++i)
      bools[i] = load_streaming(reinterpret_cast<const Bools*>(mask) + byte + i * kThreads);
#pragma unroll
    for (int i = 0; i < kBytes; ++i) packed[byte + i * kThreads] = pack(bools[i]);
  }

  ENGRAM_DEVICE void pack_some(int64_t byte) const {
    for (int i = 0; i < kBytes; ++i, byte += kThreads) {
      Bools bools{};
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (byte * 8 + j < size) bools.at[j] = mask[byte * 8 + j];
      if (byte * 8 < size) packed[byte] = pack(bools);
    }
  }

  static ENGRAM_DEVICE uint8_t pack(const Bools& bools) {
    uint64_t word;
    memcpy(&word, &bools, sizeof word);
    return static_cast<uint8_t>(word * 0x0102040810204080u >> 56);  // every bit moves to its place at once
  }
};

}  // namespace engram::cuda

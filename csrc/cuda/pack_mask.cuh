// Packed masks: eight bytes of 0 or 1 become one byte of bits.
#pragma once

#include "numeric.cuh"

namespace engram::cuda {

struct PackMask {
  static constexpr int kBytes = 4;  // of the packed mask, a thread

  struct Shared {};
  struct Registers {};

  const uint8_t* mask;
  int64_t size;
  uint8_t* packed;

  int64_t blocks() const { return ceil_divide(size, 8 * kThreads * kBytes); }

  template <typename Block>
  ENGRAM_DEVICE void run(Block& block, int64_t index, Shared&) const {
    block.step([&](int thread, Registers&) {
#pragma unroll
      for (int i = 0; i < kBytes; ++i) {
        const int64_t byte = (index * kBytes + i) * kThreads + thread;
        if (byte * 8 < size) packed[byte] = pack(mask + byte * 8, size - byte * 8);
      }
    });
  }

 private:
  static ENGRAM_DEVICE uint8_t pack(const uint8_t* from, int64_t valid) {
    Pack<uint8_t, 8> bools{};
    if (valid >= 8 && reinterpret_cast<uintptr_t>(from) % sizeof(bools) == 0) {
      bools = load_streaming(reinterpret_cast<const Pack<uint8_t, 8>*>(from));
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < valid) bools.at[i] = from[i];
    }
    uint64_t word;
    memcpy(&word, &bools, sizeof word);
    return static_cast<uint8_t>(word * 0x0102040810204080u >> 56);  // every bit moves to its place at once
  }
};

}  // namespace engram::cuda

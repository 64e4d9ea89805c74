// Eight entries of a packed mask at a time: bytes of 0 or 1 to a byte of bits, and back.
#pragma once

#include "simd.h"

namespace engram::cpu::ENGRAM_ISA {

// Each product moves every bit to its place.
inline uint8_t pack_eight(const uint8_t* mask) {
  return static_cast<uint8_t>((load<uint64_t>(mask) * 0x0102040810204080u) >> 56);
}
inline uint64_t unpack_eight(uint8_t byte) {
  const uint64_t bits = (byte * 0x0101010101010101u) & 0x8040201008040201u;
  return ((bits + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
}

}  // namespace engram::cpu::ENGRAM_ISA

// Logic, shifts, fields of bits.
#include <algorithm>

#include "opcode.h"

namespace ptx {

namespace {

template <auto function>
void logic(Kernel& kernel, Instruction& i) {
  if (i.type == Type::pred) return bind_map<function, uint8_t, uint8_t, uint8_t>(kernel, i);
  integers2<function>(kernel, i);
}

template <auto function>
void shift(Kernel& kernel, Instruction& i) {
  with_integer(i.type, [&]<class T>(T) { bind_map<function, T, T, uint32_t>(kernel, i); });
}

// Shifts by more bits than there are leave nothing, or the sign.
constexpr auto kShiftLeft = []<class T>(T a, uint32_t by) { return by < 8 * sizeof(T) ? T(a << by) : T(0); };
constexpr auto kShiftRight = []<class T>(T a, uint32_t by) {
  return by < 8 * sizeof(T) ? T(a >> by) : T(a < 0 ? -1 : 0);
};

// A field from bit `from` on, extended by its last bit where T is signed.
constexpr auto kExtract = []<class T>(T a, uint32_t from, uint32_t length) -> T {
  constexpr uint32_t kBits = 8 * sizeof(T);
  from &= 255;
  length &= 255;
  if (length == 0) return 0;
  const bool negative = std::is_signed_v<T> && (uint64_t(a) >> std::min(from + length - 1, kBits - 1) & 1);
  uint64_t field = 0;
  for (uint32_t j = 0; j < kBits; ++j)
    field |= uint64_t(j < length && from + j < kBits ? uint64_t(a) >> (from + j) & 1 : negative) << j;
  return T(field);
};

constexpr auto kInsert = []<class T>(T a, T b, uint32_t from, uint32_t length) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  from &= 255;
  for (uint32_t j = from; j < std::min(from + (length & 255), kBits); ++j)
    b = T((b & ~(T(1) << j)) | ((a >> (j - from) & 1) << j));
  return b;
};

// Each of four bytes is one of the operands' eight, or its sign eight times.
constexpr auto kPermute = [](uint32_t a, uint32_t b, uint32_t selection) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int j = 0; j < 4; ++j) {
    const uint32_t select = selection >> (4 * j) & 15, byte = bytes >> (8 * (select & 7)) & 255;
    result |= (select & 8 ? (byte & 128 ? 255 : 0) : byte) << (8 * j);
  }
  return result;
};

}  // namespace

bool bind_bits(Kernel& kernel, Instruction& i, Opcode& opcode) {
  const std::string& op = opcode.name;
  if (op == "and") {
    logic<[](auto a, auto b) { return a & b; }>(kernel, i);
    if (i.type == Type::b32) i.parts = Instruction::Parts::mask;
  } else if (op == "or")
    logic<[](auto a, auto b) { return a | b; }>(kernel, i);
  else if (op == "xor")
    logic<[](auto a, auto b) { return a ^ b; }>(kernel, i);
  else if (op == "not" && i.type == Type::pred)
    bind_map<[](uint8_t a) { return !a; }, uint8_t, uint8_t>(kernel, i);
  else if (op == "not")
    integers1<[](auto a) { return ~a; }>(kernel, i);
  else if (op == "shl")
    shift<kShiftLeft>(kernel, i);
  else if (op == "shr")
    shift<kShiftRight>(kernel, i);
  else if (op == "bfe")
    with_integer(i.type, [&]<class T>(T) { bind_map<kExtract, T, T, uint32_t, uint32_t>(kernel, i); });
  else if (op == "bfi")
    with_integer(i.type, [&]<class T>(T) { bind_map<kInsert, T, T, T, uint32_t, uint32_t>(kernel, i); });
  else if (op == "prmt") {
    bind_map<kPermute, uint32_t, uint32_t, uint32_t, uint32_t>(kernel, i);
    i.parts = Instruction::Parts::permute;
  } else if (op == "popc" && i.type == Type::b32)
    bind_map<[](uint32_t a) { return std::popcount(a); }, uint32_t, uint32_t>(kernel, i);
  else
    return false;
  return true;
}

}  // namespace ptx

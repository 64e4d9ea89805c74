// Moves, conversions between types, packing, addresses of spaces.
#include <limits>

#include "opcode.h"

namespace ptx {

namespace {

constexpr auto kSame = [](auto a) { return a; };

// Many registers into one of the sum of their widths, or the other way.
void pack(Warp& w, const Instruction& i, uint32_t lanes) {
  const int parts = i.operand.size() - 1, bytes = bytes_of(i.type) / parts;
  each_lane(lanes, [&](int l) {
    uint64_t value = 0;
    for (int j = 0; j < parts; ++j) value |= w.value(i.operand[1 + j], l) << (8 * bytes * j);
    w.set(i.operand[0], l, value);
  });
}
void unpack(Warp& w, const Instruction& i, uint32_t lanes) {
  const int parts = i.outputs, bytes = bytes_of(i.type) / parts;
  each_lane(lanes, [&](int l) {
    const uint64_t value = w.value(i.operand[parts], l);
    for (int j = 0; j < parts; ++j) w.set(i.operand[j], l, value >> (8 * bytes * j));
  });
}

void move(Kernel& kernel, Instruction& i) {
  const int bytes = bytes_of(i.type), count = i.operand.size();
  if (count > 2) {
    const bool packs = i.outputs == 1;
    std::vector<int> widths(count, bytes / (count - 1));
    widths[packs ? 0 : count - 1] = bytes;
    shape(kernel, i, widths);
    i.run = packs ? pack : unpack;
    if (count == 3) i.parts = packs ? Instruction::Parts::pack : Instruction::Parts::unpack;
    return;
  }
  if (i.type == Type::pred) return bind_map<kSame, uint8_t, uint8_t>(kernel, i);
  i.parts = Instruction::Parts::each;
  with_word(bytes, [&]<class T>(T) { bind_map<kSame, T, T>(kernel, i); });
}

// -- cvt
// ----------------------------------------------------------------------------------------------------- A
// source is widened to a double or a 64-bit integer, both of which hold it exactly.

enum Variant { kToInteger = 8 };  // added to a Rounding: rounds to an integer, not to a shorter mantissa

int64_t integer_in(Type type, uint64_t bits) {
  switch (type) {
    case Type::s8:
      return int8_t(bits);
    case Type::s16:
      return int16_t(bits);
    case Type::s32:
      return int32_t(bits);
    case Type::u8:
      return uint8_t(bits);
    case Type::u16:
      return uint16_t(bits);
    case Type::u32:
      return uint32_t(bits);
    default:
      return bits;
  }
}

double float_in(Type type, uint64_t bits) {
  switch (type) {
    case Type::f16:
      return from_f16(bits);
    case Type::bf16:
      return from_bf16(bits);
    case Type::f32:
      return std::bit_cast<float>(uint32_t(bits));
    default:
      return std::bit_cast<double>(bits);
  }
}

uint64_t float_out(Type type, double x, Rounding rounding, bool flush) {
  switch (type) {
    case Type::f16:
      return to_f16(float(x), rounding);
    case Type::bf16:
      return to_bf16(float(x), rounding);
    case Type::tf32:
      return std::bit_cast<uint32_t>(to_tf32(float(x), rounding));
    case Type::f32: {
      const float f = to_f32(x, rounding);
      return std::bit_cast<uint32_t>(canonical(flush ? flushed(f) : f));
    }
    default:
      return std::bit_cast<uint64_t>(x);
  }
}

double integral(double x, Rounding rounding) {
  switch (rounding) {
    case Rounding::zero:
      return std::trunc(x);
    case Rounding::down:
      return std::floor(x);
    case Rounding::up:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

// Out of range gives the nearest value that there is. NaN gives 0, or in 64 bits the highest bit alone.
uint64_t saturated(Type source, Type type, double x) {
  const int bits = 8 * bytes_of(type);
  if (x != x) return source == Type::f64 || bits == 64 ? 1ull << (bits - 1) : 0;
  const double end = std::ldexp(1.0, bits - is_signed(type)), begin = is_signed(type) ? -end : 0;
  if (x >= end) return is_signed(type) ? (1ull << (bits - 1)) - 1 : bits == 64 ? ~0ull : (1ull << bits) - 1;
  if (x <= begin) return is_signed(type) ? ~0ull << (bits - 1) : 0;
  return x < 0 ? uint64_t(int64_t(x)) : uint64_t(x);
}

double integer_to_float(Type source, Type type, int64_t n) {
  if (type == Type::f32) return source == Type::u64 ? float(uint64_t(n)) : float(n);  // one rounding, not two
  return source == Type::u64 ? double(uint64_t(n)) : double(n);
}

void convert(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto rounding = Rounding(i.variant & ~kToInteger);
  const bool to_integer = i.variant & kToInteger;
  const Type type = i.type, source = i.source_type;
  each_lane(lanes, [&](int l) {
    const uint64_t bits = w.value(i.operand[1], l);
    uint64_t result;
    if (is_float(source)) {
      double x = float_in(source, bits);
      if (i.flush && source == Type::f32) x = flushed(float(x));
      if (to_integer) x = integral(x, rounding);
      result = is_float(type) ? float_out(type, x, to_integer ? Rounding::nearest : rounding, i.flush)
                              : saturated(source, type, x);
    } else {
      const int64_t n = integer_in(source, bits);
      result = is_float(type) ? float_out(type, integer_to_float(source, type, n), rounding, false)
                              : integer_in(type, n);
    }
    w.set(i.operand[0], l, result);
  });
}

// cvt.rn.bf16x2.f32 d, a, b: a is the upper half.
void convert_pair(Warp& w, const Instruction& i, uint32_t lanes) {
  const float *upper = w.in<float>(i.operand[1]), *lower = w.in<float>(i.operand[2]);
  const auto half = [&](float x) -> uint32_t {
    return i.type == Type::bf16x2 ? to_bf16(x, Rounding(i.variant)) : to_f16(x, Rounding(i.variant));
  };
  each_lane(lanes, [&](int l) { w.set(i.operand[0], l, half(upper[l]) << 16 | half(lower[l])); });
}

void conversion(Kernel& kernel, Instruction& i, Opcode& opcode) {
  const std::string rounding =
      opcode.take_one_of({"rn", "rz", "rna", "rm", "rp", "rni", "rzi", "rmi", "rpi"});
  if (rounding.size() > 2) {
    if (rounding == "rna")
      i.variant = int(Rounding::away);
    else
      i.variant = kToInteger;
  }
  if (rounding.size() > 1 && rounding != "rna")
    i.variant |= int(rounding[1] == 'z'   ? Rounding::zero
                     : rounding[1] == 'm' ? Rounding::down
                     : rounding[1] == 'p' ? Rounding::up
                                          : Rounding::nearest);
  i.flush = opcode.take("ftz");
  if (i.type == Type::bf16x2 || i.type == Type::f16x2) {
    if (rounding != "rn" && rounding != "rz") throw Error("a rounding that is not known");
    shape(kernel, i, {4, 4, 4});
    i.run = convert_pair;
    return;
  }
  const bool shortened = i.type == Type::f16 || i.type == Type::bf16 || i.type == Type::tf32;
  if (shortened && i.source_type != Type::f32) throw Error("this conversion");
  if (shortened && rounding != "rn" && rounding != "rz" && rounding != "rna") throw Error("this rounding");
  if (is_float(i.source_type) && !is_float(i.type) && !(i.variant & kToInteger)) throw Error("no rounding");
  if (!is_float(i.source_type) && i.variant) throw Error("this rounding");
  if (i.type == Type::none || i.type == Type::pred) return;
  shape(kernel, i, {0, 0});
  const bool cuts = !is_float(i.type) && !is_float(i.source_type) && bytes_of(i.type) <= 4;
  if (cuts && bytes_of(i.source_type) == 8) i.parts = Instruction::Parts::low;
  i.run = convert;
}

}  // namespace

bool bind_convert(Kernel& kernel, Instruction& i, Opcode& opcode) {
  if (opcode.name == "mov") {
    move(kernel, i);
  } else if (opcode.name == "cvt") {
    conversion(kernel, i, opcode);
  } else if (opcode.name == "cvta") {
    const bool to = opcode.take("to");
    if (opcode.take("global"))
      bind_map<kSame, uint64_t, uint64_t>(kernel, i);
    else if (opcode.take("shared"))
      to ? bind_map<[](uint64_t a) { return a - kSharedWindow; }, uint64_t, uint64_t>(kernel, i)
         : bind_map<[](uint64_t a) { return a + kSharedWindow; }, uint64_t, uint64_t>(kernel, i);
  } else {
    return false;
  }
  return true;
}

}  // namespace ptx

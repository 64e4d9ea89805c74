// How groups of instructions choose their handlers.
#pragma once

#include <bit>
#include <initializer_list>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "machine.h"
#include "numeric.h"

namespace ptx {

// An opcode with its modifiers. Each of them must be taken by the group that handles it: what is left over is
// not known, and no handler runs that ignores a word.
class Opcode {
 public:
  explicit Opcode(const std::string& text);
  bool take(const std::string& modifier);
  std::string take_one_of(std::initializer_list<const char*> modifiers);  // "" where there is none
  Type type(size_t index = 0) const { return index < types_.size() ? types_[index] : Type::none; }
  void finish() const;

  std::string name;

 private:
  std::vector<std::string> left_;
  std::vector<Type> types_;
};

// Groups: each returns whether the opcode is one of its own, and then has chosen the handler, or found none.
bool bind_arithmetic(Kernel& kernel, Instruction& i, Opcode& opcode);
bool bind_approximate(Kernel& kernel, Instruction& i, Opcode& opcode);
bool bind_bits(Kernel& kernel, Instruction& i, Opcode& opcode);
bool bind_compare(Kernel& kernel, Instruction& i, Opcode& opcode);
bool bind_convert(Kernel& kernel, Instruction& i, Opcode& opcode);
bool bind_memory(Kernel& kernel, Instruction& i, Opcode& opcode);
bool bind_warp(Kernel& kernel, Instruction& i, Opcode& opcode);
bool bind_matrix(Kernel& kernel, Instruction& i, Opcode& opcode);

// Checks number and widths of the operands; 0: any width. Constants get theirs.
void shape(Kernel& kernel, Instruction& i, const std::vector<int>& bytes);

template <class F>
void each_lane(uint32_t lanes, F f) {
  for (; lanes; lanes &= lanes - 1) f(std::countr_zero(lanes));
}

// All lanes are computed, which a compiler can do in one instruction of the host, and those that run are
// kept.
template <class T>
void keep(Warp& w, const Operand& o, const T* result, uint32_t lanes) {
  T* out = w.out<T>(o);
  if (lanes == ~0u)
    memcpy(out, result, kLanes * sizeof(T));
  else
    for (int l = 0; l < kLanes; ++l) out[l] = lanes >> l & 1 ? result[l] : out[l];
}

template <auto function, class D, class... A>
void map_lanes(Warp& w, const Instruction& i, uint32_t lanes) {
  alignas(64) D result[kLanes];
  [&]<size_t... k>(std::index_sequence<k...>) {
    const std::tuple inputs{w.in<A>(i.operand[1 + k])...};
    for (int l = 0; l < kLanes; ++l) result[l] = canonical(D(function(std::get<k>(inputs)[l]...)));
  }(std::index_sequence_for<A...>());
  keep(w, i.operand[0], result, lanes);
}
// result = function(inputs...), lane by lane, with their C++ types.
template <auto function, class D, class... A>
void bind_map(Kernel& kernel, Instruction& i) {
  shape(kernel, i, {sizeof(D), sizeof(A)...});
  i.run = map_lanes<function, D, A...>;
}

// Calls f with a value of the C++ type.
template <class F>
bool with_integer(Type type, F f) {
  switch (type) {
    case Type::s8:
      return f(int8_t()), true;
    case Type::b8:
    case Type::u8:
      return f(uint8_t()), true;
    case Type::s16:
      return f(int16_t()), true;
    case Type::b16:
    case Type::u16:
      return f(uint16_t()), true;
    case Type::s32:
      return f(int32_t()), true;
    case Type::b32:
    case Type::u32:
      return f(uint32_t()), true;
    case Type::s64:
      return f(int64_t()), true;
    case Type::b64:
    case Type::u64:
      return f(uint64_t()), true;
    default:
      return false;
  }
}
// The same for bits of any type.
template <class F>
bool with_word(int bytes, F f) {
  switch (bytes) {
    case 2:
      return f(uint16_t()), true;
    case 4:
      return f(uint32_t()), true;
    case 8:
      return f(uint64_t()), true;
    default:
      return false;
  }
}
template <class F>
bool with_float(Type type, F f) {
  if (type == Type::f32) return f(float()), true;
  if (type == Type::f64) return f(double()), true;
  return false;
}

// The same for operands that all have the instruction's type.
template <auto function>
bool integers1(Kernel& kernel, Instruction& i) {
  return with_integer(i.type, [&]<class T>(T) { bind_map<function, T, T>(kernel, i); });
}
template <auto function>
bool integers2(Kernel& kernel, Instruction& i) {
  return with_integer(i.type, [&]<class T>(T) { bind_map<function, T, T, T>(kernel, i); });
}
template <auto function>
bool floats1(Kernel& kernel, Instruction& i) {
  return with_float(i.type, [&]<class T>(T) { bind_map<function, T, T>(kernel, i); });
}
template <auto function>
bool floats2(Kernel& kernel, Instruction& i) {
  return with_float(i.type, [&]<class T>(T) { bind_map<function, T, T, T>(kernel, i); });
}
template <auto function>
bool numbers1(Kernel& kernel, Instruction& i) {
  return integers1<function>(kernel, i) || floats1<function>(kernel, i);
}
template <auto function>
bool numbers2(Kernel& kernel, Instruction& i) {
  return integers2<function>(kernel, i) || floats2<function>(kernel, i);
}

}  // namespace ptx

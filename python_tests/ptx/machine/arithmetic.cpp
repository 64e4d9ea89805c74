// Sums, products, quotients, of integers and floats; approximations; fusion of a product and a sum.
#include <algorithm>
#include <limits>

#include "opcode.h"

namespace ptx {

namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
constexpr bool kInteger = std::is_integral_v<T>;

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (kInteger<T>)
      return T(Unsigned<T>(a) + Unsigned<T>(b));
    else
      return a + b;
  }
};
struct Subtract {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (kInteger<T>)
      return T(Unsigned<T>(a) - Unsigned<T>(b));
    else
      return a - b;
  }
};
struct Multiply {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (kInteger<T>)
      return T(uint64_t(a) * uint64_t(b));
    else
      return a * b;
  }
};
struct Divide {  // by zero: all ones, as NVIDIA's GPUs give; the ISA leaves it open
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (kInteger<T>) {
      if (b == 0) return T(-1);
      return std::is_signed_v<T> && b == T(-1) ? T(0 - Unsigned<T>(a)) : T(a / b);
    } else {
      return a / b;
    }
  }
};
struct Remainder {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    return std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
  }
};
// NaN gives the other operand, and -0 is less than +0.
struct Least {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (kInteger<T>)
      return a < b ? a : b;
    else
      return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
  }
};
struct Greatest {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (kInteger<T>)
      return a > b ? a : b;
    else
      return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
  }
};
template <class Choice>
struct OrNan {
  float operator()(float a, float b) const { return a != a || b != b ? NAN : Choice{}(a, b); }
};
struct Negate {
  template <class T>
  T operator()(T a) const {
    if constexpr (kInteger<T>)
      return T(0 - Unsigned<T>(a));
    else
      return -a;
  }
};
struct Absolute {
  template <class T>
  T operator()(T a) const {
    if constexpr (kInteger<T>)
      return a < 0 ? T(0 - Unsigned<T>(a)) : a;
    else
      return std::abs(a);
  }
};
struct MultiplyAdd {
  template <class T>
  T operator()(T a, T b, T c) const {
    if constexpr (kInteger<T>)
      return T(uint64_t(a) * uint64_t(b) + uint64_t(c));
    else
      return std::fma(a, b, c);
  }
};
struct Reciprocal {
  template <class T>
  T operator()(T a) const {
    return T(1) / a;
  }
};
struct SquareRoot {
  template <class T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
template <class Wide>
struct WideMultiply {
  template <class T>
  Wide operator()(T a, T b) const {
    return Wide(a) * Wide(b);
  }
};
template <class Wide>
struct WideMultiplyAdd {
  template <class T>
  Wide operator()(T a, T b, Wide c) const {
    return Wide(std::make_unsigned_t<Wide>(Wide(a) * Wide(b)) + std::make_unsigned_t<Wide>(c));
  }
};
template <class Wide>
struct HighMultiply {
  template <class T>
  T operator()(T a, T b) const {
    return T(Wide(a) * Wide(b) >> (8 * sizeof(T)));
  }
};

// The first operand is the short one: sub.f32.bf16 d, a, c is float(a) - c.
template <class F, float (*Widen)(uint16_t)>
struct Mixed {
  float operator()(uint16_t a, float b) const { return F{}(Widen(a), b); }
};

template <class F>
struct Pair {  // two floats in 64 bits
  template <class... A>
  uint64_t operator()(A... a) const {
    const auto half = [](float f) { return uint64_t(std::bit_cast<uint32_t>(canonical(f))); };
    return half(F{}(std::bit_cast<float>(uint32_t(a))...)) |
           half(F{}(std::bit_cast<float>(uint32_t(a >> 32))...)) << 32;
  }
};

// -- Approximate instructions
// --------------------------------------------------------------------------------

// Off by up to `ulps`, one way for one input, as in a table of a GPU.
float approximate(float exact, int ulps, uint32_t a, uint32_t b = 0) {
  if (!options.approximation || !std::isfinite(exact) || exact == 0) return exact;
  uint64_t hash = (uint64_t(a) << 32 | b) + uint64_t(options.seed) * 0x9e3779b97f4a7c15ull;
  hash = (hash ^ hash >> 30) * 0xbf58476d1ce4e5b9ull;
  hash = (hash ^ hash >> 27) * 0x94d049bb133111ebull;
  return moved_by_ulps(exact, int((hash >> 33) % (2 * ulps + 1)) - ulps);
}
uint32_t bits(float f) { return std::bit_cast<uint32_t>(f); }

// 2^x: relative error 2^-22, which is two ulps at the least.
struct ExponentApproximate {
  float operator()(float a) const { return approximate(std::exp2(a), 2, bits(a)); }
};
struct LogarithmApproximate {  // near 1 the bound is one of the absolute error, 2^-22
  float operator()(float a) const { return approximate(std::log2(a), 1, bits(a)); }
};
struct ReciprocalApproximate {
  float operator()(float a) const { return approximate(1 / a, 1, bits(a)); }
};
struct RootApproximate {
  float operator()(float a) const { return approximate(std::sqrt(a), 1, bits(a)); }
};
struct ReciprocalRootApproximate {
  float operator()(float a) const { return approximate(float(1 / std::sqrt(double(a))), 1, bits(a)); }
};
struct DivideApproximate {
  float operator()(float a, float b) const { return approximate(a / b, 2, bits(a), bits(b)); }
};
template <class F>
struct Flushed {
  template <class... A>
  float operator()(A... a) const {
    return flushed(F{}(flushed(a)...));
  }
};

template <class F, class... A>
void bind_approximate(Kernel& kernel, Instruction& i, Opcode& opcode) {
  if (i.type != Type::f32) return;
  opcode.take("ftz") ? bind_map<Flushed<F>, float, A...>(kernel, i) : bind_map<F, float, A...>(kernel, i);
}

// -- Binding
// -------------------------------------------------------------------------------------------------

template <class F>
bool numbers2(Kernel& kernel, Instruction& i) {
  return with_number(i.type, [&](auto t) { bind_map<F, decltype(t), decltype(t), decltype(t)>(kernel, i); });
}
template <class F>
bool numbers1(Kernel& kernel, Instruction& i) {
  return with_number(i.type, [&](auto t) { bind_map<F, decltype(t), decltype(t)>(kernel, i); });
}
template <class F>
bool floats1(Kernel& kernel, Instruction& i) {
  return with_float(i.type, [&](auto t) { bind_map<F, decltype(t), decltype(t)>(kernel, i); });
}

template <class F>
void sum(Kernel& kernel, Instruction& i, Opcode& opcode) {
  opcode.take("rn");
  if (i.type == Type::f32x2) return bind_map<Pair<F>, uint64_t, uint64_t, uint64_t>(kernel, i);
  if (i.type == Type::f32 && i.source_type == Type::bf16)
    return bind_map<Mixed<F, from_bf16>, float, uint16_t, float>(kernel, i);
  if (i.type == Type::f32 && i.source_type == Type::f16)
    return bind_map<Mixed<F, from_f16>, float, uint16_t, float>(kernel, i);
  numbers2<F>(kernel, i);
}

template <template <class> class F>
void wide(Kernel& kernel, Instruction& i, bool add) {
  const auto bind = [&](auto narrow, auto wide) {
    using N = decltype(narrow);
    using W = decltype(wide);
    if (add)
      bind_map<WideMultiplyAdd<W>, W, N, N, W>(kernel, i);
    else
      bind_map<F<W>, W, N, N>(kernel, i);
  };
  switch (i.type) {
    case Type::s16:
      return bind(int16_t(), int32_t());
    case Type::u16:
      return bind(uint16_t(), uint32_t());
    case Type::s32:
      return bind(int32_t(), int64_t());
    case Type::u32:
      return bind(uint32_t(), uint64_t());
    default:
      return;
  }
}

void high(Kernel& kernel, Instruction& i) {
  switch (i.type) {
    case Type::s32:
      return bind_map<HighMultiply<int64_t>, int32_t, int32_t, int32_t>(kernel, i);
    case Type::u32:
      return bind_map<HighMultiply<uint64_t>, uint32_t, uint32_t, uint32_t>(kernel, i);
    case Type::s64:
      return bind_map<HighMultiply<__int128>, int64_t, int64_t, int64_t>(kernel, i);
    case Type::u64:
      return bind_map<HighMultiply<unsigned __int128>, uint64_t, uint64_t, uint64_t>(kernel, i);
    default:
      return;
  }
}

void product(Kernel& kernel, Instruction& i, Opcode& opcode) {
  if (opcode.take("wide")) return wide<WideMultiply>(kernel, i, false);
  if (opcode.take("hi")) return high(kernel, i);
  if (!is_float(i.type) && i.type != Type::f32x2 && !opcode.take("lo")) throw Error("a product without .lo");
  if (i.type == Type::f32x2) {
    opcode.take("rn");
    return bind_map<Pair<Multiply>, uint64_t, uint64_t, uint64_t>(kernel, i);
  }
  if (is_float(i.type)) opcode.take("rn");
  numbers2<Multiply>(kernel, i);
}

void multiply_add(Kernel& kernel, Instruction& i, Opcode& opcode) {
  if (opcode.take("wide")) return wide<WideMultiply>(kernel, i, true);
  if (opcode.name == "fma" ? !opcode.take("rn") : !opcode.take("lo")) throw Error("this form of it");
  if (i.type == Type::f32x2)
    return bind_map<Pair<MultiplyAdd>, uint64_t, uint64_t, uint64_t, uint64_t>(kernel, i);
  const auto bind = [&](auto t) {
    using T = decltype(t);
    bind_map<MultiplyAdd, T, T, T, T>(kernel, i);
  };
  opcode.name == "fma" ? with_float(i.type, bind) : with_integer(i.type, bind);
}

void quotient(Kernel& kernel, Instruction& i, Opcode& opcode) {
  if (opcode.take("full") || opcode.take("approx"))
    return bind_approximate<DivideApproximate, float, float>(kernel, i, opcode);
  if (is_float(i.type) && !opcode.take("rn")) throw Error("a quotient without .rn, .full or .approx");
  numbers2<Divide>(kernel, i);
}

template <class Exact, class Approximate>
void root(Kernel& kernel, Instruction& i, Opcode& opcode) {
  if (opcode.take("approx")) return bind_approximate<Approximate, float>(kernel, i, opcode);
  if (opcode.take("rn")) floats1<Exact>(kernel, i);
}

template <class F>
void extreme(Kernel& kernel, Instruction& i, Opcode& opcode) {
  if (opcode.take("NaN"))
    return i.type == Type::f32 ? bind_map<OrNan<F>, float, float, float>(kernel, i) : void();
  numbers2<F>(kernel, i);
}

}  // namespace

bool bind_arithmetic(Kernel& kernel, Instruction& i, Opcode& opcode) {
  const std::string& op = opcode.name;
  if (op == "add")
    sum<Add>(kernel, i, opcode);
  else if (op == "sub")
    sum<Subtract>(kernel, i, opcode);
  else if (op == "mul")
    product(kernel, i, opcode);
  else if (op == "mad" || op == "fma")
    multiply_add(kernel, i, opcode);
  else if (op == "div")
    quotient(kernel, i, opcode);
  else if (op == "rem") {
    with_integer(i.type,
                 [&](auto t) { bind_map<Remainder, decltype(t), decltype(t), decltype(t)>(kernel, i); });
  } else if (op == "min")
    extreme<Least>(kernel, i, opcode);
  else if (op == "max")
    extreme<Greatest>(kernel, i, opcode);
  else if (op == "neg")
    numbers1<Negate>(kernel, i);
  else if (op == "abs")
    numbers1<Absolute>(kernel, i);
  else if (op == "rcp")
    root<Reciprocal, ReciprocalApproximate>(kernel, i, opcode);
  else if (op == "sqrt")
    root<SquareRoot, RootApproximate>(kernel, i, opcode);
  else if (op == "rsqrt" && opcode.take("approx"))
    bind_approximate<ReciprocalRootApproximate, float>(kernel, i, opcode);
  else if (op == "ex2" && opcode.take("approx"))
    bind_approximate<ExponentApproximate, float>(kernel, i, opcode);
  else if (op == "lg2" && opcode.take("approx"))
    bind_approximate<LogarithmApproximate, float>(kernel, i, opcode);
  else
    return false;
  return true;
}

}  // namespace ptx

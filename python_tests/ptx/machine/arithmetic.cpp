// Sums, products and quotients of integers and floats. Integers wrap: the machine is compiled with -fwrapv.
#include "opcode.h"

namespace ptx {

namespace {

constexpr auto kAdd = [](auto a, auto b) { return a + b; };
constexpr auto kSubtract = [](auto a, auto b) { return a - b; };
constexpr auto kMultiply = [](auto a, auto b) { return a * b; };
constexpr auto kMultiplyAdd = [](auto a, auto b, auto c) { return a * b + c; };
constexpr auto kFusedMultiplyAdd = [](auto a, auto b, auto c) { return std::fma(a, b, c); };

// Division by zero is left open by the ISA: all ones, and the dividend, are what NVIDIA's GPUs give.
constexpr auto kDivide = []<class T>(T a, T b) -> T {
  return b == 0 ? T(-1) : std::is_signed_v<T> && b == T(-1) ? T(-a) : T(a / b);
};
constexpr auto kRemainder = []<class T>(T a, T b) -> T {
  return b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
};

// Of floats: NaN gives the other operand, and -0 is less than +0.
constexpr auto kLeast = [](auto a, auto b) {
  return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
};
constexpr auto kGreatest = [](auto a, auto b) {
  return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
};

// Two floats in 64 bits.
template <auto function>
constexpr auto kPair = [](auto... operands) {
  const auto half = [&](int shift) {
    const float result = canonical(float(function(std::bit_cast<float>(uint32_t(operands >> shift))...)));
    return uint64_t(std::bit_cast<uint32_t>(result)) << shift;
  };
  return half(0) | half(32);
};

// Products of twice the width, and their upper halves.
template <class F>
bool with_wide(Type type, F f) {
  switch (type) {
    case Type::s16:
      return f(int16_t(), int32_t()), true;
    case Type::u16:
      return f(uint16_t(), uint32_t()), true;
    case Type::s32:
      return f(int32_t(), int64_t()), true;
    case Type::u32:
      return f(uint32_t(), uint64_t()), true;
    default:
      return false;
  }
}

template <auto function>
void sum(Kernel& kernel, Instruction& i, Opcode& opcode) {
  opcode.take("rn");
  // sub.f32.bf16 d, a, c: the first operand is the short one.
  if (i.type == Type::f32 && i.source_type == Type::bf16)
    return bind_map<[](uint16_t a, float c) { return function(from_bf16(a), c); }, float, uint16_t, float>(
        kernel, i);
  if (i.type == Type::f32 && i.source_type == Type::f16)
    return bind_map<[](uint16_t a, float c) { return function(from_f16(a), c); }, float, uint16_t, float>(
        kernel, i);
  if (i.type == Type::f32x2) return bind_map<kPair<function>, uint64_t, uint64_t, uint64_t>(kernel, i);
  numbers2<function>(kernel, i);
}

void product(Kernel& kernel, Instruction& i, Opcode& opcode) {
  if (opcode.take("wide")) {
    with_wide(i.type, [&]<class N, class W>(N, W) {
      bind_map<[](N a, N b) { return W(a) * W(b); }, W, N, N>(kernel, i);
    });
  } else if (opcode.take("hi")) {
    with_wide(i.type, [&]<class N, class W>(N, W) {
      bind_map<[](N a, N b) { return (W(a) * W(b) >> (8 * sizeof(N))); }, N, N, N>(kernel, i);
    });
  } else if (opcode.take("lo")) {
    integers2<kMultiply>(kernel, i);
  } else {
    opcode.take("rn");
    if (i.type == Type::f32x2) return bind_map<kPair<kMultiply>, uint64_t, uint64_t, uint64_t>(kernel, i);
    floats2<kMultiply>(kernel, i);
  }
}

void multiply_add(Kernel& kernel, Instruction& i, Opcode& opcode) {
  if (opcode.take("wide"))
    with_wide(i.type, [&]<class N, class W>(N, W) {
      bind_map<[](N a, N b, W c) { return W(a) * W(b) + c; }, W, N, N, W>(kernel, i);
    });
  else if (opcode.take("lo"))
    with_integer(i.type, [&]<class T>(T) { bind_map<kMultiplyAdd, T, T, T, T>(kernel, i); });
}

void fused_multiply_add(Kernel& kernel, Instruction& i, Opcode& opcode) {
  if (!opcode.take("rn")) return;
  if (i.type == Type::f32x2)
    return bind_map<kPair<kFusedMultiplyAdd>, uint64_t, uint64_t, uint64_t, uint64_t>(kernel, i);
  with_float(i.type, [&]<class T>(T) { bind_map<kFusedMultiplyAdd, T, T, T, T>(kernel, i); });
}

}  // namespace

bool bind_arithmetic(Kernel& kernel, Instruction& i, Opcode& opcode) {
  const std::string& op = opcode.name;
  if (op == "add") {
    sum<kAdd>(kernel, i, opcode);
  } else if (op == "sub") {
    sum<kSubtract>(kernel, i, opcode);
  } else if (op == "mul") {
    product(kernel, i, opcode);
  } else if (op == "mad") {
    multiply_add(kernel, i, opcode);
  } else if (op == "fma") {
    fused_multiply_add(kernel, i, opcode);
  } else if (op == "div" && opcode.take("rn")) {
    floats2<[](auto a, auto b) { return a / b; }>(kernel, i);
  } else if (op == "div" && !is_float(i.type)) {
    integers2<kDivide>(kernel, i);
  } else if (op == "rem") {
    integers2<kRemainder>(kernel, i);
  } else if (op == "min") {
    integers2<[](auto a, auto b) { return a < b ? a : b; }>(kernel, i) || floats2<kLeast>(kernel, i);
  } else if (op == "max") {
    integers2<[](auto a, auto b) { return (a > b) ? a : b; }>(kernel, i) || floats2<kGreatest>(kernel, i);
  } else if (op == "neg") {
    numbers1<[](auto a) { return -a; }>(kernel, i);
  } else if (op == "abs") {
    integers1<[](auto a) { return a < 0 ? -a : a; }>(kernel, i) ||
        floats1<[](auto a) { return std::abs(a); }>(kernel, i);
  } else if (op == "rcp" && opcode.take("rn")) {
    floats1<[](auto a) { return 1 / a; }>(kernel, i);
  } else if (op == "sqrt" && opcode.take("rn")) {
    floats1<[](auto a) { return std::sqrt(a); }>(kernel, i);
  } else {
    return false;
  }
  return true;
}

}  // namespace ptx

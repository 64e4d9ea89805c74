// Logic, shifts, fields of bits.
#include <algorithm>

#include "opcode.h"

namespace ptx {

namespace {

struct And {
  template <class T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct ExclusiveOr {
  template <class T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  T operator()(T a) const {
    return T(~a);
  }
};
struct NotPredicate {
  uint8_t operator()(uint8_t a) const { return !a; }
};
// Shifts by more bits than there are leave nothing, or the sign.
struct ShiftLeft {
  template <class T>
  T operator()(T a, uint32_t by) const {
    return by < 8 * sizeof(T) ? T(uint64_t(a) << by) : T(0);
  }
};
struct ShiftRight {
  template <class T>
  T operator()(T a, uint32_t by) const {
    return by < 8 * sizeof(T) ? T(a >> by) : T(a < 0 ? -1 : 0);
  }
};
struct Extract {
  template <class T>
  T operator()(T a, uint32_t from, uint32_t length) const {
    constexpr uint32_t kBits = 8 * sizeof(T);
    from &= 255;
    length &= 255;
    if (length == 0) return 0;
    const uint32_t sign_at = std::min(from + length - 1, kBits - 1);
    const bool negative = std::is_signed_v<T> && (uint64_t(a) >> sign_at & 1);
    uint64_t field = 0;
    for (uint32_t j = 0; j < kBits; ++j)
      field |= uint64_t(j < length && from + j < kBits ? uint64_t(a) >> (from + j) & 1 : negative) << j;
    return T(field);
  }
};
struct Insert {
  template <class T>
  T operator()(T a, T b, uint32_t from, uint32_t length) const {
    constexpr uint32_t kBits = 8 * sizeof(T);
    from &= 255;
    const uint32_t end = std::min(from + (length & 255), kBits);
    for (uint32_t j = from; j < end; ++j) b = T((b & ~(T(1) << j)) | ((a >> (j - from) & 1) << j));
    return b;
  }
};
struct Permute {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t selection) const {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (int j = 0; j < 4; ++j) {
      const uint32_t select = selection >> (4 * j) & 15;
      uint32_t byte = bytes >> (8 * (select & 7)) & 255;
      if (select & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << (8 * j);
    }
    return result;
  }
};
struct CountOnes {
  template <class T>
  uint32_t operator()(T a) const {
    return std::popcount(a);
  }
};
struct LeadingZeros {
  template <class T>
  uint32_t operator()(T a) const {
    return std::countl_zero(a);
  }
};
struct Reverse {
  template <class T>
  T operator()(T a) const {
    T result = 0;
    for (size_t j = 0; j < 8 * sizeof(T); ++j) result |= (a >> j & 1) << (8 * sizeof(T) - 1 - j);
    return result;
  }
};

template <class F>
void logic(Kernel& kernel, Instruction& i) {
  if (i.type == Type::pred) return bind_map<F, uint8_t, uint8_t, uint8_t>(kernel, i);
  with_integer(i.type, [&](auto t) { bind_map<F, decltype(t), decltype(t), decltype(t)>(kernel, i); });
}

template <class F>
void shift(Kernel& kernel, Instruction& i) {
  with_integer(i.type, [&](auto t) { bind_map<F, decltype(t), decltype(t), uint32_t>(kernel, i); });
}

template <class F, bool kSameWidth>
void unsigned1(Kernel& kernel, Instruction& i) {
  const auto bind = [&](auto t) {
    using T = decltype(t);
    bind_map<F, std::conditional_t<kSameWidth, T, uint32_t>, T>(kernel, i);
  };
  if (i.type == Type::b32) bind(uint32_t());
  if (i.type == Type::b64) bind(uint64_t());
}

template <class T>
void insert(Warp& w, const Instruction& i, uint32_t lanes) {
  const T *a = w.in<T>(i.operand[1]), *b = w.in<T>(i.operand[2]);
  const uint32_t *from = w.in<uint32_t>(i.operand[3]), *length = w.in<uint32_t>(i.operand[4]);
  T result[kLanes] = {};
  each_lane(lanes, [&](int l) { result[l] = Insert{}(a[l], b[l], from[l], length[l]); });
  keep(w, i.operand[0], result, lanes);
}

}  // namespace

bool bind_bits(Kernel& kernel, Instruction& i, Opcode& opcode) {
  const std::string& op = opcode.name;
  if (op == "and")
    logic<And>(kernel, i);
  else if (op == "or")
    logic<Or>(kernel, i);
  else if (op == "xor")
    logic<ExclusiveOr>(kernel, i);
  else if (op == "not" && i.type == Type::pred)
    bind_map<NotPredicate, uint8_t, uint8_t>(kernel, i);
  else if (op == "not") {
    with_integer(i.type, [&](auto t) { bind_map<Not, decltype(t), decltype(t)>(kernel, i); });
  } else if (op == "shl")
    shift<ShiftLeft>(kernel, i);
  else if (op == "shr")
    shift<ShiftRight>(kernel, i);
  else if (op == "bfe") {
    with_integer(i.type,
                 [&](auto t) { bind_map<Extract, decltype(t), decltype(t), uint32_t, uint32_t>(kernel, i); });
  } else if (op == "bfi") {
    const int bytes = bytes_of(i.type);
    shape(kernel, i, {bytes, bytes, bytes, 4, 4});
    if (i.type == Type::b32) i.run = insert<uint32_t>;
    if (i.type == Type::b64) i.run = insert<uint64_t>;
  } else if (op == "prmt")
    bind_map<Permute, uint32_t, uint32_t, uint32_t, uint32_t>(kernel, i);
  else if (op == "popc")
    unsigned1<CountOnes, false>(kernel, i);
  else if (op == "clz")
    unsigned1<LeadingZeros, false>(kernel, i);
  else if (op == "brev")
    unsigned1<Reverse, true>(kernel, i);
  else
    return false;
  return true;
}

}  // namespace ptx

// Comparisons and selections.
#include "opcode.h"

namespace ptx {

namespace {

// `unordered`: what a comparison with NaN gives.
template <class Order, bool unordered>
struct Compare {
  template <class T>
  uint8_t operator()(T a, T b) const {
    if constexpr (!std::is_integral_v<T>)
      if (a != a || b != b) return unordered;
    return Order{}(a, b);
  }
};
struct Equal {
  bool operator()(auto a, auto b) const { return a == b; }
};
struct NotEqual {
  bool operator()(auto a, auto b) const { return a != b; }
};
struct Less {
  bool operator()(auto a, auto b) const { return a < b; }
};
struct LessOrEqual {
  bool operator()(auto a, auto b) const { return a <= b; }
};
struct Greater {
  bool operator()(auto a, auto b) const { return a > b; }
};
struct GreaterOrEqual {
  bool operator()(auto a, auto b) const { return a >= b; }
};
struct Always {
  bool operator()(auto, auto) const { return true; }
};
struct Never {
  bool operator()(auto, auto) const { return false; }
};

template <class F>
void compare(Kernel& kernel, Instruction& i) {
  with_number(i.type, [&](auto t) { bind_map<F, uint8_t, decltype(t), decltype(t)>(kernel, i); });
}

using Bind = void (*)(Kernel&, Instruction&);
const std::pair<const char*, Bind> kComparisons[] = {
    {"eq", compare<Compare<Equal, false>>},   {"ne", compare<Compare<NotEqual, false>>},
    {"lt", compare<Compare<Less, false>>},    {"le", compare<Compare<LessOrEqual, false>>},
    {"gt", compare<Compare<Greater, false>>}, {"ge", compare<Compare<GreaterOrEqual, false>>},
    {"lo", compare<Compare<Less, false>>},    {"ls", compare<Compare<LessOrEqual, false>>},
    {"hi", compare<Compare<Greater, false>>}, {"hs", compare<Compare<GreaterOrEqual, false>>},
    {"equ", compare<Compare<Equal, true>>},   {"neu", compare<Compare<NotEqual, true>>},
    {"ltu", compare<Compare<Less, true>>},    {"leu", compare<Compare<LessOrEqual, true>>},
    {"gtu", compare<Compare<Greater, true>>}, {"geu", compare<Compare<GreaterOrEqual, true>>},
    {"num", compare<Compare<Always, false>>}, {"nan", compare<Compare<Never, true>>},
};

template <class T>
struct Select {
  T operator()(T a, T b, uint8_t predicate) const { return predicate ? a : b; }
};

}  // namespace

bool bind_compare(Kernel& kernel, Instruction& i, Opcode& opcode) {
  if (opcode.name == "setp") {
    for (const auto& [name, bind] : kComparisons)
      if (opcode.take(name)) return bind(kernel, i), true;
    throw Error("a comparison that is not known");
  }
  if (opcode.name == "selp") {
    i.selects = true;
    switch (bytes_of(i.type)) {
      case 2:
        bind_map<Select<uint16_t>, uint16_t, uint16_t, uint16_t, uint8_t>(kernel, i);
        break;
      case 4:
        bind_map<Select<uint32_t>, uint32_t, uint32_t, uint32_t, uint8_t>(kernel, i);
        break;
      case 8:
        bind_map<Select<uint64_t>, uint64_t, uint64_t, uint64_t, uint8_t>(kernel, i);
        break;
      default:
        break;
    }
    return true;
  }
  return false;
}

}  // namespace ptx

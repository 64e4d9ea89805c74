// Comparisons and selections.
#include "opcode.h"

namespace ptx {

namespace {

// `unordered`: what a comparison with NaN gives.
template <auto order, bool unordered>
void compare(Kernel& kernel, Instruction& i) {
  constexpr auto kCompare = [](auto a, auto b) { return a != a || b != b ? unordered : order(a, b); };
  with_integer(i.type, [&]<class T>(T) { bind_map<order, uint8_t, T, T>(kernel, i); });
  with_float(i.type, [&]<class T>(T) { bind_map<kCompare, uint8_t, T, T>(kernel, i); });
}

constexpr auto kEqual = [](auto a, auto b) { return a == b; };
constexpr auto kNotEqual = [](auto a, auto b) { return a != b; };
constexpr auto kLess = [](auto a, auto b) { return a < b; };
constexpr auto kLessOrEqual = [](auto a, auto b) { return a <= b; };
constexpr auto kGreater = [](auto a, auto b) { return a > b; };
constexpr auto kGreaterOrEqual = [](auto a, auto b) { return a >= b; };

using Bind = void (*)(Kernel&, Instruction&);
const std::pair<const char*, Bind> kComparisons[] = {
    {"eq", compare<kEqual, false>},
    {"ne", compare<kNotEqual, false>},
    {"lt", compare<kLess, false>},
    {"le", compare<kLessOrEqual, false>},
    {"gt", compare<kGreater, false>},
    {"ge", compare<kGreaterOrEqual, false>},
    {"lo", compare<kLess, false>},  // of unsigned integers
    {"ls", compare<kLessOrEqual, false>},
    {"hi", compare<kGreater, false>},
    {"hs", compare<kGreaterOrEqual, false>},
    {"equ", compare<kEqual, true>},
    {"neu", compare<kNotEqual, true>},
    {"ltu", compare<kLess, true>},
    {"leu", compare<kLessOrEqual, true>},
    {"gtu", compare<kGreater, true>},
    {"geu", compare<kGreaterOrEqual, true>},
    {"num", compare<[](auto, auto) { return true; }, false>},
    {"nan", compare<[](auto, auto) { return false; }, true>},
};

}  // namespace

bool bind_compare(Kernel& kernel, Instruction& i, Opcode& opcode) {
  if (opcode.name == "setp") {
    for (const auto& [name, bind] : kComparisons)
      if (opcode.take(name)) return bind(kernel, i), true;
    throw Error("a comparison that is not known");
  }
  if (opcode.name != "selp") return false;
  i.selects = true;
  with_word(bytes_of(i.type), [&]<class T>(T) {
    bind_map<[](T a, T b, uint8_t predicate) { return predicate ? a : b; }, T, T, T, uint8_t>(kernel, i);
  });
  return true;
}

}  // namespace ptx

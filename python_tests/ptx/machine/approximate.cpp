// Instructions that the ISA lets be off by some ulps.
#include "opcode.h"

namespace ptx {

namespace {

// Off by up to `ulps`: one way for one input, as a table in a GPU is.
template <int ulps>
float near(float exact, float a, float b = 0) {
  if (!options.approximation || !std::isfinite(exact) || exact == 0) return exact;
  uint64_t hash = uint64_t(std::bit_cast<uint32_t>(a)) << 32 | std::bit_cast<uint32_t>(b);
  hash += uint64_t(options.seed) * 0x9e3779b97f4a7c15;
  hash = (hash ^ hash >> 30) * 0xbf58476d1ce4e5b9;
  hash = (hash ^ hash >> 27) * 0x94d049bb133111eb;
  return moved_by_ulps(exact, int((hash >> 33) % (2 * ulps + 1)) - ulps);
}

template <auto function, class... A>
void flushing(Kernel& kernel, Instruction& i, Opcode& opcode) {
  if (i.type != Type::f32) return;
  if (opcode.take("ftz"))
    bind_map<[](A... a) { return flushed(function(flushed(a)...)); }, float, A...>(kernel, i);
  else
    bind_map<function, float, A...>(kernel, i);
}

}  // namespace

bool bind_approximate(Kernel& kernel, Instruction& i, Opcode& opcode) {
  const std::string& op = opcode.name;
  if (op == "div" && !opcode.take_one_of({"full", "approx"}).empty())
    flushing<[](float a, float b) { return near<2>(a / b, a, b); }, float, float>(kernel, i, opcode);
  else if (op == "ex2" && opcode.take("approx"))  // a relative error of 2^-22: two ulps at the least
    flushing<[](float a) { return near<2>(std::exp2(a), a); }, float>(kernel, i, opcode);
  else if (op == "rcp" && opcode.take("approx"))
    flushing<[](float a) { return near<1>(1 / a, a); }, float>(kernel, i, opcode);
  else if (op == "sqrt" && opcode.take("approx"))
    flushing<[](float a) { return near<1>(std::sqrt(a), a); }, float>(kernel, i, opcode);
  else
    return false;
  return true;
}

}  // namespace ptx

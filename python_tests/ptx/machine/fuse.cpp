// Fusion by the assembler: PTX lets it make one fma of a product and a sum without rounding modifiers. Which
// it fuses is not said, so each sum decides by the seed.
#include <map>

#include "opcode.h"
#include "text.h"

namespace ptx {

namespace {

// Operands: result, addend or minuend, the other one, and the product's factors. `variant`: which of the two
// summands is the product, and whether it is a difference.
enum { kSecond = 1, kDifference = 2 };

bool is_fused(const Warp& w, const Instruction& i) {
  const uint64_t site = uint64_t(&i - w.kernel->code.data()) + 1;
  const uint64_t hash = (site + uint64_t(options.seed) * 1000003) * 0x9e3779b97f4a7c15ull;
  return double(hash >> 11) * 0x1p-53 < options.fusion;
}

template <class T>
void sum_of_product(Warp& w, const Instruction& i, uint32_t lanes) {
  const bool second = i.variant & kSecond, difference = i.variant & kDifference, fused = is_fused(w, i);
  const T *a = w.in<T>(i.operand[1]), *b = w.in<T>(i.operand[2]);
  const T *x = w.in<T>(i.operand[3]), *y = w.in<T>(i.operand[4]), *other = second ? a : b;
  T result[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    if (!fused)
      result[l] = difference ? a[l] - b[l] : a[l] + b[l];
    else
      result[l] =
          std::fma(second && difference ? -x[l] : x[l], y[l], !second && difference ? -other[l] : other[l]);
    result[l] = canonical(result[l]);
  }
  keep(w, i.operand[0], result, lanes);
}

bool is(const Instruction& i, const std::string& name) {
  return !i.predicated &&
         (starts_with(i.text, (name + ".f32 ").c_str()) || starts_with(i.text, (name + ".f64 ").c_str()));
}

}  // namespace

// Within a basic block, where the product's register and its factors still have their values.
void fuse(Kernel& kernel) {
  std::vector<bool> leads(kernel.code.size() + 1, false);
  for (size_t j = 0; j < kernel.code.size(); ++j)
    if (kernel.code[j].role == Role::branch) leads[kernel.code[j].target] = leads[j + 1] = true;
  std::map<int, Instruction> products;  // by the register of the result
  for (size_t j = 0; j < kernel.code.size(); ++j) {
    Instruction& i = kernel.code[j];
    if (leads[j]) products.clear();
    const bool sum = is(i, "add"), difference = is(i, "sub");
    if (sum || difference)
      for (const int side : {2, 1}) {
        const auto found = products.find(i.operand[side].reg);
        if (found == products.end() || found->second.type != i.type) continue;
        i.operand.push_back(found->second.operand[1]);
        i.operand.push_back(found->second.operand[2]);
        i.variant = (side == 2 ? kSecond : 0) | (difference ? kDifference : 0);
        i.run = i.type == Type::f32 ? sum_of_product<float> : sum_of_product<double>;
        break;
      }
    for (int k = 0; k < i.outputs; ++k) {
      const int written = i.operand[k].reg;
      std::erase_if(products, [&](const auto& entry) {
        const auto& o = entry.second.operand;
        return o[0].reg == written || o[1].reg == written || o[2].reg == written;
      });
    }
    // A product that overwrites one of its factors has nothing to be fused from.
    if (is(i, "mul") && i.operand[0].reg != i.operand[1].reg && i.operand[0].reg != i.operand[2].reg)
      products[i.operand[0].reg] = i;
  }
}

}  // namespace ptx

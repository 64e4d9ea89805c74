// Tensor cores: fragments of matrices in the registers of a warp, as the PTX ISA lays them out. With g = lane
// / 4 and t = lane % 4, register r of a lane holds in an 8 x 8 matrix of 16-bit elements row g, columns 2t
// and 2t + 1.
#include <algorithm>

#include "opcode.h"

namespace ptx {

namespace {

constexpr int kRows = 8, kRowBytes = 16;

// Lanes 8x to 8x + 7 have the addresses of the rows of matrix x.
void load_matrices(Warp& w, const Instruction& i, uint32_t) {
  uint32_t result[4][kLanes];
  for (int x = 0; x < i.outputs; ++x) {
    unsigned char rows[kRows][kRowBytes];
    for (int r = 0; r < kRows; ++r) {
      const int l = x * kRows + r;
      memcpy(rows[r], access(w, l, w.address(i.operand[i.outputs], l), kRowBytes, i.space, false), kRowBytes);
    }
    for (int l = 0; l < kLanes; ++l) {
      const int g = l / 4, t = l % 4;
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e)
        memcpy(pair + e, i.trans ? &rows[2 * t + e][2 * g] : &rows[g][4 * t + 2 * e], 2);
      result[x][l] = pair[0] | uint32_t(pair[1]) << 16;
    }
  }
  for (int x = 0; x < i.outputs; ++x) keep(w, i.operand[x], result[x], ~0u);
}

void store_matrices(Warp& w, const Instruction& i, uint32_t) {
  for (size_t x = 0; x + 1 < i.operand.size(); ++x) {
    unsigned char rows[kRows][kRowBytes];
    for (int l = 0; l < kLanes; ++l) {
      const int g = l / 4, t = l % 4;
      const uint32_t value = w.in<uint32_t>(i.operand[1 + x])[l];
      for (int e = 0; e < 2; ++e) {
        const uint16_t element = value >> (16 * e);
        memcpy(i.trans ? &rows[2 * t + e][2 * g] : &rows[g][4 * t + 2 * e], &element, 2);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const int l = int(x) * kRows + r;
      bool wins = true;
      unsigned char* to = access(w, l, w.address(i.operand[0], l), kRowBytes, i.space, true, rows[r], &wins);
      if (wins) memcpy(to, rows[r], kRowBytes);
    }
  }
}

// Element e of a register of A or B. Tensor cores ignore the last 13 bits of a tf32 operand.
float element(Type type, uint32_t value, int e) {
  switch (type) {
    case Type::f16:
      return from_f16(value >> (16 * e));
    case Type::bf16:
      return from_bf16(value >> (16 * e));
    default:
      return std::bit_cast<float>(value & ~0x1fffu);
  }
}

// The sum of terms as a tensor core may make it: the ISA leaves its order open, and how it rounds, with
// fp32's precision at least. Additions one by one, of which each rounds or cuts; or, as GPUs do, all terms
// cut at the last place of the largest one. The same terms have the same sum, in whichever warp.
float rough_sum(double* terms, int count) {
  uint64_t hash = uint64_t(options.seed);
  for (int k = 0; k < count; ++k)
    hash = (hash ^ std::bit_cast<uint64_t>(terms[k]) ^ hash >> 29) * 0x9e3779b97f4a7c15;
  std::minstd_rand generator(hash >> 32);
  std::shuffle(terms, terms + count, generator);
  enum { kRound, kCut, kAlign, kWays };
  const int way = generator() % kWays;
  double sum = 0;
  if (way == kAlign) {
    double largest = 0;
    for (int k = 0; k < count; ++k) largest = std::max(largest, std::abs(terms[k]));
    if (largest > 0 && std::isfinite(largest)) {
      const double place = std::ldexp(1.0, std::ilogb(largest) - 24);
      for (int k = 0; k < count; ++k) sum += std::trunc(terms[k] / place) * place;
      return to_f32(sum, Rounding::zero);
    }
  }
  for (int k = 0; k < count; ++k)
    sum = to_f32(sum + terms[k], way == kRound ? Rounding::nearest : Rounding::zero);
  return float(sum);
}

// c + sum of a[k] b[k].
float dot(const float* a, const float* b, int stride, int depth, float c) {
  double terms[17] = {c}, sum = c;
  for (int k = 0; k < depth; ++k) sum += terms[k + 1] = double(a[k]) * b[k * stride];
  return options.sums ? rough_sum(terms, depth + 1) : float(sum);
}

// mma.m16n8k{8, 16}: D[16, 8] = A[16, k] B[k, 8] + C in fp32, `per` elements of A and B a register.
void multiply_matrices(Warp& w, const Instruction& i, uint32_t) {
  const int per = i.source_type == Type::tf32 ? 1 : 2, depth = i.variant, a_registers = depth / (2 * per);
  const Operand *a = &i.operand[4], *b = a + a_registers, *c = b + a_registers / 2;
  float A[16][16], B[16][8], C[16][8];
  for (int l = 0; l < kLanes; ++l) {
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < a_registers; ++r)
      for (int e = 0; e < per; ++e)
        A[g + 8 * (r & 1)][t * per + e + 4 * per * (r >> 1)] =
            element(i.source_type, w.in<uint32_t>(a[r])[l], e);
    for (int r = 0; r < a_registers / 2; ++r)
      for (int e = 0; e < per; ++e)
        B[t * per + e + 4 * per * r][g] = element(i.source_type, w.in<uint32_t>(b[r])[l], e);
    for (int r = 0; r < 4; ++r) C[g + 8 * (r >> 1)][2 * t + (r & 1)] = w.in<float>(c[r])[l];
  }
  for (int r = 0; r < 4; ++r) {
    float result[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4 + 8 * (r >> 1), column = 2 * (l % 4) + (r & 1);
      result[l] = canonical(dot(A[row], &B[0][column], 8, depth, C[row][column]));
    }
    keep(w, i.operand[r], result, ~0u);
  }
}

// mma.m{8, 16}n8k{4, 8, 16} in fp64, an element a register; m8 has the upper half of the rows alone.
void multiply_doubles(Warp& w, const Instruction& i, uint32_t) {
  const int halves = i.outputs / 2, depth = i.variant, steps = depth / 4;
  const Operand *a = &i.operand[i.outputs], *b = a + halves * steps, *c = b + steps;
  double A[16][16], B[16][8], C[16][8];
  for (int l = 0; l < kLanes; ++l) {
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < halves * steps; ++r)
      A[g + 8 * (r % halves)][t + 4 * (r / halves)] = w.in<double>(a[r])[l];
    for (int r = 0; r < steps; ++r) B[t + 4 * r][g] = w.in<double>(b[r])[l];
    for (int r = 0; r < i.outputs; ++r) C[g + 8 * (r >> 1)][2 * t + (r & 1)] = w.in<double>(c[r])[l];
  }
  for (int r = 0; r < i.outputs; ++r) {
    double result[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int row = l / 4 + 8 * (r >> 1), column = 2 * (l % 4) + (r & 1);
      double sum = C[row][column];
      // The ISA leaves the order open.
      for (int k = 0; k < depth; ++k) {
        const int at = options.sums ? depth - 1 - k : k;
        sum = std::fma(A[row][at], B[at][column], sum);
      }
      result[l] = canonical(sum);
    }
    keep(w, i.operand[r], result, ~0u);
  }
}

void bind_doubles(Kernel& kernel, Instruction& i, Opcode& opcode) {
  const bool half = opcode.take("m8n8k4");
  i.variant = half || opcode.take("m16n8k4") ? 4
              : opcode.take("m16n8k8")       ? 8
              : opcode.take("m16n8k16")      ? 16
                                             : 0;
  if (!i.variant || i.type != Type::f64 || opcode.type(2) != Type::f64 || opcode.type(3) != Type::f64)
    throw Error("a product of matrices that is not known");
  i.outputs = half ? 2 : 4;
  const int steps = i.variant / 4;
  shape(kernel, i, std::vector<int>(2 * i.outputs + (i.outputs / 2 + 1) * steps, 8));
  i.run = multiply_doubles;
}

void bind_multiply(Kernel& kernel, Instruction& i, Opcode& opcode) {
  opcode.take("row");
  opcode.take("col");
  if (i.source_type == Type::f64) return bind_doubles(kernel, i, opcode);
  const bool tf32 = i.source_type == Type::tf32,
             half = i.source_type == Type::f16 || i.source_type == Type::bf16;
  i.variant = opcode.take("m16n8k8") ? 8 : opcode.take("m16n8k16") ? 16 : opcode.take("m16n8k4") ? 4 : 0;
  if (i.type != Type::f32 || opcode.type(2) != i.source_type || opcode.type(3) != Type::f32 ||
      !(tf32 ? i.variant && i.variant <= 8 : half && i.variant >= 8))
    throw Error("a product of matrices that is not known");
  const int a_registers = i.variant / (tf32 ? 2 : 4);
  shape(kernel, i, std::vector<int>(4 + a_registers + a_registers / 2 + 4, 4));
  i.outputs = 4;
  i.run = multiply_matrices;
}

}  // namespace

bool bind_matrix(Kernel& kernel, Instruction& i, Opcode& opcode) {
  const std::string& op = opcode.name;
  if (op != "mma" && op != "ldmatrix" && op != "stmatrix") return false;
  if (!opcode.take("sync") || !opcode.take("aligned")) throw Error("a form of it that is not known");
  i.role = Role::together;
  if (op == "mma") return bind_multiply(kernel, i, opcode), true;
  const std::string count = opcode.take_one_of({"x1", "x2", "x4"});
  i.trans = opcode.take("trans");
  if (count.empty() || !opcode.take("m8n8") || !opcode.take("shared") || i.type != Type::b16)
    throw Error("matrices that are not known");
  i.space = Space::shared;
  const int matrices = count[1] - '0';
  std::vector<int> widths(matrices + 1, 4);
  const bool loads = op == "ldmatrix";
  widths[loads ? matrices : 0] = 0;
  i.outputs = loads ? matrices : 0;
  shape(kernel, i, widths);
  i.run = loads ? load_matrices : store_matrices;
  return true;
}

}  // namespace ptx

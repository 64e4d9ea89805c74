// Drives the CPU kernels over odd, empty, strided and unaligned shapes against plain loops in double. Every
// array is an allocation of its exact size, so that AddressSanitizer sees a single element read or written
// too far.
#include "cpu/isa.h"
#include "engram/low_rank.h"
#include "formats.h"

using engram::WeightShape;

namespace {

const Format& compute(const Format& format) { return format.dtype == DType::f64 ? kFormats[3] : kFormats[0]; }

// Elements of a weight of that shape, no more: the last row has no padding.
int64_t extent(const WeightShape& s) {
  if (s.batch == 0 || s.rows == 0 || s.cols == 0) return 0;
  return (s.batch - 1) * s.batch_stride + (s.rows - 1) * s.row_stride + s.cols;
}

void check_update(const Format& format, WeightShape shape, int64_t rank, double scale, size_t offset,
                  int threads) {
  const Format& wide = compute(format);
  Array weight(extent(shape), format.bytes, offset * format.bytes);
  Array left(shape.batch * shape.rows * rank, wide.bytes, offset * wide.bytes);
  Array right(shape.batch * rank * shape.cols, wide.bytes, offset * wide.bytes);
  fill(weight, format), fill(left, wide), fill(right, wide);
  Array before(extent(shape), format.bytes);
  std::memcpy(before.data(), weight.data(), weight.count() * format.bytes);
  engram::cpu::apply_low_rank(weight.data(), format.dtype, shape, left.data(), right.data(), rank, scale,
                              true, threads);
  for (int64_t at = 0; at < weight.count(); ++at) {
    const int64_t b = shape.batch > 1 ? at / shape.batch_stride : 0;
    const int64_t row = (at - b * shape.batch_stride) / shape.row_stride;
    const int64_t col = (at - b * shape.batch_stride) % shape.row_stride;
    double exact = get(before.data(), at, format), magnitude = std::fabs(exact);
    const bool inside = row < shape.rows && col < shape.cols;
    for (int64_t k = 0; inside && k < rank; ++k) {
      const double term = scale * get(left.data(), (b * shape.rows + row) * rank + k, wide) *
                          get(right.data(), (b * rank + k) * shape.cols + col, wide);
      exact += term;
      magnitude += std::fabs(term);
    }
    const double got = get(weight.data(), at, format);
    // One rounding into the weight, and rank + 2 of the compute type on the way.
    const double bound = 0.501 * spacing(exact, format) + (rank + 2) * std::ldexp(magnitude, -wide.mantissa);
    const bool untouched = !inside || rank == 0;
    expect(untouched ? got == exact : std::fabs(got - exact) <= bound, "apply_low_rank", got, exact);
  }
}

void check_products(const Format& format, WeightShape shape, int64_t count, size_t offset, int threads) {
  const Format &wide = compute(format), &f64 = kFormats[3];
  Array weight(extent(shape), format.bytes, offset * format.bytes);
  Array keys(shape.batch * count * shape.cols, wide.bytes, offset * wide.bytes);
  Array values(shape.batch * count * shape.rows, wide.bytes, offset * wide.bytes);
  Array preconditioned(shape.batch * count * shape.cols, 8, offset * 8);
  Array residual(shape.batch * count * shape.rows, wide.bytes), gram(shape.batch * count * count, 8);
  fill(weight, format), fill(keys, wide), fill(values, wide), fill(preconditioned, f64);
  engram::cpu::residual_gram(weight.data(), format.dtype, shape, keys.data(), values.data(),
                             reinterpret_cast<const double*>(preconditioned.data()), count, residual.data(),
                             reinterpret_cast<double*>(gram.data()), threads);
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t key = (b * count + j) * shape.cols;
      for (int64_t row = 0; row < shape.rows; ++row) {
        const int64_t at = (b * count + j) * shape.rows + row;
        double exact = get(values.data(), at, wide), magnitude = std::fabs(exact);
        for (int64_t c = 0; c < shape.cols; ++c) {
          const double term =
              get(weight.data(), b * shape.batch_stride + row * shape.row_stride + c, format) *
              get(keys.data(), key + c, wide);
          exact -= term;
          magnitude += std::fabs(term);
        }
        const double got = get(residual.data(), at, wide);
        expect(std::fabs(got - exact) <= (shape.cols + 2) * std::ldexp(magnitude, -wide.mantissa), "residual",
               got, exact);
      }
      for (int64_t i = 0; i < count; ++i) {
        double exact = 0, magnitude = 0;
        for (int64_t c = 0; c < shape.cols; ++c) {
          const double term = get(keys.data(), key + c, wide) *
                              get(preconditioned.data(), (b * count + i) * shape.cols + c, f64);
          exact += term;
          magnitude += std::fabs(term);
        }
        const double got = get(gram.data(), (b * count + j) * count + i, f64);
        expect(std::fabs(got - exact) <= (shape.cols + 2) * std::ldexp(magnitude, -52), "gram", got, exact);
      }
    }
  }
}

// Every 16-bit number is read exactly, and floats round into it as IEEE 754 says.
void check_conversion(const Format& format) {
  const int64_t count = 1 << 16;
  const WeightShape row{1, 1, count, count, count};
  Array weight(count, 2), right(count, 4);
  const float zero = 0, one = 1;
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t raw = static_cast<uint16_t>(i);
    std::memcpy(weight.data() + i * 2, &raw, 2);
  }
  engram::cpu::apply_low_rank(weight.data(), format.dtype, row, &zero, right.data(), 1, 1.0, false, 1);
  for (int64_t i = 0; i < count; ++i) {
    const double got = get(weight.data(), i, format), expected = decode16(static_cast<uint16_t>(i), format);
    expect(std::isnan(expected) ? std::isnan(got) : got == expected, "read", got, expected);
  }
  for (int pass = 0; pass < 8; ++pass) {
    std::memset(weight.data(), 0, count * 2);
    for (int64_t i = 0; i < count; ++i) {
      // A number of the format, with the bits below it at, beside or away from the tie.
      const float near = static_cast<float>(decode16(static_cast<uint16_t>(i), format));
      uint32_t raw;
      std::memcpy(&raw, &near, 4);
      const uint32_t tie = 1u << (22 - format.mantissa);
      raw += pass == 0   ? 0
             : pass == 1 ? tie - 1
             : pass == 2 ? tie
             : pass == 3 ? tie + 1
                         : static_cast<uint32_t>(generator()) & (2 * tie - 1);
      std::memcpy(right.data() + i * 4, &raw, 4);
    }
    engram::cpu::apply_low_rank(weight.data(), format.dtype, row, &one, right.data(), 1, 1.0, false, 1);
    for (int64_t i = 0; i < count; ++i) {
      const double value = get(right.data(), i, kFormats[0]), expected = rounded(value, format);
      const double got = get(weight.data(), i, format);
      expect(std::isnan(expected) ? std::isnan(got) : got == expected, "rounding", got, expected);
    }
  }
}

}  // namespace

// The argument is the instruction set to test; 77 says that this machine does not have it.
int main(int, char** arguments) {
  if (std::strcmp(engram::cpu::isa_name(engram::cpu::isa()), arguments[1]) != 0) return 77;
  for (const Format& format : kFormats) {
    if (format.bytes == 2) check_conversion(format);
    for (const int64_t rows : {0, 1, 6, 17, 50}) {
      for (const int64_t cols : {0, 1, 7, 33, 517}) {
        for (const int64_t count : {0, 1, 7, 18}) {
          const int64_t padding = (rows + count) % 3;
          const WeightShape plain{1, rows, cols, rows * cols, cols};
          const WeightShape strided{2, rows, cols, rows * (cols + padding) + 5, cols + padding};
          check_update(format, plain, count, 1.0, 0, 1);
          check_update(format, strided, count, -0.5, 1, 3);
          check_products(format, plain, count, 0, 1);
          check_products(format, strided, count, 1, 3);
        }
      }
    }
    const WeightShape large{1, 61, 1030, 61 * 1031, 1031};
    check_update(format, large, 600, 1.0, 1, 4);
    check_products(format, large, 65, 1, 4);
    check_update(format, WeightShape{0, 3, 4, 12, 4}, 2, 1.0, 0, 2);
    check_products(format, WeightShape{0, 3, 4, 12, 4}, 2, 0, 2);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}

// Drives the CPU kernels over odd, empty, strided and unaligned shapes against plain loops in double. Every
// array is an allocation of its exact size, so that AddressSanitizer sees a single element read or written
// too far.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "cpu/isa.h"
#include "engram/rank_one.h"

using engram::DType;
using engram::WeightShape;

namespace {

std::mt19937_64 generator(0);
int failures = 0;

void expect(bool good, const char* what, double got, double expected) {
  if (good) return;
  if (++failures <= 20) std::printf("%s: got %.9g, expected %.9g\n", what, got, expected);
}

double random_value() { return std::uniform_real_distribution<double>(-1, 1)(generator); }

// ---- Elements, by the definition of their formats.

struct Format {
  DType dtype;
  size_t bytes;
  int mantissa;  // stored bits
  int smallest;  // exponent of the smallest normal number
};

constexpr Format kFormats[] = {{DType::f32, 4, 23, -126},
                               {DType::bf16, 2, 7, -126},
                               {DType::f16, 2, 10, -14},
                               {DType::f64, 8, 52, -1022}};

double decode16(uint16_t raw, const Format& format) {
  const int exponent_bits = 15 - format.mantissa;
  const int exponent = (raw >> format.mantissa) & ((1 << exponent_bits) - 1);
  const int fraction = raw & ((1 << format.mantissa) - 1);
  const double sign = raw >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, format.smallest - format.mantissa);
  return sign *
         std::ldexp((1 << format.mantissa) + fraction, exponent - 1 + format.smallest - format.mantissa);
}

double get(const char* data, int64_t i, const Format& format) {
  if (format.dtype == DType::f64) {
    double value;
    std::memcpy(&value, data + i * 8, 8);
    return value;
  }
  if (format.dtype == DType::f32) {
    float value;
    std::memcpy(&value, data + i * 4, 4);
    return value;
  }
  uint16_t raw;
  std::memcpy(&raw, data + i * 2, 2);
  return decode16(raw, format);
}

// The distance from a finite value to the next number of the format.
double spacing(double value, const Format& format) {
  const int exponent = value == 0 ? format.smallest : std::max(std::ilogb(value), format.smallest);
  return std::ldexp(1.0, exponent - format.mantissa);
}

// The nearest number of the format, ties to even.
double rounded(double value, const Format& format) {
  if (!std::isfinite(value) || value == 0) return value;
  const double nearest = std::nearbyint(value / spacing(value, format)) * spacing(value, format);
  const double limit = format.dtype == DType::f16 ? 65536.0 : std::ldexp(1.0, 128);
  return format.dtype != DType::f64 && std::fabs(nearest) >= limit ? std::copysign(INFINITY, value) : nearest;
}

// ---- Arrays

// `count` elements of exactly that size; with `offset`, they start that many bytes into their allocation.
class Array {
 public:
  Array(int64_t count, size_t bytes, size_t offset = 0)
      : count_(count), store_(new char[count * bytes + offset]), data_(store_.get() + offset) {
    std::memset(data_, 0, count * bytes);
  }
  char* data() { return data_; }
  int64_t count() const { return count_; }

 private:
  int64_t count_;
  std::unique_ptr<char[]> store_;
  char* data_;
};

void fill(Array& array, const Format& format) {
  for (int64_t i = 0; i < array.count(); ++i) {
    const double value = random_value();
    const float single = static_cast<float>(value);
    const uint16_t raw = static_cast<uint16_t>(generator() & 0xbfff);  // any finite number under 2
    const void* from = format.bytes == 8   ? static_cast<const void*>(&value)
                       : format.bytes == 4 ? static_cast<const void*>(&single)
                                           : static_cast<const void*>(&raw);
    std::memcpy(array.data() + i * format.bytes, from, format.bytes);
  }
}

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
                              threads);
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
  engram::cpu::apply_low_rank(weight.data(), format.dtype, row, &zero, right.data(), 1, 1.0, 1);
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
    engram::cpu::apply_low_rank(weight.data(), format.dtype, row, &one, right.data(), 1, 1.0, 1);
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

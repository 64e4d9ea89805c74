// What the drivers of the CPU kernels share: element formats by their definition, arrays of an exact size.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "engram/dtype.h"

using engram::DType;

inline std::mt19937_64 generator(0);
inline int failures = 0;

inline void expect(bool good, const char* what, double got, double expected) {
  if (good) return;
  if (++failures <= 20) std::printf("%s: got %.9g, expected %.9g\n", what, got, expected);
}

inline double random_value() { return std::uniform_real_distribution<double>(-1, 1)(generator); }

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

inline double decode16(uint16_t raw, const Format& format) {
  const int exponent_bits = 15 - format.mantissa;
  const int exponent = (raw >> format.mantissa) & ((1 << exponent_bits) - 1);
  const int fraction = raw & ((1 << format.mantissa) - 1);
  const double sign = raw >> 15 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, format.smallest - format.mantissa);
  return sign *
         std::ldexp((1 << format.mantissa) + fraction, exponent - 1 + format.smallest - format.mantissa);
}

inline double get(const char* data, int64_t i, const Format& format) {
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
inline double spacing(double value, const Format& format) {
  const int exponent = value == 0 ? format.smallest : std::max(std::ilogb(value), format.smallest);
  return std::ldexp(1.0, exponent - format.mantissa);
}

// The nearest number of the format, ties to even.
inline double rounded(double value, const Format& format) {
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

inline void fill(Array& array, const Format& format) {
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

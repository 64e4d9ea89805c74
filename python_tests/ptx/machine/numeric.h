// Numbers that C++ lacks: bf16 and tf32, roundings, flushing of subnormals, canonical NaN.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace ptx {

enum class Rounding { nearest, zero, down, up, away };  // away: to nearest, ties away from zero

inline float flushed(float x) {
  return std::abs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
}

// Arithmetic on a GPU gives one NaN only.
inline float canonical(float x) { return x == x ? x : std::bit_cast<float>(0x7fffffffu); }
inline double canonical(double x) { return x; }
template <class T>
  requires std::is_integral_v<T>
T canonical(T x) {
  return x;
}

inline float from_bf16(uint16_t x) { return std::bit_cast<float>(uint32_t(x) << 16); }

// A float made shorter by its last `bits` bits. The carry out of a mantissa belongs into the exponent.
inline uint32_t rounded_bits(float x, int bits, Rounding rounding) {
  const uint32_t v = std::bit_cast<uint32_t>(x), unit = 1u << bits, rest = v & (unit - 1), cut = v - rest;
  if ((v >> 23 & 255) == 255) return cut;
  bool up = false;
  switch (rounding) {
    case Rounding::nearest:
      up = rest > unit / 2 || (rest == unit / 2 && (cut & unit));
      break;
    case Rounding::away:
      up = rest >= unit / 2;
      break;
    case Rounding::zero:
      break;
    case Rounding::down:
      up = rest && v >> 31;
      break;
    case Rounding::up:
      up = rest && !(v >> 31);
      break;
  }
  return cut + (up ? unit : 0);
}

inline uint16_t to_bf16(float x, Rounding rounding) {
  return x == x ? uint16_t(rounded_bits(x, 16, rounding) >> 16) : uint16_t(0x7fff);
}

inline float to_tf32(float x, Rounding rounding) {
  return x == x ? std::bit_cast<float>(rounded_bits(x, 13, rounding)) : canonical(x);
}

inline uint16_t to_f16(float x, Rounding rounding) {
  if (x != x) return 0x7fff;
  const _Float16 near = _Float16(x);
  uint16_t bits = std::bit_cast<uint16_t>(near);
  const float back = float(near);
  // The bits of one sign are in the order of their magnitudes, so that a neighbour is one away.
  if (rounding == Rounding::zero && std::abs(back) > std::abs(x)) --bits;
  return bits;
}

inline float from_f16(uint16_t x) { return float(std::bit_cast<_Float16>(x)); }

// The double rounded to float; zero: towards it.
inline float to_f32(double x, Rounding rounding) {
  const float near = float(x);
  if (!std::isfinite(x)) return canonical(near);
  switch (rounding) {
    case Rounding::zero:
      return std::abs(near) > std::abs(x) ? std::nextafter(near, 0.0f) : near;
    case Rounding::down:
      return near > x ? std::nextafter(near, -INFINITY) : near;
    case Rounding::up:
      return near < x ? std::nextafter(near, INFINITY) : near;
    default:
      return near;
  }
}

inline float moved_by_ulps(float x, int ulps) {
  for (; ulps > 0; --ulps) x = std::nextafter(x, INFINITY);
  for (; ulps < 0; ++ulps) x = std::nextafter(x, -INFINITY);
  return x;
}

}  // namespace ptx

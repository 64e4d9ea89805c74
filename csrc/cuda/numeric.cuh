// The 16-bit types, their conversions, and accesses of 16 bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.cuh"
#include "engram/low_rank.h"

namespace engram::cuda {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

ENGRAM_DEVICE float widen(float value) { return value; }
ENGRAM_DEVICE double widen(double value) { return value; }
ENGRAM_DEVICE void narrow(float value, float& result) { result = value; }
ENGRAM_DEVICE void narrow(double value, double& result) { result = value; }

ENGRAM_DEVICE float widen(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

ENGRAM_DEVICE float widen(Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

ENGRAM_DEVICE void narrow(float value, BFloat16& result) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}

ENGRAM_DEVICE void narrow(float value, Half& result) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}

// The type that products with a weight of type T are accumulated in.
template <typename T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename T>
using Compute = typename ComputeType<T>::type;

// N neighbours in memory, moved by accesses of up to 16 bytes.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T at[N];
};

// How many elements of T one 16-byte access moves.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Weights pass through once: they are read and written so that the caches keep other data before them.
template <typename T>
ENGRAM_DEVICE T load_streaming(const T* from) {
  if constexpr (sizeof(T) >= 8) {
    using Bits = std::conditional_t<sizeof(T) == 16, uint4, uint2>;
    const Bits bits = __ldcs(reinterpret_cast<const Bits*>(from));
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  return *from;
}

template <typename T>
ENGRAM_DEVICE void store_streaming(T* to, const T& value) {
  if constexpr (sizeof(T) >= 8) {
    using Bits = std::conditional_t<sizeof(T) == 16, uint4, uint2>;
    Bits bits;
    memcpy(&bits, &value, sizeof bits);
    __stcs(reinterpret_cast<Bits*>(to), bits);
    return;
  }
  *to = value;
}

inline int64_t ceil_divide(int64_t amount, int64_t size) { return (amount + size - 1) / size; }

inline bool aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Whether every row of every matrix begins at a multiple of 16 bytes.
template <typename T>
bool rows_aligned(const T* weight, const WeightShape& shape) {
  return aligned(weight, 16) && (shape.rows < 2 || shape.row_stride % kVector<T> == 0) &&
         (shape.batch < 2 || shape.batch_stride % kVector<T> == 0);
}

}  // namespace engram::cuda

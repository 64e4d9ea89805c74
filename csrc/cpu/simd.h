// Vectors of the level this file is compiled for, and the storage types that widen into them.
// Everything is in the level's namespace: a function shared between levels would be linked once, for any of
// them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace engram::cpu::ENGRAM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

template <class T, int kLanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class T, int kLanes>
using Vector = typename VectorOf<T, kLanes>::type;

constexpr int kFloats = kVectorBytes / sizeof(float);
constexpr int kDoubles = kVectorBytes / sizeof(double);
using Floats = Vector<float, kFloats>;
using Doubles = Vector<double, kDoubles>;
using Words = Vector<uint32_t, kFloats>;
using Halves = Vector<uint16_t, kFloats>;

// A processor's own look ahead ends with each page of 4 KB. So memory that is run through is asked for this
// many bytes before its turn, a line at a time; where nothing lies there, nothing happens.
constexpr int64_t kAheadBytes = 2048;

template <int kWrite = 0>
inline void ask_ahead(const void* at, int64_t bytes = kAheadBytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) + bytes), kWrite);
}

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// GCC makes five instructions of the conversions that are one or two.
#if defined(__AVX512F__)
inline Words widen(Halves h) { return bits<Words>(_mm512_cvtepu16_epi32(bits<__m256i>(h))); }
inline Halves narrow(Words w) { return bits<Halves>(_mm512_cvtepi32_epi16(bits<__m512i>(w))); }
#elif defined(__AVX2__)
inline Words widen(Halves h) { return bits<Words>(_mm256_cvtepu16_epi32(bits<__m128i>(h))); }
inline Halves narrow(Words w) {
  const __m256i v = bits<__m256i>(w);
  return bits<Halves>(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
#else
inline Words widen(Halves h) { return __builtin_convertvector(h, Words); }
inline Halves narrow(Words w) { return __builtin_convertvector(w, Halves); }
#endif

// In the upper half of each word: rounded to nearest, ties to even; a NaN becomes torch's own, 0x7fc0.
inline Words round_to_bf16(Floats f) {
  const Words w = bits<Words>(f);
  const Words rounded = w + ((w >> 16) & 1u) + 0x7fffu;
  return f == f ? rounded : Words{} + 0x7fc00000u;
}

#if defined(__AVX512F__)
inline Floats f16_to_float(Halves h) { return bits<Floats>(_mm512_cvtph_ps(bits<__m256i>(h))); }
inline Halves float_to_f16(Floats f) {
  return bits<Halves>(_mm512_cvtps_ph(bits<__m512>(f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
inline Floats f16_to_float(Halves h) { return bits<Floats>(_mm256_cvtph_ps(bits<__m128i>(h))); }
inline Halves float_to_f16(Floats f) {
  return bits<Halves>(_mm256_cvtps_ph(bits<__m256>(f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline Floats f16_to_float(Halves h) {
  const Words w = widen(h);
  const Words magnitude = w & 0x7fffu;
  const Words normal = (magnitude << 13) + (112u << 23);
  const Words special = normal + (112u << 23);  // infinity and NaN
  const Words subnormal = bits<Words>(__builtin_convertvector(magnitude, Floats) * 0x1p-24f);
  const Words value = magnitude >= 0x7c00u ? special : magnitude < 0x400u ? subnormal : normal;
  return bits<Floats>(value | ((w & 0x8000u) << 16));
}
inline Halves float_to_f16(Floats f) {
  const Words w = bits<Words>(f);
  const Words magnitude = w & 0x7fffffffu;
  const Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // The spacing of floats at 0.5 is that of subnormal halves: the addition rounds to it.
  const Words subnormal = bits<Words>(bits<Floats>(magnitude) + 0.5f) - 0x3f000000u;
  const Words nan = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
  const Words infinity = (magnitude & 0u) | 0x7c00u;
  const Words finite = magnitude < (113u << 23) ? subnormal : normal;
  const Words value = magnitude > 0x7f800000u ? nan : magnitude >= (143u << 23) ? infinity : finite;
  return narrow(value | ((w >> 16) & 0x8000u));
}
#endif

// A storage type: elements in memory, widened to the type that is computed in. `load` takes kLanes
// neighbours; `load_pair` and `store_pair` take 2 kLanes, which where kInterleaved come as the even ones and
// the odd ones.
template <class T>
struct Plain {
  using Element = T;
  using Compute = T;
  using V = Vector<T, kVectorBytes / sizeof(T)>;
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  static constexpr bool kInterleaved = false;
  static V load(const T* from) { return ENGRAM_ISA::load<V>(from); }
  static void store(T* to, V v) { std::memcpy(to, &v, sizeof(V)); }
  static void load_pair(const T* from, V& first, V& second) {
    first = load(from);
    second = load(from + kLanes);
  }
  static void store_pair(T* to, V first, V second) {
    std::memcpy(to, &first, sizeof(V));
    std::memcpy(to + kLanes, &second, sizeof(V));
  }
};

using F32 = Plain<float>;
using F64 = Plain<double>;

// Two neighbours share a word: one shift and one mask widen them, and no lane is moved either way.
struct BF16 {
  using Element = uint16_t;
  using Compute = float;
  static constexpr int kLanes = kFloats;
  static constexpr bool kInterleaved = true;
  static Floats load(const Element* from) {
    return bits<Floats>(widen(ENGRAM_ISA::load<Halves>(from)) << 16);
  }
  static void store(Element* to, Floats f) {
    const Halves halves = narrow(round_to_bf16(f) >> 16);
    std::memcpy(to, &halves, sizeof(halves));
  }
  static void load_pair(const Element* from, Floats& even, Floats& odd) {
    const Words pairs = ENGRAM_ISA::load<Words>(from);
    even = bits<Floats>(pairs << 16);
    odd = bits<Floats>(pairs & 0xffff0000u);
  }
  static void store_pair(Element* to, Floats even, Floats odd) {
    const Words pairs = (round_to_bf16(even) >> 16) | (round_to_bf16(odd) & 0xffff0000u);
    std::memcpy(to, &pairs, sizeof(pairs));
  }
};

struct F16 {
  using Element = uint16_t;
  using Compute = float;
  static constexpr int kLanes = kFloats;
  static constexpr bool kInterleaved = false;
  static Floats load(const Element* from) { return f16_to_float(ENGRAM_ISA::load<Halves>(from)); }
  static void store(Element* to, Floats f) {
    const Halves halves = float_to_f16(f);
    std::memcpy(to, &halves, sizeof(halves));
  }
  static void load_pair(const Element* from, Floats& first, Floats& second) {
    first = load(from);
    second = load(from + kLanes);
  }
  static void store_pair(Element* to, Floats first, Floats second) {
    const Halves halves[2] = {float_to_f16(first), float_to_f16(second)};
    std::memcpy(to, halves, sizeof(halves));
  }
};

// Floats in memory, computed in double.
struct F32AsF64 {
  using Element = float;
  using Compute = double;
  static constexpr int kLanes = kDoubles;
  static Doubles load(const Element* from) {
    return __builtin_convertvector((ENGRAM_ISA::load<Vector<float, kDoubles>>(from)), Doubles);
  }
};

// The first `count` lanes, the others zero: nothing beyond them is touched.
template <class Type>
inline auto load_some(const typename Type::Element* from, int64_t count) {
  typename Type::Element some[Type::kLanes] = {};
  std::memcpy(some, from, count * sizeof(*from));
  return Type::load(some);
}

template <class Type, class V>
inline void store_some(typename Type::Element* to, V v, int64_t count) {
  typename Type::Element some[Type::kLanes];
  Type::store(some, v);
  std::memcpy(to, some, count * sizeof(*to));
}

}  // namespace engram::cpu::ENGRAM_ISA

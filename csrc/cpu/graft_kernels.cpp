// The masked blend, its gradient, and the mask's step, compiled once for each instruction set (isa.h).
#include "chunks.h"
#include "engram/graft.h"
#include "simd.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

constexpr int kLanes = kFloats;

// sigmoid(-|x|), at most a half.
inline Floats lesser_gate(Floats x) {
  const Floats y = bits<Floats>(bits<Words>(x) | 0x80000000u);  // -|x|
  // exp(y) = 2^n exp(r): adding 1.5 * 2^23 rounds to an integer; r from two pieces of ln 2; Taylor's series,
  // its last coefficients bent to the interval, errs by 2^-24.
  const Floats shifter = Floats{} + 12582912.0f;
  const Floats bounded = y < -87.0f ? Floats{} - 87.0f : y;  // NaN stays
  const Floats n = (bounded * 1.44269504f + shifter) - shifter;
  const Floats r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const Words exponent = bits<Words>(n + (shifter + 127.0f)) << 23;
  const Floats power = y < -87.0f ? Floats{} : p * bits<Floats>(exponent);
  return power / (power + 1.0f);
}

// All ones in the lanes whose bit of the base mask, from entry i on, is 1. i is a multiple of kLanes.
inline Words base_lanes(const uint8_t* base, int64_t i) {
  Words lanes;
  uint32_t word = base[i / 8] >> (i % 8);
  if (kLanes == 16) word |= static_cast<uint32_t>(base[i / 8 + 1]) << 8;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = 1u << lane;
  return bits<Words>(((Words{} + word) & lanes) != 0u);
}

// One vector of a tensor's entries; loads and stores of the last one stop at the tensor's end.
template <class Type, bool kWhole>
struct Entries {
  const GraftTensor& tensor;
  int64_t at;
  int64_t valid;

  template <class T>
  static typename T::Element* address(const void* array, int64_t i) {
    return const_cast<typename T::Element*>(static_cast<const typename T::Element*>(array)) + i;
  }
  template <class T>
  Floats load(const void* from) const {
    return kWhole ? T::load(address<T>(from, at)) : load_some<T>(address<T>(from, at), valid);
  }
  template <class T>
  void store(void* to, Floats f) const {
    kWhole ? T::store(address<T>(to, at), f) : store_some<T>(address<T>(to, at), f, valid);
  }
  // The sign bit of s.
  Words sign() const {
    if (!tensor.base) return Words{};
    if constexpr (!kWhole && kLanes == 16) {  // the mask's last byte may be the only one
      uint8_t some[2] = {tensor.base[at / 8], valid > 8 ? tensor.base[at / 8 + 1] : uint8_t(0)};
      return base_lanes(some, 0) & 0x80000000u;
    }
    return base_lanes(tensor.base, at) & 0x80000000u;
  }

  Floats blend(Floats x) const {
    const Floats pre = load<Type>(tensor.pre), ft = load<Type>(tensor.ft);
    const Floats near = x < 0.0f ? pre : ft, far = x < 0.0f ? ft : pre;
    return near + lesser_gate(x) * (far - near);
  }
  // gate (1 - gate) (gradient (ft - pre) + l1)
  Floats slope(Floats x, float l1) const {
    const Floats gate = lesser_gate(x);
    const Floats change = load<Type>(tensor.ft) - load<Type>(tensor.pre);
    return (gate * (1.0f - gate)) * (load<Type>(tensor.gradient) * change + l1);
  }
};

inline Floats flip(Floats f, Words sign) { return bits<Floats>(bits<Words>(f) ^ sign); }

// Calls body(entries) for each vector of each tensor.
template <class Body>
void for_each_vector(const GraftTensor* tensors, int64_t count, int threads, const Body& body) {
  const Chunks<GraftTensor> chunks(tensors, count, &GraftTensor::size);
  chunks.for_each(threads, [&](const GraftTensor& tensor, int64_t begin, int64_t end) {
    const auto run = [&](auto type) {
      using Type = decltype(type);
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) body(Entries<Type, true>{tensor, i, kLanes}, type);
      if (i < end) body(Entries<Type, false>{tensor, i, end - i}, type);
    };
    if (tensor.dtype == DType::f32) run(F32{});
    if (tensor.dtype == DType::bf16) run(BF16{});
    if (tensor.dtype == DType::f16) run(F16{});
  });
}

}  // namespace

void graft_blend(const GraftTensor* tensors, int64_t count, double bias, int threads) {
  const float shift = static_cast<float>(bias);
  for_each_vector(tensors, count, threads, [=](const auto& entries, auto type) {
    using Type = decltype(type);
    const Floats x = flip(entries.template load<F32>(entries.tensor.logits) - shift, entries.sign());
    entries.template store<Type>(entries.tensor.out, entries.blend(x));
  });
}

void graft_logits_gradient(const GraftTensor* tensors, int64_t count, double bias, int threads) {
  const float shift = static_cast<float>(bias);
  for_each_vector(tensors, count, threads, [=](const auto& entries, auto) {
    const Words sign = entries.sign();
    const Floats x = flip(entries.template load<F32>(entries.tensor.logits) - shift, sign);
    entries.template store<F32>(entries.tensor.out, flip(entries.slope(x, 0.0f), sign));
  });
}

void graft_mask_step(const GraftTensor* tensors, int64_t count, double bias, double lr, double l1,
                     int threads) {
  const float shift = static_cast<float>(bias), rate = static_cast<float>(lr),
              weight = static_cast<float>(l1);
  for_each_vector(tensors, count, threads, [=](const auto& entries, auto type) {
    using Type = decltype(type);
    const Words sign = entries.sign();
    const Floats logits = entries.template load<F32>(entries.tensor.logits);
    const Floats slope = entries.slope(flip(logits - shift, sign), weight);
    const Floats next = logits - rate * flip(slope, sign);
    entries.template store<F32>(entries.tensor.logits, next);
    if (entries.tensor.out)
      entries.template store<Type>(entries.tensor.out, entries.blend(flip(next - shift, sign)));
  });
}

}  // namespace engram::cpu::ENGRAM_ISA

// Packed masks: packing, unpacking, the choice by bits, and the k largest keys. Compiled once for each
// instruction set (isa.h).
#include "chunks.h"
#include "engram/graft.h"
#include "packed.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

struct Flat {
  int64_t size;
};

// function(begin, end) over chunks of one flat array.
template <class Function>
void for_each_chunk(int64_t size, int threads, const Function& function) {
  const Flat flat{size};
  Chunks<Flat>(&flat, 1, &Flat::size).for_each(threads, [&](const Flat&, int64_t begin, int64_t end) {
    function(begin, end);
  });
}

// Entries begin to end. In functions of their own: what they write could be, for all the compiler knows, the
// pointers that a closure holds.
template <class Element>
void choose(const Element* pre, const Element* ft, const uint8_t* mask, Element* out, int64_t begin,
            int64_t end) {
  using V = Vector<Element, 8>;
  V bit;
  for (int lane = 0; lane < 8; ++lane) bit[lane] = Element(1) << lane;
  int64_t i = begin;
  for (; i + 8 <= end; i += 8) {
    if (i * sizeof(Element) % 64 == 0) {
      ask_ahead(pre + i);
      ask_ahead(ft + i);
      ask_ahead<1>(out + i);
    }
    V first, second;
    std::memcpy(&first, pre + i, sizeof(V));
    std::memcpy(&second, ft + i, sizeof(V));
    const V chosen = ((V{} + Element(mask[i / 8])) & bit) != 0 ? second : first;
    std::memcpy(out + i, &chosen, sizeof(V));
  }
  for (; i < end; ++i) out[i] = mask[i / 8] >> (i % 8) & 1 ? ft[i] : pre[i];
}

void pack(const uint8_t* mask, uint8_t* packed, int64_t begin, int64_t end) {
  const int64_t whole = end / 8;
  for (int64_t byte = begin / 8; byte < whole; ++byte) packed[byte] = pack_eight(mask + 8 * byte);
  if (8 * whole < end) {
    uint8_t last[8] = {};
    std::memcpy(last, mask + 8 * whole, end - 8 * whole);
    packed[whole] = pack_eight(last);
  }
}

void unpack(const uint8_t* packed, uint8_t* mask, int64_t begin, int64_t end) {
  const int64_t whole = end / 8;
  for (int64_t byte = begin / 8; byte < whole; ++byte) {
    const uint64_t bytes = unpack_eight(packed[byte]);
    std::memcpy(mask + 8 * byte, &bytes, 8);
  }
  if (8 * whole < end) {
    const uint64_t bytes = unpack_eight(packed[whole]);
    std::memcpy(mask + 8 * whole, &bytes, end - 8 * whole);
  }
}

// ---- the k largest keys

// Floats as integers of the same order, the two zeros equal.
inline Words ordered(Floats f) {
  const Words w = bits<Words>(f + 0.0f);
  return w ^ ((w >> 31) != 0u ? Words{} + 0xffffffffu : Words{} + 0x80000000u);
}
inline bool finite(uint32_t key) { return key > 0x007fffffu && key < 0xff800000u; }

// The keys of entries begin to end, at most kChunk of them, and room for a whole last vector.
template <class Type>
void keys_of(const GraftTensor& tensor, int64_t begin, int64_t end, uint32_t* keys) {
  using Element = typename Type::Element;
  const auto* pre = static_cast<const Element*>(tensor.pre);
  const auto* ft = static_cast<const Element*>(tensor.ft);
  const auto key = [](Floats a, Floats b) { return ordered(bits<Floats>(bits<Words>(b - a) & 0x7fffffffu)); };
  int64_t i = begin;
  for (; i + kFloats <= end; i += kFloats) {
    if (i * sizeof(Element) % 64 == 0) {
      ask_ahead(pre + i);
      if (ft) ask_ahead(ft + i);
    }
    const Floats a = Type::load(pre + i);
    const Words w = ft ? key(a, Type::load(ft + i)) : ordered(a);
    std::memcpy(keys + (i - begin), &w, sizeof(w));
  }
  if (i < end) {
    const Floats a = load_some<Type>(pre + i, end - i);
    const Words w = ft ? key(a, load_some<Type>(ft + i, end - i)) : ordered(a);
    std::memcpy(keys + (i - begin), &w, (end - i) * sizeof(uint32_t));
  }
}

constexpr int kMaxBins = 1 << 11;

// A thread's own keys, histogram and count of what is not finite.
struct Tally {
  uint32_t keys[kChunk];
  int64_t histogram[kMaxBins] = {};
  int64_t invalid = 0;
};

class Selection {
 public:
  Selection(const GraftTensor* tensors, int64_t count, int64_t k, int threads)
      : chunks_(tensors, count, &GraftTensor::size), remaining_(k), threads_(threads), tallies_(threads) {}

  // Eleven, eleven and ten bits at a time, from the top: which keys have the prefix of the k-th largest?
  int64_t find_threshold() {
    int64_t invalid = 0;
    while (known_ < 32) {
      const int width = known_ < 22 ? 11 : 10;
      const int shift = 32 - known_ - width;
      const uint32_t bins = 1u << width;
      int64_t histogram[kMaxBins] = {};
      parallel(threads_, [&](int part) {
        Tally& tally = *new (tallies_.data() + part) Tally;
        for_part(part, [&](int64_t chunk) { count(chunk, shift, bins, tally); });
      });
      for (int part = 0; part < threads_; ++part) {
        const Tally& tally = tallies_.data()[part];
        invalid += tally.invalid;
        for (uint32_t bin = 0; bin < bins; ++bin) histogram[bin] += tally.histogram[bin];
      }
      if (invalid) return invalid;
      uint32_t bin = bins - 1;
      for (; bin > 0 && histogram[bin] < remaining_; --bin) remaining_ -= histogram[bin];
      prefix_ = known_ == 0 ? bin : prefix_ << width | bin;
      known_ += width;
    }
    return 0;
  }

  // The threshold is known: the keys above it, and the first of its equals.
  void write_masks() {
    Scratch<int64_t> equal(chunks_.count());
    parallel(threads_, [&](int part) {
      uint32_t* keys = tallies_.data()[part].keys;
      for_part(part, [&](int64_t chunk) {
        const int64_t size = fill(chunk, keys);
        int64_t ties = 0;
        for (int64_t i = 0; i < size; ++i) ties += keys[i] == prefix_;
        equal.data()[chunk] = ties;
      });
    });
    for (int64_t chunk = 0; chunk < chunks_.count(); ++chunk) {
      equal.data()[chunk] = smaller(equal.data()[chunk], remaining_);
      remaining_ -= equal.data()[chunk];
    }
    parallel(threads_, [&](int part) {
      uint32_t* keys = tallies_.data()[part].keys;
      for_part(part, [&](int64_t chunk) {
        int64_t size = fill(chunk, keys), ties = equal.data()[chunk];
        chunks_.visit(chunk, [&](const GraftTensor& tensor, int64_t begin, int64_t) {
          auto* mask = static_cast<uint8_t*>(tensor.out) + begin / 8;
          for (int64_t i = 0; i < size; i += 8) mask[i / 8] = byte(keys + i, smaller(8, size - i), ties);
        });
      });
    });
  }

 private:
  template <class Body>
  void for_part(int part, const Body& body) const {
    const int64_t count = chunks_.count();
    for (int64_t i = count * part / threads_; i < count * (part + 1) / threads_; ++i) body(i);
  }

  int64_t fill(int64_t chunk, uint32_t* keys) const {
    int64_t size = 0;
    chunks_.visit(chunk, [&](const GraftTensor& tensor, int64_t begin, int64_t end) {
      size = end - begin;
      if (tensor.dtype == DType::f32) keys_of<F32>(tensor, begin, end, keys);
      if (tensor.dtype == DType::bf16) keys_of<BF16>(tensor, begin, end, keys);
      if (tensor.dtype == DType::f16) keys_of<F16>(tensor, begin, end, keys);
    });
    return size;
  }

  void count(int64_t chunk, int shift, uint32_t bins, Tally& tally) const {
    const int64_t size = fill(chunk, tally.keys);
    const uint32_t *key = tally.keys, *end = key + size;
    if (known_ == 0) {
      int64_t invalid = 0;
      for (; key < end; ++key) {
        invalid += !finite(*key);
        ++tally.histogram[*key >> shift];
      }
      tally.invalid += invalid;
      return;
    }
    const int known = 32 - known_;
    const uint32_t prefix = prefix_;
    for (; key < end; ++key)
      if (*key >> known == prefix) ++tally.histogram[(*key >> shift) & (bins - 1)];
  }

  uint8_t byte(const uint32_t* keys, int64_t size, int64_t& ties) const {
    uint8_t bits = 0;
    for (int64_t i = 0; i < size; ++i) {
      const bool tie = keys[i] == prefix_ && ties > 0;
      ties -= tie;
      bits |= static_cast<uint8_t>(keys[i] > prefix_ || tie) << i;
    }
    return bits;
  }

  Chunks<GraftTensor> chunks_;
  int64_t remaining_;  // how many keys with the present prefix are wanted
  int threads_;
  Scratch<Tally> tallies_;  // one for each thread
  uint32_t prefix_ = 0;
  int known_ = 0;  // bits of the prefix
};

}  // namespace

void pack_mask(const uint8_t* mask, int64_t size, uint8_t* packed, int threads) {
  for_each_chunk(size, threads, [&](int64_t begin, int64_t end) { pack(mask, packed, begin, end); });
}

void unpack_mask(const uint8_t* packed, int64_t size, uint8_t* mask, int threads) {
  for_each_chunk(size, threads, [&](int64_t begin, int64_t end) { unpack(packed, mask, begin, end); });
}

void graft_blend_packed(const void* pre, const void* ft, const uint8_t* mask, int64_t size, int element_bytes,
                        void* out, int threads) {
  const auto run = [&](auto zero) {
    using Element = decltype(zero);
    for_each_chunk(size, threads, [&](int64_t begin, int64_t end) {
      choose(static_cast<const Element*>(pre), static_cast<const Element*>(ft), mask,
             static_cast<Element*>(out), begin, end);
    });
  };
  if (element_bytes == 2) run(uint16_t{});
  if (element_bytes == 4) run(uint32_t{});
  if (element_bytes == 8) run(uint64_t{});
}

int64_t top_k_mask(const GraftTensor* tensors, int64_t count, int64_t k, int threads) {
  Selection selection(tensors, count, k, threads);
  const int64_t invalid = selection.find_threshold();
  if (invalid == 0) selection.write_masks();
  return invalid;
}

}  // namespace engram::cpu::ENGRAM_ISA

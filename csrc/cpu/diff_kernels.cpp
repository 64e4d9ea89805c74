// What changed between two models, as positions and values. Compiled once for each instruction set (isa.h).
#include <cstdlib>

#include "chunks.h"
#include "engram/graft.h"
#include "packed.h"

namespace engram::cpu::ENGRAM_ISA {

namespace {

// different[i] = 1 where the bits of two elements differ.
template <class Element>
void compare(const GraftTensor& tensor, int64_t begin, int64_t count, uint8_t* different) {
  const auto* a = static_cast<const Element*>(tensor.pre) + begin;
  const auto* b = static_cast<const Element*>(tensor.ft) + begin;
  for (int64_t i = 0; i < count; ++i) different[i] = a[i] != b[i];
}

// Of these, those stay whose difference is above the threshold, or NaN.
template <class T>
void exceed(const T* a, const T* b, int64_t count, T threshold, uint8_t* different) {
  for (int64_t i = 0; i < count; ++i) {
    const T change = b[i] - a[i];
    different[i] &= !(change <= threshold && change >= -threshold);
  }
}

template <class Type>
void exceed(const GraftTensor& tensor, int64_t begin, int64_t count, float threshold, uint8_t* different) {
  using Element = typename Type::Element;
  const auto* a = static_cast<const Element*>(tensor.pre) + begin;
  const auto* b = static_cast<const Element*>(tensor.ft) + begin;
  constexpr int64_t kSome = 256;
  float wide[2][kSome];
  for (int64_t i = 0; i < count; i += kSome) {
    const int64_t some = smaller(kSome, count - i);
    for (int64_t j = 0; j < some; j += kFloats) {
      const int64_t lanes = smaller(kFloats, some - j);
      const Floats first = lanes == kFloats ? Type::load(a + i + j) : load_some<Type>(a + i + j, lanes);
      const Floats second = lanes == kFloats ? Type::load(b + i + j) : load_some<Type>(b + i + j, lanes);
      std::memcpy(wide[0] + j, &first, sizeof(first));
      std::memcpy(wide[1] + j, &second, sizeof(second));
    }
    exceed(wide[0], wide[1], some, threshold, different + i);
  }
}

void mark(const GraftTensor& tensor, int64_t begin, int64_t count, double threshold, uint8_t* different) {
  if (tensor.dtype == DType::f64)
    compare<uint64_t>(tensor, begin, count, different);
  else if (tensor.dtype == DType::f32)
    compare<uint32_t>(tensor, begin, count, different);
  else
    compare<uint16_t>(tensor, begin, count, different);
  if (threshold < 0) return;
  const float narrow = static_cast<float>(threshold);
  if (tensor.dtype == DType::f64)
    exceed(static_cast<const double*>(tensor.pre) + begin, static_cast<const double*>(tensor.ft) + begin,
           count, threshold, different);
  if (tensor.dtype == DType::f32) exceed<F32>(tensor, begin, count, narrow, different);
  if (tensor.dtype == DType::bf16) exceed<BF16>(tensor, begin, count, narrow, different);
  if (tensor.dtype == DType::f16) exceed<F16>(tensor, begin, count, narrow, different);
}

// Bit i is set where byte i of 32 is 1.
inline uint32_t word_of(const uint8_t* different) {
#ifdef __AVX2__
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(load<__m256i>(different), 7)));
#else
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(pack_eight(different + 8 * i)) << (8 * i);
  return word;
#endif
}

// Bytes that grow; what is asked for is there, or `data` is null.
struct Arena {
  char* data;
  int64_t size;
  int64_t capacity;

  void reserve(int64_t more) {
    if (size + more <= capacity) return;
    capacity = 2 * capacity + more;
    char* grown = static_cast<char*>(std::realloc(data, capacity));
    if (!grown) std::free(data);
    data = grown;
  }
};

// The changed entries of a part of all chunks, in order: of each chunk its indices, then its values.
class Parts {
 public:
  explicit Parts(int64_t count) : arenas_(count), count_(count) {
    for (int64_t i = 0; i < count; ++i) arenas_.data()[i] = Arena{nullptr, 0, 0};
  }
  ~Parts() {
    for (int64_t i = 0; i < count_; ++i) std::free(arenas_.data()[i].data);
  }
  Arena& operator[](int64_t part) const { return arenas_.data()[part]; }

 private:
  Scratch<Arena> arenas_;
  int64_t count_;
};

// Where a chunk's values begin, behind its indices, and where the next chunk does: aligned for any type.
inline int64_t aligned(int64_t bytes) { return ceil_div(bytes, 8) * 8; }

template <class Element, class Index>
int64_t collect(const GraftTensor& tensor, int64_t begin, int64_t count, const uint8_t* different,
                Arena& arena) {
  arena.reserve(aligned(count * sizeof(Index)) + aligned(count * sizeof(Element)));
  if (!arena.data) return 0;
  const auto* weight = static_cast<const Element*>(tensor.ft);
  auto* indices = reinterpret_cast<Index*>(arena.data + arena.size);
  int64_t found = 0;
  for (int64_t at = 0; at < count; at += 32)
    for (uint32_t word = word_of(different + at); word; word &= word - 1)
      indices[found++] = static_cast<Index>(begin + at + __builtin_ctz(word));
  arena.size += aligned(found * sizeof(Index));
  auto* values = reinterpret_cast<Element*>(arena.data + arena.size);
  for (int64_t i = 0; i < found; ++i) values[i] = weight[indices[i]];
  arena.size += aligned(found * sizeof(Element));
  return found;
}

template <class Index>
int64_t collect(const GraftTensor& tensor, int64_t begin, int64_t count, const uint8_t* different,
                Arena& arena) {
  if (tensor.dtype == DType::f64) return collect<uint64_t, Index>(tensor, begin, count, different, arena);
  if (tensor.dtype == DType::f32) return collect<uint32_t, Index>(tensor, begin, count, different, arena);
  return collect<uint16_t, Index>(tensor, begin, count, different, arena);
}

int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

void copy(void* to, const char* from, int64_t offset, int64_t bytes) {
  if (bytes) std::memcpy(static_cast<char*>(to) + offset, from, bytes);
}

}  // namespace

bool sparse_diff(const GraftTensor* tensors, int64_t count, double threshold, bool wide_indices, Place place,
                 void* context, int threads) {
  const Chunks<GraftTensor> chunks(tensors, count, &GraftTensor::size);
  // A few parts for each thread, so that none waits long for another.
  const int64_t part_count = smaller(chunks.count(), 4 * threads);
  const auto first = [&](int64_t part) { return part * chunks.count() / part_count; };
  const Parts parts(part_count);
  const Scratch<int64_t> found(chunks.count()), changed(count);
  const int64_t index_bytes = wide_indices ? 8 : 4;

  parallel_for(threads, part_count, [&](int64_t part, int) {
    for (int64_t chunk = first(part); chunk < first(part + 1); ++chunk)
      chunks.visit(chunk, [&](const GraftTensor& tensor, int64_t begin, int64_t end) {
        const int64_t size = end - begin;
        alignas(64) uint8_t different[kChunk + 32];
        mark(tensor, begin, size, threshold, different);
        std::memset(different + size, 0, 32);
        found.data()[chunk] = wide_indices ? collect<int64_t>(tensor, begin, size, different, parts[part])
                                           : collect<int32_t>(tensor, begin, size, different, parts[part]);
      });
  });
  for (int64_t part = 0; part < part_count; ++part)
    if (!parts[part].data) return false;

  // How many each chunk has, then where its first one goes.
  int64_t next = 0;
  for (int64_t i = 0; i < count; ++i) {
    changed.data()[i] = 0;
    for (int64_t left = ceil_div(tensors[i].size, kChunk); left > 0; --left, ++next) {
      const int64_t here = found.data()[next];
      found.data()[next] = changed.data()[i];
      changed.data()[i] += here;
    }
  }
  const Scratch<SparseTarget> targets(count);
  place(context, changed.data(), targets.data());

  parallel_for(threads, part_count, [&](int64_t part, int) {
    const char* from = parts[part].data;
    for (int64_t chunk = first(part); chunk < first(part + 1); ++chunk)
      chunks.visit(chunk, [&](const GraftTensor& tensor, int64_t, int64_t end) {
        const int64_t i = &tensor - tensors, at = found.data()[chunk], bytes = bytes_of(tensor.dtype);
        const int64_t after = end == tensor.size ? changed.data()[i] : found.data()[chunk + 1];
        copy(targets.data()[i].indices, from, at * index_bytes, (after - at) * index_bytes);
        from += aligned((after - at) * index_bytes);
        copy(targets.data()[i].values, from, at * bytes, (after - at) * bytes);
        from += aligned((after - at) * bytes);
      });
  });
  return true;
}

}  // namespace engram::cpu::ENGRAM_ISA

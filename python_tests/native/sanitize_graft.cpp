// Drives the CPU kernels of grafting over odd, empty and unaligned sizes and lists against plain loops in
// double. Every array is an allocation of its exact size, so that AddressSanitizer sees a single element read
// or written too far.
#include <numeric>
#include <vector>

#include "cpu/isa.h"
#include "engram/graft.h"
#include "formats.h"

using engram::GraftTensor;
using engram::SparseTensor;

namespace {

constexpr double kBias = 0.5, kRate = 0.25, kL1 = 0.01;
constexpr int64_t kSizes[] = {0, 1, 3, 7, 8, 9, 15, 17, 33, 8191, 8192, 8200, 20011};

int64_t bytes_of_bits(int64_t size) { return (size + 7) / 8; }
bool bit(const char* mask, int64_t i) { return mask[i / 8] >> (i % 8) & 1; }

// One weight with everything that belongs to it.
struct Weight {
  Weight(int64_t size, const Format& format, size_t offset, bool masked)
      : format(format),
        size(size),
        pre(size, format.bytes, offset),
        ft(size, format.bytes, offset),
        gradient(size, format.bytes, offset),
        out(size, format.bytes, offset),
        logits(size, 4, offset ? 4 : 0),
        slopes(size, 4),
        base(bytes_of_bits(size), 1, offset),
        masked(masked) {
    for (Array* array : {&pre, &ft, &gradient}) fill(*array, format);
    for (int64_t i = 0; i < size; ++i) set_logit(i, static_cast<float>(12 * random_value()));
    for (int64_t i = 0; i < bytes_of_bits(size); ++i) base.data()[i] = static_cast<char>(generator());
  }

  void set_logit(int64_t i, float value) { std::memcpy(logits.data() + 4 * i, &value, 4); }
  double logit(int64_t i) { return get(logits.data(), i, kFormats[0]); }
  double sign(int64_t i) { return masked && bit(base.data(), i) ? -1 : 1; }
  double gate(int64_t i) { return 1 / (1 + std::exp(-sign(i) * (logit(i) - kBias))); }
  double blended(int64_t i) {
    const double a = get(pre.data(), i, format), b = get(ft.data(), i, format);
    return a + gate(i) * (b - a);
  }
  double slope(int64_t i, double l1) {
    const double change = get(ft.data(), i, format) - get(pre.data(), i, format);
    return sign(i) * gate(i) * (1 - gate(i)) * (get(gradient.data(), i, format) * change + l1);
  }
  GraftTensor row(void* target) {
    return {target,
            pre.data(),
            ft.data(),
            reinterpret_cast<float*>(logits.data()),
            masked ? reinterpret_cast<const uint8_t*>(base.data()) : nullptr,
            gradient.data(),
            size,
            format.dtype};
  }

  Format format;
  int64_t size;
  Array pre, ft, gradient, out, logits, slopes, base;
  bool masked;
};

std::vector<std::unique_ptr<Weight>> model(bool masked, size_t offset) {
  std::vector<std::unique_ptr<Weight>> weights;
  int kind = 0;
  for (const int64_t size : kSizes)
    weights.push_back(std::make_unique<Weight>(size, kFormats[kind++ % 3], offset * 2, masked));
  return weights;
}

void check_blends(bool masked, size_t offset, int threads) {
  auto weights = model(masked, offset);
  std::vector<GraftTensor> to_out, to_slopes;
  for (auto& w : weights) {
    to_out.push_back(w->row(w->out.data()));
    to_slopes.push_back(w->row(w->slopes.data()));
  }
  engram::cpu::graft_blend(to_out.data(), to_out.size(), kBias, threads);
  engram::cpu::graft_logits_gradient(to_slopes.data(), to_slopes.size(), kBias, threads);
  for (auto& w : weights)
    for (int64_t i = 0; i < w->size; ++i) {
      const double truth = w->blended(i), got = get(w->out.data(), i, w->format);
      expect(std::fabs(got - truth) <= spacing(truth, w->format) + 1e-6, "blend", got, truth);
      const double slope = get(w->slopes.data(), i, kFormats[0]);
      expect(std::fabs(slope - w->slope(i, 0)) <= 1e-6, "gradient", slope, w->slope(i, 0));
    }
  std::vector<std::vector<double>> next;
  for (auto& w : weights) {
    next.emplace_back();
    for (int64_t i = 0; i < w->size; ++i) next.back().push_back(w->logit(i) - kRate * w->slope(i, kL1));
  }
  engram::cpu::graft_mask_step(to_out.data(), to_out.size(), kBias, kRate, kL1, threads);
  for (size_t t = 0; t < weights.size(); ++t)
    for (int64_t i = 0; i < weights[t]->size; ++i) {
      auto& w = *weights[t];
      expect(std::fabs(w.logit(i) - next[t][i]) <= 4e-6, "step", w.logit(i), next[t][i]);
      const double truth = w.blended(i), got = get(w.out.data(), i, w.format);
      expect(std::fabs(got - truth) <= spacing(truth, w.format) + 1e-6, "blend after the step", got, truth);
    }
  for (auto& row : to_out) row.out = nullptr;
  engram::cpu::graft_mask_step(to_out.data(), to_out.size(), kBias, kRate, kL1, threads);
}

void check_masks(int64_t size, const Format& format, size_t offset, int threads) {
  Array mask(size, 1, offset), packed(bytes_of_bits(size), 1, offset), again(size, 1, offset);
  for (int64_t i = 0; i < size; ++i) mask.data()[i] = generator() & 1;
  const auto as_bytes = [](Array& a) { return reinterpret_cast<uint8_t*>(a.data()); };
  engram::cpu::pack_mask(as_bytes(mask), size, as_bytes(packed), threads);
  engram::cpu::unpack_mask(as_bytes(packed), size, as_bytes(again), threads);
  Weight w(size, format, offset * format.bytes, false);
  engram::cpu::graft_blend_packed(w.pre.data(), w.ft.data(), as_bytes(packed), size,
                                  static_cast<int>(format.bytes), w.out.data(), threads);
  for (int64_t i = 0; i < size; ++i) {
    expect(bit(packed.data(), i) == mask.data()[i], "pack", bit(packed.data(), i), mask.data()[i]);
    expect(again.data()[i] == mask.data()[i], "unpack", again.data()[i], mask.data()[i]);
    const char* chosen = (mask.data()[i] ? w.ft : w.pre).data() + i * format.bytes;
    expect(!std::memcmp(w.out.data() + i * format.bytes, chosen, format.bytes), "choice", i, i);
  }
  if (size % 8) {
    const int beyond = static_cast<uint8_t>(packed.data()[size / 8]) >> (size % 8);
    expect(beyond == 0, "bits beyond the last", beyond, 0);
  }
}

void check_top_k(int64_t k, bool differences, bool coarse, size_t offset, int threads) {
  auto weights = model(false, offset);
  std::vector<std::unique_ptr<Array>> masks;
  std::vector<GraftTensor> rows;
  std::vector<double> keys;
  for (auto& w : weights) {
    if (coarse) std::memcpy(w->ft.data(), w->pre.data(), w->size * w->format.bytes);
    masks.push_back(std::make_unique<Array>(bytes_of_bits(w->size), 1, offset));
    rows.push_back(w->row(masks.back()->data()));
    if (!differences) rows.back().ft = nullptr;
    for (int64_t i = 0; i < w->size; ++i) {
      const float a = static_cast<float>(get(w->pre.data(), i, w->format));
      const float b = static_cast<float>(get(w->ft.data(), i, w->format));
      keys.push_back(differences ? std::fabs(b - a) : a);
    }
  }
  expect(engram::cpu::top_k_mask(rows.data(), rows.size(), k, threads) == 0, "finite keys", 1, 0);
  std::vector<int64_t> order(keys.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] > keys[b]; });
  std::vector<bool> chosen(keys.size(), false);
  for (int64_t i = 0; i < k; ++i) chosen[order[i]] = true;
  int64_t at = 0;
  for (size_t t = 0; t < weights.size(); ++t)
    for (int64_t i = 0; i < weights[t]->size; ++i, ++at)
      expect(bit(masks[t]->data(), i) == chosen[at], "top k", bit(masks[t]->data(), i), chosen[at]);

  const float bad[] = {NAN, INFINITY, -INFINITY};
  std::memcpy(const_cast<void*>(rows[12].pre), bad, 12);
  expect(engram::cpu::top_k_mask(rows.data(), rows.size(), k, threads) == 3, "keys that are not finite", 0,
         3);
}

template <class Index>
void check_sparse(const Format& format, size_t offset, int threads) {
  std::vector<std::unique_ptr<Array>> arrays;
  std::vector<SparseTensor> rows;
  std::vector<std::vector<char>> before;
  for (const int64_t size : kSizes) {
    std::vector<Index> at;
    for (int64_t i = 0; i < size; ++i)
      if (generator() % 2) at.push_back(static_cast<Index>(i));
    const int64_t count = static_cast<int64_t>(at.size());
    auto add = [&](int64_t n, size_t bytes) {
      arrays.push_back(std::make_unique<Array>(n, bytes, offset * bytes));
      return arrays.back().get();
    };
    Array *weight = add(size, format.bytes), *indices = add(count, sizeof(Index)),
          *values = add(count, format.bytes), *old = add(count, format.bytes);
    fill(*weight, format);
    fill(*values, format);
    if (count) std::memcpy(indices->data(), at.data(), count * sizeof(Index));
    before.emplace_back(weight->data(), weight->data() + size * format.bytes);
    rows.push_back({weight->data(), indices->data(), values->data(), old->data(), count, size,
                    static_cast<int>(format.bytes)});
  }
  const bool wide = sizeof(Index) == 8;
  expect(engram::cpu::sparse_faults(rows.data(), rows.size(), wide, threads) == 0, "no faults", 1, 0);
  engram::cpu::sparse_apply(rows.data(), rows.size(), wide, threads);
  for (const auto& row : rows)
    for (int64_t i = 0; i < row.count; ++i) {
      const Index at = static_cast<const Index*>(row.indices)[i];
      const auto* written = static_cast<const char*>(row.weight) + at * format.bytes;
      const auto* wanted = static_cast<const char*>(row.values) + i * format.bytes;
      expect(!std::memcmp(written, wanted, format.bytes), "sparse write", at, at);
    }
  for (auto& row : rows) std::swap(*const_cast<void**>(&row.values), row.overwritten);
  engram::cpu::sparse_apply(rows.data(), rows.size(), wide, threads);
  for (size_t t = 0; t < rows.size(); ++t)
    expect(before[t].empty() || !std::memcmp(rows[t].weight, before[t].data(), before[t].size()), "undo", t,
           t);
  auto* last = static_cast<Index*>(const_cast<void*>(rows.back().indices));
  last[0] = -1;
  last[5] = last[4];
  last[rows.back().count - 1] = static_cast<Index>(rows.back().size);
  expect(engram::cpu::sparse_faults(rows.data(), rows.size(), wide, threads) == 3, "three faults", 0, 3);
}

// Where the changed entries go: arrays of their exact size.
struct Places {
  size_t index_bytes, bytes;
  std::vector<int64_t> counts;
  std::vector<std::unique_ptr<Array>> indices, values;

  static void ask(void* context, const int64_t* changed, engram::SparseTarget* targets) {
    auto& places = *static_cast<Places*>(context);
    for (size_t t = 0; t < std::size(kSizes); ++t) {
      places.counts.push_back(changed[t]);
      places.indices.push_back(std::make_unique<Array>(changed[t], places.index_bytes));
      places.values.push_back(std::make_unique<Array>(changed[t], places.bytes));
      targets[t] = {places.indices.back()->data(), places.values.back()->data()};
    }
  }
};

template <class Index>
void check_diff(const Format& format, double threshold, int share, size_t offset, int threads) {
  std::vector<std::unique_ptr<Array>> arrays;
  std::vector<GraftTensor> rows;
  for (const int64_t size : kSizes) {
    for (int which = 0; which < 2; ++which) {
      arrays.push_back(std::make_unique<Array>(size, format.bytes, offset * format.bytes));
      fill(*arrays.back(), format);
    }
    char *old = arrays.end()[-2]->data(), *now = arrays.back()->data();
    for (int64_t i = 0; i < size; ++i)
      if (generator() % 100 >= static_cast<uint64_t>(share))
        std::memcpy(now + i * format.bytes, old + i * format.bytes, format.bytes);
    rows.push_back({nullptr, old, now, nullptr, nullptr, nullptr, size, format.dtype});
  }
  Places places{sizeof(Index), format.bytes, {}, {}, {}};
  const bool wide = sizeof(Index) == 8;
  expect(engram::cpu::sparse_diff(rows.data(), rows.size(), threshold, wide, Places::ask, &places, threads),
         "memory", 0, 1);
  for (size_t t = 0; t < rows.size(); ++t) {
    const auto *old = static_cast<const char*>(rows[t].pre), *now = static_cast<const char*>(rows[t].ft);
    int64_t found = 0;
    for (int64_t i = 0; i < rows[t].size; ++i) {
      const char* value = now + i * format.bytes;
      if (!std::memcmp(old + i * format.bytes, value, format.bytes)) continue;
      // Differences of floats are rounded to float.
      const double change = get(now, i, format) - get(old, i, format);
      const double size = std::abs(format.bytes == 8 ? change : static_cast<float>(change));
      if (threshold >= 0 && size <= (format.bytes == 8 ? threshold : static_cast<float>(threshold))) continue;
      if (found < places.counts[t]) {
        const Index at = reinterpret_cast<const Index*>(places.indices[t]->data())[found];
        const char* kept = places.values[t]->data() + found * format.bytes;
        expect(at == i && !std::memcmp(kept, value, format.bytes), "changed entry", at, i);
      }
      ++found;
    }
    expect(found == places.counts[t], "number of changes", places.counts[t], found);
  }
}

}  // namespace

// The argument is the instruction set to test; 77 says that this machine does not have it.
int main(int, char** arguments) {
  if (std::strcmp(engram::cpu::isa_name(engram::cpu::isa()), arguments[1]) != 0) return 77;
  const int64_t total = std::accumulate(std::begin(kSizes), std::end(kSizes), int64_t(0));
  for (const size_t offset : {0, 1})
    for (const int threads : {1, 3}) {
      for (const bool masked : {false, true}) check_blends(masked, offset, threads);
      for (const Format& format : kFormats) {
        for (const int64_t size : kSizes) check_masks(size, format, offset, threads);
        check_sparse<int32_t>(format, offset, threads);
        check_sparse<int64_t>(format, offset, threads);
        for (const double threshold : {-1.0, 0.0, 0.5})
          for (const int share : {0, 1, 40, 100}) {
            check_diff<int32_t>(format, threshold, share, offset, threads);
            check_diff<int64_t>(format, threshold, share, offset, threads);
          }
      }
      for (const int64_t k : {int64_t(0), int64_t(1), int64_t(100), int64_t(20000), total}) {
        check_top_k(k, true, false, offset, threads);
        check_top_k(k, true, true, offset, threads);  // every difference is 0: all are ties
        check_top_k(k, false, false, offset, threads);
      }
    }
  std::printf("%d failures\n", failures);
  return failures != 0;
}

// Steps the kernels of csrc/cuda/graft.cu on a host and compares them with plain loops. Exits with 1 on a
// failure.
#include <cuda/pack_mask.cuh>
#include <cuda/sparse_apply.cuh>
#include <cuda/top_k_mask.cuh>
#include <memory>

#include "cuda_checks.h"

using namespace engram;
using namespace engram::cuda;

namespace {

const int64_t kSizes[] = {0, 1, 7, 8, 9, 31, 32, 33, 1024, 1025, 2047, 2049, 8193, 16399};

int64_t below(int64_t limit) { return std::uniform_int_distribution<int64_t>(0, limit - 1)(generator); }

void describe(const char* kernel, std::initializer_list<int64_t> numbers, Order order) {
  context = kernel;
  for (const int64_t number : numbers) context += " " + std::to_string(number);
  context += " order " + std::to_string(static_cast<int>(order));
}

// Arrays of exactly the size asked for, for the sanitizers to see every access beside them.
class Memory {
 public:
  template <typename T>
  T* take(int64_t count) {
    const auto values = std::make_shared<std::vector<T>>(count);
    kept_.push_back(values);
    return values->data();
  }

 private:
  std::vector<std::shared_ptr<void>> kept_;
};

void test_pack_mask() {
  for (const int64_t size : kSizes)
    for (const int64_t offset : {0, 1, 4, 8})
      for (const Order order : kOrders) {
        describe("pack_mask", {size, offset}, order);
        std::vector<uint8_t> mask(offset + size), packed((size + 7) / 8, 0xff), expected(packed.size(), 0);
        for (int64_t i = 0; i < size; ++i) {
          mask[offset + i] = static_cast<uint8_t>(below(2));
          expected[i / 8] |= static_cast<uint8_t>(mask[offset + i] << (i % 8));
        }
        run_blocks(PackMask{mask.data() + offset, size, packed.data()}, order);
        check(packed == expected, "other bits");
      }
}

struct Model {
  bool differences;
  Memory memory;
  std::vector<GraftTensor> tensors;
  std::vector<float> keys;  // of all tensors

  template <typename T, typename Value>
  void add(DType dtype, int64_t size, int64_t offset, const Value& value) {
    T* const pre = memory.take<T>(size + offset) + offset;
    T* const ft = differences ? memory.take<T>(size + offset) + offset : nullptr;
    for (int64_t i = 0; i < size; ++i) {
      pre[i] = element<T>(value());
      if (differences) ft[i] = element<T>(value());
      keys.push_back(differences ? std::fabs(widen(ft[i]) - widen(pre[i])) : widen(pre[i]));
    }
    auto* const mask = memory.take<uint8_t>((size + 7) / 8);
    tensors.push_back({mask, pre, ft, nullptr, nullptr, nullptr, size, dtype});
  }

  template <typename Value>
  void add(DType dtype, int64_t size, int64_t offset, const Value& value) {
    if (dtype == DType::f32) add<float>(dtype, size, offset, value);
    if (dtype == DType::bf16) add<BFloat16>(dtype, size, offset, value);
    if (dtype == DType::f16) add<Half>(dtype, size, offset, value);
  }

  // Returns how many keys are not finite.
  int64_t select(int64_t k, Order order) {
    for (const GraftTensor& tensor : tensors)
      if (tensor.size) std::memset(tensor.out, 0xff, (tensor.size + 7) / 8);
    const HostList<GraftTensor> list(tensors.data(), tensors.size(), &GraftTensor::size, kKeyChunk);
    Poisoned<TopKWorkspace> workspace(1);
    std::memset(static_cast<void*>(workspace.data()), 0, offsetof(TopKWorkspace, ranges));
    int64_t invalid = -1;
    write_top_k_masks(list.at(list.entries.data()), k, workspace.data(), &invalid, [&](const auto& program) {
      run_blocks(program, order);
      return 0;
    });
    return invalid;
  }

  // Whether the masks have the bits of these entries, and no others.
  bool has(const std::vector<bool>& chosen) const {
    size_t entry = 0;
    bool same = true;
    for (const GraftTensor& tensor : tensors)
      for (int64_t i = 0; i < (tensor.size + 7) / 8 * 8; ++i) {
        const bool bit = static_cast<const uint8_t*>(tensor.out)[i / 8] >> (i % 8) & 1;
        same = same && bit == (i < tensor.size && chosen[entry++]);
      }
    return same;
  }
};

template <typename Value>
void check_top_k(const char* name, bool differences, int64_t offset, const Value& value) {
  Model model{differences, {}, {}, {}};
  int type = 0;
  for (const int64_t size : kSizes) model.add(static_cast<DType>(type++ % 3), size, offset, value);
  const auto total = static_cast<int64_t>(model.keys.size());
  std::vector<int64_t> ranking(total);
  std::iota(ranking.begin(), ranking.end(), 0);
  std::stable_sort(ranking.begin(), ranking.end(),
                   [&](int64_t a, int64_t b) { return model.keys[a] > model.keys[b]; });
  for (const int64_t k : {int64_t(0), int64_t(1), total / 7, total - 1, total}) {
    std::vector<bool> chosen(total, false);
    for (int64_t i = 0; i < k; ++i) chosen[ranking[i]] = true;
    for (const Order order : kOrders) {
      describe(name, {differences, offset, k}, order);
      check(model.select(k, order) == 0, "finite keys are called invalid");
      check(model.has(chosen), "not the k first");
    }
  }
}

void test_top_k_mask() {
  for (const bool differences : {true, false})
    for (const int64_t offset : {0, 1}) {
      check_top_k("top_k_mask, normal", differences, offset, normal);
      check_top_k("top_k_mask, ties", differences, offset, [] { return double(below(3)) - 1; });
      check_top_k("top_k_mask, zeros", differences, offset, [] { return below(2) ? 0.0 : -0.0; });
      check_top_k("top_k_mask, tiny", differences, offset, [] { return normal() * 0x1p-130; });
    }

  // Equal keys in more chunks than there are ranges: the first k, also where they end in a range's second
  // chunk, as the ninth of all is.
  Model equal{false, {}, {}, {}};
  const int64_t sizes[] = {kMaxRanges * kKeyChunk, 3, 0, kKeyChunk + 5, kMaxRanges / 8 * kKeyChunk - 9};
  for (const int64_t size : sizes) equal.add(DType::bf16, size, 0, [] { return -1.5; });
  const auto total = static_cast<int64_t>(equal.keys.size());
  for (const int64_t k : {int64_t(8 * kKeyChunk + 1001), total - kKeyChunk - 77})
    for (const Order order : kOrders) {
      describe("top_k_mask, all equal", {k}, order);
      std::vector<bool> first(total, false);
      std::fill_n(first.begin(), k, true);
      check(equal.select(k, order) == 0, "finite keys are called invalid");
      check(equal.has(first), "not the k first");
    }

  for (const bool differences : {true, false})
    for (const Order order : kOrders) {
      describe("top_k_mask, not finite", {differences}, order);
      Model model{differences, {}, {}, {}};
      int64_t count = 0, bad = 0;
      for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
        model.add(dtype, 3001, 1, [&] {
          const double values[] = {NAN, -NAN, INFINITY, -INFINITY};
          return count++ % 100 == 0 ? values[bad++ % 4] : normal();
        });
      check(model.select(5, order) == bad && bad > 0, "not the number of NaN and infinite keys");
      check(model.select(0, order) == bad, "another number where nothing is wanted");
    }
}

template <typename Element, typename Index>
void test_sparse_apply() {
  for (const int64_t offset : {0, 1})
    for (const Order order : kOrders) {
      describe("sparse_apply", {sizeof(Element), sizeof(Index), offset}, order);
      Memory memory;
      std::vector<SparseTensor> tensors;
      std::vector<std::vector<Element>> before, after;
      for (const int64_t count : kSizes) {
        const int64_t size = 2 * count + 3;
        auto* const weight = memory.take<Element>(size + offset) + offset;
        auto* const indices = memory.take<Index>(count + offset) + offset;
        auto* const values = memory.take<Element>(count + offset) + offset;
        auto* const overwritten = memory.take<Element>(count + offset) + offset;
        for (int64_t i = 0; i < size; ++i) weight[i] = static_cast<Element>(generator());
        before.emplace_back(weight, weight + size);
        after.push_back(before.back());
        std::vector<Index> positions(size);
        std::iota(positions.begin(), positions.end(), Index(0));
        std::shuffle(positions.begin(), positions.end(), generator);
        for (int64_t i = 0; i < count; ++i) {
          indices[i] = positions[i];
          values[i] = static_cast<Element>(generator());
          after.back()[indices[i]] = values[i];
        }
        tensors.push_back({weight, indices, values, overwritten, count, size, sizeof(Element)});
      }
      const auto run = [&](const std::vector<std::vector<Element>>& expected, const char* what) {
        const HostList<SparseTensor> list(tensors.data(), tensors.size(), &SparseTensor::count, kSparseChunk);
        run_blocks(SparseApply<Index>{list.at(list.entries.data())}, order);
        bool same = true;
        for (size_t i = 0; i < tensors.size(); ++i)
          same = same && std::equal(expected[i].begin(), expected[i].end(),
                                    static_cast<const Element*>(tensors[i].weight));
        check(same, what);
      };
      run(after, "not the values");
      for (SparseTensor& tensor : tensors) {
        const void* const values = tensor.values;
        tensor.values = tensor.overwritten;
        tensor.overwritten = const_cast<void*>(values);
      }
      run(before, "not undone");
    }
}

template <typename Index>
void test_sparse_faults() {
  for (const int64_t every : {0, 1, 5, 900})  // how often an index is at fault; 0: never
    for (const Order order : kOrders) {
      describe("sparse_faults", {sizeof(Index), every}, order);
      Memory memory;
      std::vector<SparseTensor> tensors;
      uint64_t expected = 0, found = 0;
      for (const int64_t count : kSizes) {
        const int64_t size = 3 * count;
        auto* const indices = memory.take<Index>(count);
        for (int64_t i = 0; i < count; ++i) {
          indices[i] = static_cast<Index>(3 * i + below(3));
          const Index wrong[] = {-1, static_cast<Index>(size), std::numeric_limits<Index>::max(),
                                 std::numeric_limits<Index>::min(), i > 0 ? indices[i - 1] : Index(-7)};
          if (every && below(every) == 0) indices[i] = wrong[below(5)];
          expected += indices[i] < 0 || indices[i] >= size || (i > 0 && indices[i] <= indices[i - 1]);
        }
        tensors.push_back({nullptr, indices, nullptr, nullptr, count, size, 4});
      }
      const HostList<SparseTensor> list(tensors.data(), tensors.size(), &SparseTensor::count, kSparseChunk);
      run_blocks(SparseFaults<Index>{list.at(list.entries.data()), &found}, order);
      check(found == expected && (found > 0) == (every > 0), "another number of faults");
    }
}

// Where each chunk of a list belongs, and that offsets beyond 2^31 entries are right.
void test_lists() {
  context = "list";
  std::vector<GraftTensor> tensors(5);
  const int64_t sizes[] = {0, int64_t(5) << 31, 0, 1, 0};
  for (int i = 0; i < 5; ++i) tensors[i].size = sizes[i];
  const HostList<GraftTensor> list(tensors.data(), 5, &GraftTensor::size, kKeyChunk);
  const List<GraftTensor> listed = list.at(list.entries.data());
  const int64_t chunks = (int64_t(5) << 31) / kKeyChunk;
  check(listed.chunks == chunks + 1, "number of chunks");
  check(listed.find(0) == listed.entries + 1 && listed.find(chunks - 1) == listed.entries + 1 &&
            listed.find(chunks) == listed.entries + 3,
        "a chunk of another tensor");
  const auto* entry = listed.find(0);
  listed.advance(entry, chunks);
  check(entry == listed.entries + 3, "a step to another tensor");
  const KeyRanges ranges(listed);
  check(ranges.blocks() == kMaxRanges && ranges.begin(0) == 0 && ranges.begin(kMaxRanges) == listed.chunks,
        "ranges");
}

}  // namespace

int main() {
  test_pack_mask();
  test_lists();
  test_top_k_mask();
  test_sparse_apply<uint16_t, int32_t>();
  test_sparse_apply<uint32_t, int64_t>();
  test_sparse_apply<uint64_t, int32_t>();
  test_sparse_faults<int32_t>();
  test_sparse_faults<int64_t>();
  return report();
}

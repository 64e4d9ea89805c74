// Steps the streaming write of csrc/cuda/memory.cu on a host and compares it with plain loops.
// Exits with 1 on a failure.
#include <sys/mman.h>

#include <cuda/memory_stream.cuh>
#include <deque>
#include <limits>
#include <utility>

#include "cuda_checks.h"

using namespace engram;
using namespace engram::cuda;

namespace {

using Exact = long double;

// What a plan is made for: multiprocessors, and the bytes of shared memory that a block may have.
struct Device {
  int64_t multiprocessors, shared;
};

constexpr Device kH200 = {132, 227 << 10};

template <typename T>
struct Outcome {
  std::vector<T> precision_inverse, memory, readouts, leverages;
};

// The writes in the arithmetic of T, `chunk` rows at a time: with 1 a loop of rank-one updates.
template <typename T, typename Input>
Outcome<T> plain(const StreamShape& s, int64_t chunk, const std::vector<Input>& precision_inverse,
                 const std::vector<Input>& memory, const std::vector<Input>& weights,
                 const std::vector<Input>& latents) {
  Outcome<T> out{
      {precision_inverse.begin(), precision_inverse.end()}, {memory.begin(), memory.end()}, {}, {}};
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t row = 0; row < s.count; row += chunk) {
      const int64_t n = std::min(chunk, s.count - row);
      T* const p = out.precision_inverse.data() + b * s.slots * s.slots;
      T* const m = out.memory.data() + b * s.slots * s.width;
      const Input* const w = weights.data() + (b * s.count + row) * s.slots;
      const Input* const z = latents.data() + (b * s.count + row) * s.width;
      std::vector<T> u(n * s.slots, 0), error(z, z + n * s.width), system(n * n, 0);
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t i = 0; i < s.slots; ++i)
          for (int64_t j = 0; j < s.slots; ++j) u[t * s.slots + i] += p[i * s.slots + j] * w[t * s.slots + j];
        for (int64_t i = 0; i < s.slots; ++i)
          for (int64_t c = 0; c < s.width; ++c)
            error[t * s.width + c] -= w[t * s.slots + i] * m[i * s.width + c];
        system[t * n + t] = 1;
      }
      for (int64_t t = 0; t < n; ++t)
        for (int64_t r = 0; r < n; ++r)
          for (int64_t i = 0; i < s.slots; ++i) system[t * n + r] += w[t * s.slots + i] * u[r * s.slots + i];
      for (int64_t t = 0; t < n; ++t) {
        for (int64_t r = 0; r < t; ++r) {  // system, U^T and the errors, with what row r explains taken out
          const T factor = system[t * n + r] / system[r * n + r];
          for (int64_t k = 0; k < n; ++k) system[t * n + k] -= factor * system[r * n + k];
          for (int64_t i = 0; i < s.slots; ++i) u[t * s.slots + i] -= factor * u[r * s.slots + i];
          for (int64_t c = 0; c < s.width; ++c) error[t * s.width + c] -= factor * error[r * s.width + c];
        }
        const T pivot = system[t * n + t];
        for (int64_t i = 0; i < s.slots; ++i) {
          const T step = u[t * s.slots + i] / pivot;
          for (int64_t j = 0; j < s.slots; ++j) p[i * s.slots + j] -= step * u[t * s.slots + j];
          for (int64_t c = 0; c < s.width; ++c) m[i * s.width + c] += step * error[t * s.width + c];
        }
        for (int64_t c = 0; c < s.width; ++c)
          out.readouts.push_back(z[t * s.width + c] - error[t * s.width + c] / pivot);
        out.leverages.push_back(1 - 1 / pivot);
      }
    }
  return out;
}

// The blocks that share a memory.
template <typename T>
class Group {
 public:
  Group(const MemoryStream<T>& stream, int group, Order order)
      : stream_(stream), first_(group * stream.plan.members), members_(stream.plan.members) {
    std::iota(members_.begin(), members_.end(), 0);
    if (order == Order::reversed) std::reverse(members_.begin(), members_.end());
    if (order == Order::shuffled) std::shuffle(members_.begin(), members_.end(), generator);
    for (size_t i = 0; i < members_.size(); ++i) {
      blocks_.emplace_back(order);
      memory_.emplace_back(stream.plan.shared);
    }
  }

  // Runs a phase, which lies between two barriers of the grid, on one block after the other: the first is
  // then as far ahead of the last as a barrier allows.
  template <typename Phase>
  void run(const Phase& phase) {
    for (const int i : members_) {
      auto shared = stream_.share(first_ + i, reinterpret_cast<T*>(memory_[i].data()));
      phase(blocks_[i], stream_.member(first_ + i), shared);
    }
  }

 private:
  const MemoryStream<T>& stream_;
  int first_;
  std::vector<int> members_;
  std::deque<HostBlock<typename MemoryStream<T>::Registers>> blocks_;
  std::deque<Poisoned<char>> memory_;
};

template <typename T>
void run(const MemoryStream<T>& stream, Order order) {
  const StreamShape& shape = stream.shape;
  const StreamPlan& plan = stream.plan;
  for (int group = 0; group < plan.groups; ++group) {
    Group<T> blocks(stream, group, order);
    uint32_t turn = 0;
    const auto leave = [&](auto& block, const auto& member, int64_t b, uint32_t next, auto& shared) {
      stream.end(block, member, b, shared);
      if (b + plan.groups < shape.batch) stream.begin(block, member, b + plan.groups, next, shared);
    };
    blocks.run([&](auto& block, const auto& member, auto& shared) {
      stream.begin(block, member, group, turn, shared);
    });
    for (int64_t b = group; b < shape.batch; b += plan.groups) {
      for (int64_t row = 0; row < shape.count; row += StreamPlan::kWrites, ++turn)
        blocks.run([&](auto& block, const auto& member, auto& shared) {
          stream.write(block, member, b, row, turn, shared);
          if (row + StreamPlan::kWrites >= shape.count) leave(block, member, b, turn + 1, shared);
        });
      if (shape.count == 0)
        blocks.run(
            [&](auto& block, const auto& member, auto& shared) { leave(block, member, b, turn, shared); });
    }
  }
}

template <typename T>
double largest(const std::vector<T>& values) {
  double most = 0;
  for (const T& value : values) most = std::max<double>(most, std::abs(value));
  return most;
}

// NaN where an entry is NaN.
template <typename T>
double distance(const std::vector<T>& values, const std::vector<Exact>& exact) {
  double most = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const double apart = std::abs(values[i] - exact[i]);
    if (!(apart <= most)) most = apart;
  }
  return most;
}

// At most 1 + trace(W P W^T), for the eigenvalues of W P W^T are not negative; and P only falls.
template <typename T>
double condition_of_chunks(const StreamShape& s, const std::vector<T>& precision_inverse,
                           const std::vector<T>& weights) {
  double most = 1;
  for (int64_t b = 0; b < s.batch; ++b) {
    double trace = 0;
    for (int64_t n = 0; n < s.count; ++n) {
      if (n % StreamPlan::kWrites == 0) trace = 0;
      const T* const w = weights.data() + (b * s.count + n) * s.slots;
      for (int64_t i = 0; i < s.slots; ++i)
        for (int64_t j = 0; j < s.slots; ++j)
          trace += w[i] * precision_inverse[(b * s.slots + i) * s.slots + j] * w[j];
      most = std::max(most, 1 + trace);
    }
  }
  return most;
}

template <typename T>
void check_stream(const StreamShape& shape, const Device& device) {
  std::string name = std::string("memory_stream ") + name_of<T>();
  for (const int64_t number :
       {shape.batch, shape.slots, shape.width, shape.count, device.multiprocessors, device.shared})
    name += " " + std::to_string(number);
  context = name;
  const StreamPlan plan = stream_plan(shape, sizeof(T), device.multiprocessors, device.shared);
  check(plan.members > 0, "no plan");
  if (plan.members == 0) return;

  // P = I + R R^T / K for a random R, as far from a multiple of the identity as a memory that was written to.
  const int64_t slots = shape.slots;
  std::vector<T> precision_inverse(shape.batch * slots * slots, 0);
  for (int64_t b = 0; b < shape.batch; ++b) {
    const auto factor = random_values<T>(slots * 3);
    for (int64_t i = 0; i < slots; ++i)
      for (int64_t j = 0; j < slots; ++j) {
        T& entry = precision_inverse[(b * slots + i) * slots + j];
        entry = i == j;
        for (int k = 0; k < 3; ++k) entry += factor[i * 3 + k] * factor[j * 3 + k] / slots;
      }
  }
  const auto memory = random_values<T>(shape.batch * slots * shape.width);
  auto weights = random_values<T>(shape.batch * shape.count * slots);
  for (T& weight : weights) weight /= std::sqrt(static_cast<T>(slots));
  const auto latents = random_values<T>(shape.batch * shape.count * shape.width);
  const auto exact = plain<Exact>(shape, 1, precision_inverse, memory, weights, latents);
  const auto eager = plain<T>(shape, StreamPlan::kWrites, precision_inverse, memory, weights, latents);

  const double condition = condition_of_chunks(shape, precision_inverse, weights);

  Outcome<T> first;
  for (const Order order : kOrders) {
    context = name + " order " + std::to_string(static_cast<int>(order));
    const T poison = std::numeric_limits<T>::quiet_NaN();
    Outcome<T> got{std::vector<T>(precision_inverse.size(), poison), std::vector<T>(memory.size(), poison),
                   std::vector<T>(latents.size(), poison), std::vector<T>(shape.batch * shape.count, poison)};
    Poisoned<char> workspace(plan.workspace);
    const MemoryStream<T> stream{precision_inverse.data(),
                                 memory.data(),
                                 weights.data(),
                                 latents.data(),
                                 got.precision_inverse.data(),
                                 got.memory.data(),
                                 got.readouts.data(),
                                 got.leverages.data(),
                                 workspace.data(),
                                 shape,
                                 plan};
    run(stream, order);
    if (order != Order::forward) {
      check(same_bits(got.precision_inverse, first.precision_inverse) &&
                same_bits(got.memory, first.memory) && same_bits(got.readouts, first.readouts) &&
                same_bits(got.leverages, first.leverages),
            "the result depends on the order of threads or blocks");
      continue;
    }
    first = got;
    // Twice the error of the same formula in the same type. Where that is exact by chance, the roundings of a
    // row of a chunk, times the condition number of I + W U.
    const double rounding = StreamPlan::kWrites * (sizeof(T) == 4 ? 0x1p-24 : 0x1p-53) * condition;
    const auto close = [&](const auto& values, const auto& same, const auto& truth, const auto& before) {
      const double scale = std::max(largest(truth), largest(before));
      return distance(values, truth) <= 2 * distance(same, truth) + rounding * scale;
    };
    check(close(got.precision_inverse, eager.precision_inverse, exact.precision_inverse, precision_inverse),
          "P is not within rounding");
    check(close(got.memory, eager.memory, exact.memory, memory), "M is not within rounding");
    check(close(got.readouts, eager.readouts, exact.readouts, latents), "readouts are not within rounding");
    check(close(got.leverages, eager.leverages, exact.leverages, std::vector<T>{1}),
          "leverages are not within rounding");
  }
}

template <typename T>
void test_shapes() {
  const Device few = {3, 227 << 10}, one = {1, 227 << 10};
  for (const int64_t count : {0, 1, 16, 17, 37}) {
    check_stream<T>({1, 1, 1, count}, kH200);
    check_stream<T>({3, 5, 7, count}, few);
    check_stream<T>({3, 33, 1, count}, kH200);
    check_stream<T>({2, 8, 50, count}, one);
  }
  // More columns than threads fetch latents for at once; more parts of a Gram matrix than are on their way.
  check_stream<T>({1, 3, 90, 17}, one);
  check_stream<T>({1, 300, 4, 17}, kH200);
  // Several tiles of slots, the last of them short; more memories than groups; one block for all.
  check_stream<T>({1, 530, 9, 35}, {20, 227 << 10});
  check_stream<T>({7, 20, 30, 50}, {9, 227 << 10});
  check_stream<T>({7, 20, 30, 50}, one);
  // Columns that do not fit in shared memory, and too many for few blocks.
  const StreamPlan spilled = stream_plan({1, 70, 60, 33}, sizeof(T), 4, 99 << 10);
  const Device tight = {4, spilled.shared - 16};
  check(spilled.resident && !stream_plan({1, 70, 60, 33}, sizeof(T), 4, tight.shared).resident,
        "the columns do not fit by 16 bytes");
  check_stream<T>({1, 70, 60, 33}, tight);
  const int64_t each = 2 * StreamPlan::kWrites * sizeof(T);
  const int64_t fixed = spilled.shared - spilled.columns * (each + spilled.pitch * int64_t(sizeof(T)));
  const Device tighter = {6, fixed + 30 * each};
  check(stream_plan({3, 70, 60, 33}, sizeof(T), 6, tighter.shared).members == 5, "30 columns a block");
  check_stream<T>({3, 70, 60, 33}, tighter);
}

// A row that P takes for a negative square, as no positive definite P does: its leverage is above 1 or not
// finite, by which the caller knows.
template <typename T>
void test_indefinite() {
  for (const double gain : {-1.0, -3.0, double(NAN)}) {
    context = "memory_stream of an indefinite P";
    const StreamShape shape = {1, 1, 2, 3};
    const StreamPlan plan = stream_plan(shape, sizeof(T), kH200.multiprocessors, kH200.shared);
    const std::vector<T> p{static_cast<T>(gain)}, m(2, 1), w(3, 1), z(6, 2);
    std::vector<T> new_p(1), new_m(2), readouts(6), leverages(3, 0);
    Poisoned<char> workspace(plan.workspace);
    run<T>({p.data(), m.data(), w.data(), z.data(), new_p.data(), new_m.data(), readouts.data(),
            leverages.data(), workspace.data(), shape, plan},
           Order::forward);
    check(!std::isfinite(leverages[0]) || leverages[0] > 1, "the leverage does not tell");
  }
}

void test_plans() {
  context = "plan of 512 slots, 768 wide";
  const StreamPlan usual = stream_plan({1, 512, 768, 1024}, 4, kH200.multiprocessors, kH200.shared);
  check(usual.resident && usual.members == 128 && usual.groups == 1 && usual.columns == 10, "not resident");
  check(stream_plan({1, 512, 768, 1024}, 8, kH200.multiprocessors, kH200.shared).resident, "not in fp64");
  context = "plan of 4,096 slots, 4,096 wide";
  const StreamPlan large = stream_plan({1, 4096, 4096, 1024}, 4, kH200.multiprocessors, kH200.shared);
  check(!large.resident && large.members == 131 && large.workspace > int64_t(8192) * 4096 * 4, "resident");
  context = "plan of 1,000 small memories";
  const StreamPlan many = stream_plan({1000, 32, 64, 8}, 4, kH200.multiprocessors, kH200.shared);
  check(many.members == 1 && many.groups == 132 && many.resident, "not a block a memory");
  context = "plan of what no device can take";
  check(stream_plan({1, 64, 1 << 20, 1}, 8, 132, 99 << 10).members == 0, "too wide");
  check(stream_plan({1, 64, 64, 1}, 8, 132, 16 << 10).members == 0, "without shared memory");

  for (const int64_t batch : {1, 2, 5, 64, 131, 133, 5000})
    for (const int64_t slots : {1, 31, 64, 513, 4097})
      for (const int64_t width : {1, 100, 768, 5000})
        for (const int64_t element : {4, 8})
          for (const Device& device : {kH200, Device{108, 163 << 10}, Device{16, 99 << 10}}) {
            const StreamPlan plan =
                stream_plan({batch, slots, width, 1}, element, device.multiprocessors, device.shared);
            context = "plan " + std::to_string(batch) + " " + std::to_string(slots) + " " +
                      std::to_string(width) + " " + std::to_string(element) + " " +
                      std::to_string(device.multiprocessors);
            if (plan.members == 0) {
              check(device.multiprocessors == 16, "none");
              continue;
            }
            check(plan.blocks() <= device.multiprocessors, "blocks that would wait for ever");
            check(plan.groups <= batch && plan.shared <= device.shared, "more than there is");
            check(plan.members * plan.columns >= slots + width &&
                      (plan.members - 1) * plan.columns < slots + width,
                  "blocks without columns, or columns without a block");
          }
}

// Memories more than 2^31 elements apart, in memory of which only the touched pages exist.
void test_far_addresses() {
  const StreamShape shape = {(1 << 16) + 1, 256, 4, 3};
  const StreamPlan plan = stream_plan(shape, 4, 2, kH200.shared);
  const int64_t b = shape.batch - 1, square = 256 * 256, wide = 256 * 4;
  const size_t bytes = static_cast<size_t>(shape.batch) * (2 * square + 2 * wide + 3 * 256 + 2 * 12 + 3) * 4;
  void* const mapped =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) {
    std::printf("skipped: far addresses, no %zu bytes of address space\n", bytes);
    return;
  }
  context = "memories far apart";
  auto* next = static_cast<float*>(mapped);
  const auto take = [&](int64_t each) { return std::exchange(next, next + shape.batch * each); };
  float *const p = take(square), *const new_p = take(square), *const m = take(wide);
  float *const new_m = take(wide), *const weights = take(3 * 256), *const latents = take(12);
  float *const readouts = take(12), *const leverages = take(3);
  // An identity, and the same unit vector thrice: the gains are 1, 1/2, 1/3.
  for (int i = 0; i < 256; ++i) p[b * square + i * 257] = 1;
  for (int n = 0; n < 3; ++n) weights[(b * 3 + n) * 256 + 255] = 1;
  for (int i = 0; i < 12; ++i) latents[b * 12 + i] = 12;
  Poisoned<char> workspace(plan.workspace);
  const MemoryStream<float> stream{p,        m,         weights,          latents, new_p, new_m,
                                   readouts, leverages, workspace.data(), shape,   plan};
  Group<float> group(stream, 0, Order::forward);
  group.run(
      [&](auto& block, const auto& member, auto& shared) { stream.begin(block, member, b, 0, shared); });
  group.run([&](auto& block, const auto& member, auto& shared) {
    stream.write(block, member, b, 0, 0, shared);
    stream.end(block, member, b, shared);
  });
  bool right = std::abs(new_p[b * square + square - 1] - 0.25f) < 1e-6f && new_p[b * square] == 1;
  for (int c = 0; c < 4; ++c) right = right && std::abs(new_m[b * wide + wide - 1 - c] - 9) < 1e-5f;
  for (int n = 0; n < 3; ++n)
    right = right && std::abs(leverages[b * 3 + n] - 1.0f / (n + 2)) < 1e-6f &&
            std::abs(readouts[b * 12 + n * 4 + 3] - 12.0f * (n + 1) / (n + 2)) < 1e-5f;
  check(right, "a far memory was missed");
  munmap(mapped, bytes);
}

}  // namespace

int main() {
  test_shapes<float>();
  test_shapes<double>();
  test_indefinite<float>();
  test_indefinite<double>();
  test_plans();
  test_far_addresses();
  return report();
}

// Steps the kernels of csrc/cuda/low_rank.cu on a host and compares them with plain loops. Exits with 1 on a
// failure.
#include <sys/mman.h>

#include <cuda/apply_low_rank.cuh>
#include <cuda/residual_gram.cuh>
#include <cuda/small_solve.cuh>
#include <limits>

#include "cuda_checks.h"

using namespace engram;
using namespace engram::cuda;

namespace {

using Exact = long double;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// The unit roundoff of a type; half of the least positive f16.
template <typename T>
double roundoff() {
  if constexpr (std::is_same_v<T, BFloat16>) return 0x1p-8;
  if constexpr (std::is_same_v<T, Half>) return 0x1p-11;
  return sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
}
constexpr double kTiny = 0x1p-25;

struct Case {
  int64_t batch, rows, cols, rank;
  // Elements by which rows, matrices and the first element are displaced.
  int64_t row_padding = 0, batch_padding = 0, offset = 0;
};

const Case kCases[] = {
    {1, 0, 8, 3, 0, 0, 0},     {0, 4, 8, 3, 0, 0, 0},      {2, 4, 0, 3, 0, 0, 0},
    {2, 5, 9, 0, 0, 0, 0},     {1, 1, 1, 1, 0, 0, 0},      {1, 64, 128, 1, 0, 0, 0},
    {1, 64, 128, 16, 0, 0, 0}, {3, 65, 129, 7, 0, 0, 0},   {2, 63, 127, 17, 0, 0, 0},
    {2, 70, 136, 5, 8, 16, 0}, {1, 70, 136, 5, 1, 0, 0},   {2, 70, 136, 5, 0, 3, 0},
    {1, 33, 264, 33, 0, 0, 1}, {2, 21, 520, 64, 24, 0, 0}, {1, 37, 43, 128, 5, 0, 3},
    {1, 200, 40, 31, 8, 8, 8}, {1, 17000, 24, 3, 0, 0, 0}, {5, 6, 4100, 9, 12, 0, 0},
    {1, 2, 3000, 2, 0, 0, 0},
};

struct Layout {
  WeightShape shape;
  int64_t elements;
};

Layout layout(const Case& c) {
  const int64_t row_stride = c.cols + c.row_padding, batch_stride = c.rows * row_stride + c.batch_padding;
  return {{c.batch, c.rows, c.cols, batch_stride, row_stride}, c.batch * batch_stride + c.offset};
}

void describe(const char* kernel, const char* type, const Case& c, Order order) {
  context = std::string(kernel) + " " + type;
  for (const int64_t number : {c.batch, c.rows, c.cols, c.rank, c.row_padding, c.batch_padding, c.offset})
    context += " " + std::to_string(number);
  context += " order " + std::to_string(static_cast<int>(order));
}

template <typename Weight>
void test_apply_low_rank() {
  using Factor = Compute<Weight>;
  for (const Case& c : kCases) {
    const auto [shape, elements] = layout(c);
    const auto before = random_values<Weight>(elements);
    const auto left = random_values<Factor>(c.batch * c.rows * c.rank);
    const auto right = random_values<Factor>(c.batch * c.rank * c.cols);
    const double scale = static_cast<Factor>(-0.7);
    std::vector<Weight> first;
    for (const Order order : kOrders) {
      describe("apply_low_rank", name_of<Weight>(), c, order);
      auto weight = before;
      const LowRankUpdate<Weight> update(weight.data() + c.offset, shape, left.data(), right.data(), c.rank,
                                         scale);
      run_blocks(update, order);
      if (order != Order::forward) {
        check(same_bits(weight, first), "the result depends on the order of threads");
        continue;
      }
      first = weight;
      auto others = weight;
      bool close = true;
      for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t i = 0; i < c.rows; ++i)
          for (int64_t j = 0; j < c.cols; ++j) {
            const int64_t at = c.offset + b * shape.batch_stride + i * shape.row_stride + j;
            Exact sum = 0, size = std::abs(widen(before[at]));
            for (int64_t k = 0; k < c.rank; ++k) {
              const Exact product =
                  scale * Exact(left[(b * c.rows + i) * c.rank + k]) * right[(b * c.rank + k) * c.cols + j];
              sum += product;
              size += std::abs(product);
            }
            const Exact exact = widen(before[at]) + sum;
            const Exact bound = (c.rank + 3) * roundoff<Factor>() * size +
                                roundoff<Weight>() * std::abs(exact) + (sizeof(Weight) == 2 ? kTiny : 0);
            close = close && std::abs(widen(weight[at]) - exact) <= bound;
            others[at] = before[at];
          }
      check(close, "not within rounding of the exact result");
      check(same_bits(others, before), "wrote outside of the matrix");
    }
  }
}

template <typename Matrix, typename Key, typename Sum>
void check_dots(const Case& c, const WeightShape& shape, const Matrix* matrix, const Key* keys,
                const std::vector<Sum>& values, bool subtract) {
  std::vector<Sum> first;
  for (const Order order : kOrders) {
    describe(subtract ? "residual" : "gram", name_of<Matrix>(), c, order);
    std::vector<Sum> result(c.batch * c.rank * shape.rows, static_cast<Sum>(kNaN));
    const RowDots<Matrix, Key, Sum> dots(matrix, shape, keys, subtract ? values.data() : nullptr,
                                         result.data(), c.rank);
    run_blocks(dots, order);
    if (order != Order::forward) {
      check(same_bits(result, first), "the result depends on the order of threads");
      continue;
    }
    first = result;
    bool close = true;
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t k = 0; k < c.rank; ++k)
        for (int64_t i = 0; i < shape.rows; ++i) {
          const int64_t at = (b * c.rank + k) * shape.rows + i;
          Exact dot = 0, size = subtract ? std::abs(values[at]) : Sum(0);
          for (int64_t j = 0; j < shape.cols; ++j) {
            const Exact product = Exact(keys[(b * c.rank + k) * shape.cols + j]) *
                                  widen(matrix[b * shape.batch_stride + i * shape.row_stride + j]);
            dot += product;
            size += std::abs(product);
          }
          const Exact exact = subtract ? values[at] - dot : dot;
          close = close && std::abs(result[at] - exact) <= (shape.cols + 2) * roundoff<Sum>() * size;
        }
    check(close, "not within rounding of the exact result");
  }
}

template <typename Weight>
void test_residual_gram() {
  using Key = Compute<Weight>;
  for (const Case& c : kCases) {
    const auto [shape, elements] = layout(c);
    const auto weight = random_values<Weight>(elements);
    const auto keys = random_values<Key>(c.batch * c.rank * c.cols + c.offset);
    const auto values = random_values<Key>(c.batch * c.rank * c.rows);
    const auto preconditioned = random_values<double>(c.batch * c.rank * c.cols);
    const WeightShape square = {c.batch, c.rank, c.cols, c.rank * c.cols, c.cols};
    check_dots<Weight, Key, Key>(c, shape, weight.data() + c.offset, keys.data() + c.offset, values, true);
    check_dots<double, Key, double>(c, square, preconditioned.data(), keys.data() + c.offset, {}, false);
  }
}

// A system of the kind, with NaN wherever it must not be read; `full` is the matrix that it stands for.
std::vector<double> random_system(SystemKind kind, int64_t n, double condition, std::vector<double>& full) {
  std::vector<double> system(n * n, kNaN);
  full.assign(n * n, 0);
  if (kind == SystemKind::cholesky) {
    // A product of random reflections around eigenvalues from 1 down to 1 / condition.
    for (int64_t i = 0; i < n; ++i) full[i * n + i] = std::pow(condition, n > 1 ? -double(i) / (n - 1) : 0);
    for (int reflection = 0; reflection < 4; ++reflection) {
      std::vector<double> axis(n), image(n, 0);
      double square = 0, inner = 0;
      for (double& a : axis) square += (a = normal(), a * a);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) image[i] += full[i * n + j] * axis[j] * 2 / square;
      for (int64_t i = 0; i < n; ++i) inner += axis[i] * image[i];
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j)
          full[i * n + j] += 2 * inner / square * axis[i] * axis[j] - axis[i] * image[j] - image[i] * axis[j];
    }
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double& value = full[i * n + j];
      if (kind == SystemKind::cholesky) {
        if (j > i) continue;
        full[j * n + i] = value;
      } else {
        const bool inside = kind == SystemKind::unit_lower ? j < i : j > i;
        value = i == j ? 1 : inside ? normal() / std::sqrt(double(n)) : 0;
        if (!inside) continue;
      }
      system[i * n + j] = value;
    }
  return system;
}

template <typename Value>
void run_solve(const SmallSolve<Value>& solve, Order order) {
  for (int64_t i = 0; i < solve.blocks(); ++i) {
    HostBlock<typename SmallSolve<Value>::Registers> block(order);
    Poisoned<double> shared(SmallSolve<Value>::shared_bytes(solve.n) / sizeof(double));
    solve.run(block, i, solve.tiles(), shared.data());
  }
}

template <typename Value>
void check_solve(SystemKind kind, int64_t batch, int64_t n, int64_t columns, double condition) {
  std::vector<double> systems, fulls;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<double> full;
    const auto system = random_system(kind, n, condition, full);
    systems.insert(systems.end(), system.begin(), system.end());
    fulls.insert(fulls.end(), full.begin(), full.end());
  }
  const auto rhs = random_values<Value>(batch * n * columns);
  std::vector<Value> first;
  for (const Order order : kOrders) {
    describe("small_solve", name_of<Value>(), {batch, n, columns, static_cast<int>(kind)}, order);
    std::vector<Value> solution(rhs.size(), static_cast<Value>(kNaN));
    std::vector<int32_t> info(batch, -1);
    run_solve<Value>(
        {systems.data(), rhs.data(), kind, static_cast<int>(n), batch, columns, solution.data(), info.data()},
        order);
    check(info == std::vector<int32_t>(batch, 0), "info is not 0");
    if (order != Order::forward) {
      check(same_bits(solution, first), "the result depends on the order of threads");
      continue;
    }
    first = solution;
    auto in_place = rhs;
    run_solve<Value>({systems.data(), in_place.data(), kind, static_cast<int>(n), batch, columns,
                      in_place.data(), info.data()},
                     order);
    check(same_bits(in_place, solution), "in place differs");
    // Each column must solve exactly a system that differs by rounding: no condition number enters.
    bool close = true;
    for (int64_t b = 0; b < batch; ++b) {
      const double* const full = fulls.data() + b * n * n;
      double system_size = 0;
      for (int64_t i = 0; i < n * n; ++i) system_size = std::max(system_size, std::abs(full[i]));
      for (int64_t c = 0; c < columns; ++c) {
        double largest = 0;
        for (int64_t i = 0; i < n; ++i)
          largest = std::max<double>(largest, std::abs(solution[(b * n + i) * columns + c]));
        for (int64_t i = 0; i < n; ++i) {
          Exact image = 0;
          for (int64_t j = 0; j < n; ++j)
            image += Exact(full[i * n + j]) * solution[(b * n + j) * columns + c];
          const Exact bound = n * (4 * n * roundoff<double>() + roundoff<Value>()) * system_size * largest;
          close = close && std::abs(image - rhs[(b * n + i) * columns + c]) <= bound;
        }
      }
    }
    check(close, "not the solution");
  }
}

template <typename Value>
void test_small_solve() {
  for (const SystemKind kind : {SystemKind::cholesky, SystemKind::unit_lower, SystemKind::unit_upper}) {
    for (const int64_t n : {0, 1, 2, 7, 33, 64, 128})
      for (const int64_t columns : {0, 1, 33}) check_solve<Value>(kind, 1 + columns % 2, n, columns, 100);
    check_solve<Value>(kind, 0, 5, 3, 1);
  }
  check_solve<Value>(SystemKind::cholesky, 2, 64, 40, 1e8);
  check_solve<Value>(SystemKind::cholesky, 1, 128, 40, 1e12);

  // The second of three systems loses its definiteness at a given order, by a negative, zero, NaN or infinite
  // pivot.
  for (const double bad : {-1.0, -0.0, kNaN, double(INFINITY)})
    for (const int order_of_minor : {1, 4, 9})
      for (const Order order : kOrders) {
        const int64_t n = 9, columns = 35;
        describe("small_solve, indefinite", name_of<Value>(), {3, n, columns, order_of_minor}, order);
        std::vector<double> systems(3 * n * n, 0);
        for (int64_t i = 0; i < 3 * n; ++i) systems[i * n + i % n] = 2;
        systems[n * n + (order_of_minor - 1) * (n + 1)] = bad;
        std::vector<Value> rhs(3 * n * columns, 1), solution(rhs.size(), 0);
        std::vector<int32_t> info(3, -1);
        run_solve<Value>({systems.data(), rhs.data(), SystemKind::cholesky, static_cast<int>(n), 3, columns,
                          solution.data(), info.data()},
                         order);
        check(info == std::vector<int32_t>({0, order_of_minor, 0}), "info does not name the minor");
        bool right = true;
        for (int64_t i = 0; i < 3 * n * columns; ++i)
          right = right && (i / (n * columns) == 1 ? std::isnan(solution[i]) : solution[i] == Value(0.5));
        check(right, "NaN where and only where the system failed");
      }

  // Singular but for rounding: the second pivot is positive, and nothing of it is known.
  describe("small_solve, singular but for rounding", name_of<Value>(), {1, 2, 1, 0}, Order::forward);
  const std::vector<double> nearly{1, 0, 1, 1 + 0x1p-52};
  std::vector<Value> rhs(2, 1), solution(2, 0);
  std::vector<int32_t> info(1, -1);
  run_solve<Value>({nearly.data(), rhs.data(), SystemKind::cholesky, 2, 1, 1, solution.data(), info.data()},
                   Order::forward);
  check(info[0] == 2 && std::isnan(solution[0]), "a pivot lost to rounding passes");
}

// Rows and matrices more than 2^31 elements apart, in memory of which only the touched pages exist.
void test_far_addresses() {
  const int64_t far = (int64_t(1) << 31) + 8;
  const size_t bytes = static_cast<size_t>(far + 64) * 3 * sizeof(BFloat16);
  void* const memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::printf("skipped: far addresses, no %zu bytes of address space\n", bytes);
    return;
  }
  auto* const weight = static_cast<BFloat16*>(memory);
  const float left[3] = {1, 2, 3};
  for (const bool by_batch : {false, true}) {
    context = by_batch ? "matrices far apart" : "rows far apart";
    const WeightShape shape = by_batch ? WeightShape{3, 1, 16, far, 16} : WeightShape{1, 3, 16, 3 * far, far};
    std::vector<float> right(48, 1), keys(48, 1), values(3, 0), residual(3, float(kNaN));
    for (int i = 0; i < 3; ++i) std::fill_n(weight + i * far, 16, element<BFloat16>(1));
    run_blocks(LowRankUpdate<BFloat16>(weight, shape, left, right.data(), 1, 1.0), Order::forward);
    run_blocks(RowDots<BFloat16, float, float>(weight, shape, keys.data(), values.data(), residual.data(), 1),
               Order::forward);
    for (int i = 0; i < 3; ++i) {
      bool right_values = residual[i] == -16.0f * (2 + i);
      for (int j = 0; j < 16; ++j) right_values = right_values && widen(weight[i * far + j]) == 2 + i;
      check(right_values, "a far row was missed");
    }
  }
  munmap(memory, bytes);

  // Grids of large shapes are launchable: a launch takes 2^31 - 1 blocks.
  context = "grid";
  const int64_t million = 1 << 20, limit = std::numeric_limits<int32_t>::max();
  const WeightShape large = {1, million, million, million * million, million};
  const LowRankUpdate<float> update(nullptr, large, nullptr, nullptr, 64, 1.0);
  const RowDots<float, float, float> dots(nullptr, large, nullptr, nullptr, nullptr, 64);
  check(update.blocks() == million / 64 * (million / 64) && update.blocks() <= limit,
        "blocks of apply_low_rank");
  check(dots.slices == 1 && dots.blocks() == million / 64 * 8 && dots.blocks() <= limit,
        "blocks of residual_gram");
  const RowDots<float, float, float> small(nullptr, {1, 64, 4096, 0, 4096}, nullptr, nullptr, nullptr, 1);
  check(small.slices == kWarps && small.blocks() == 8, "few rows are shared by all warps of a block");
}

// Every 16-bit value survives the way through fp32; midpoints between neighbours go to the even one.
template <typename T>
void test_conversions(uint16_t infinity) {
  context = std::string("conversions of ") + name_of<T>();
  bool same = true, nearest = true;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T value = {static_cast<uint16_t>(bits)};
    const uint16_t magnitude = bits & 0x7fff;
    T back;
    narrow(widen(value), back);
    same = same && (magnitude > infinity ? std::isnan(widen(value)) && (back.bits & 0x7fff) > infinity
                                         : back.bits == value.bits);
    if (magnitude >= infinity) continue;
    const T next = {static_cast<uint16_t>(bits + 1)}, even = {static_cast<uint16_t>((bits + 1) & ~1u)};
    // The step over the largest number ends where the exponents do, not in infinity.
    const double end = magnitude + 1 == infinity ? std::ldexp(1.0, std::is_same_v<T, Half> ? 16 : 128)
                                                 : std::abs(widen(next));
    const double middle = (std::abs(widen(value)) + end) / 2;
    const float sign = bits & 0x8000 ? -1.0f : 1.0f;
    T below, at, above;
    narrow(sign * std::nextafter(static_cast<float>(middle), 0.0f), below);
    narrow(sign * static_cast<float>(middle), at);
    narrow(sign * std::nextafter(static_cast<float>(middle), INFINITY), above);
    nearest = nearest && below.bits == value.bits && at.bits == even.bits && above.bits == next.bits;
  }
  check(same, "a value changed on the way through fp32");
  check(nearest, "not rounded to the nearest, ties to even");
}

template <typename Weight>
void test_weights() {
  test_apply_low_rank<Weight>();
  test_residual_gram<Weight>();
}

}  // namespace

int main() {
  test_conversions<BFloat16>(0x7f80);
  test_conversions<Half>(0x7c00);
  test_weights<float>();
  test_weights<BFloat16>();
  test_weights<Half>();
  test_weights<double>();
  test_small_solve<float>();
  test_small_solve<double>();
  test_far_addresses();
  return report();
}

// Prints launch configurations of csrc/cuda, for test_launch.py: a line of numbers for each line that is
// read.
#include <cuda/apply_low_rank.cuh>
#include <cuda/residual_gram.cuh>
#include <cuda/small_solve.cuh>
#include <cuda/stream_plan.cuh>
#include <iostream>
#include <string>

using namespace engram;
using namespace engram::cuda;

namespace {

int64_t number() {
  int64_t value = 0;
  std::cin >> value;
  return value;
}

// Batch, rows, columns, rank: blocks, the rows and columns of a tile, bytes of shared memory.
template <typename Weight>
void update() {
  using Update = LowRankUpdate<Weight>;
  const int64_t batch = number(), rows = number(), cols = number(), rank = number();
  const Update plan(nullptr, {batch, rows, cols, rows * cols, cols}, nullptr, nullptr, rank, 1.0, nullptr);
  std::cout << plan.blocks() << ' ' << Update::kTileRows << ' ' << Update::kTileCols << ' '
            << sizeof(typename Update::Shared) << '\n';
}

// Batch, rows, columns, keys: blocks, the rows and keys of a tile, warps that share rows, bytes.
void residual() {
  using Residual = RowDots<BFloat16, float, float>;
  const int64_t batch = number(), rows = number(), cols = number(), count = number();
  const Residual plan(nullptr, {batch, rows, cols, rows * cols, cols}, nullptr, nullptr, nullptr, count);
  std::cout << plan.blocks() << ' ' << plan.tile_rows << ' ' << Residual::kKeys << ' ' << plan.slices << ' '
            << sizeof(Residual::Shared) << '\n';
}

// Batch, order, columns: blocks, the columns of a tile, bytes.
void solve() {
  const int64_t batch = number(), order = number(), columns = number();
  const SmallSolve<float> plan{
      nullptr, nullptr, SystemKind::cholesky, static_cast<int>(order), batch, columns, nullptr, nullptr};
  std::cout << plan.blocks() << ' ' << SmallSolve<float>::kTileCols << ' '
            << SmallSolve<float>::shared_bytes(order) << '\n';
}

// Batch, slots, width, bytes an element, multiprocessors, bytes of shared memory: members, groups, columns,
// whether they stay in shared memory, bytes of it, bytes of workspace.
void stream() {
  const int64_t batch = number(), slots = number(), width = number();
  const int64_t element = number(), multiprocessors = number(), shared = number();
  const StreamPlan plan = stream_plan({batch, slots, width, 1024}, element, multiprocessors, shared);
  std::cout << plan.members << ' ' << plan.groups << ' ' << plan.columns << ' ' << plan.resident << ' '
            << plan.shared << ' ' << plan.workspace << '\n';
}

}  // namespace

int main() {
  for (std::string what; std::cin >> what;) {
    if (what == "update-bf16") update<BFloat16>();
    if (what == "update-fp32") update<float>();
    if (what == "residual") residual();
    if (what == "solve") solve();
    if (what == "stream") stream();
  }
}

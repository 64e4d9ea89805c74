// Launchers of the associative write's kernels: they choose types, and launch grids that depend on shapes
// alone.
#include "all_finite.cuh"
#include "apply_low_rank.cuh"
#include "engram/low_rank.h"
#include "launch.cuh"
#include "residual_gram.cuh"
#include "small_solve.cuh"

namespace engram::cuda {
namespace {

template <typename Value>
__global__ void __launch_bounds__(kThreads) all_finite_kernel(AllFinite<Value> look) {
  look.run(blockIdx.x);
}

template <typename Weight>
__global__ void __launch_bounds__(kThreads, LowRankUpdate<Weight>::kBlocks)
    apply_low_rank_kernel(LowRankUpdate<Weight> update) {
  __shared__ typename LowRankUpdate<Weight>::Shared shared;
  update.run(blockIdx.x, shared);
}

// The few blocks of the Gram matrix come first: they take longest.
template <typename Residual, typename Gram>
__global__ void __launch_bounds__(kThreads, 2)
    residual_gram_kernel(Residual residual, Gram gram, int gram_blocks) {
  __shared__ union {
    typename Residual::Shared residual;
    typename Gram::Shared gram;
  } shared;
  if (static_cast<int>(blockIdx.x) < gram_blocks) {
    gram.run(blockIdx.x, shared.gram);
  } else {
    residual.run(blockIdx.x - gram_blocks, shared.residual);
  }
}

template <typename Value>
__global__ void __launch_bounds__(kThreads, 2) small_solve_kernel(SmallSolve<Value> solve, int column_tiles) {
  extern __shared__ double shared[];
  solve.run(blockIdx.x, column_tiles, shared);
}

// 99 KB a block is what the smallest devices of compute capability 8.0 and later allow.
static_assert(SmallSolve<double>::shared_bytes(SmallSolve<double>::kLimit) <= 99 * 1024);

// Calls function(T*) with a null pointer of the weight's element type.
template <typename Function>
int with_type(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::f32:
      return function(static_cast<float*>(nullptr));
    case DType::bf16:
      return function(static_cast<BFloat16*>(nullptr));
    case DType::f16:
      return function(static_cast<Half*>(nullptr));
    case DType::f64:
      return function(static_cast<double*>(nullptr));
  }
  return cudaErrorInvalidValue;
}

template <typename Value>
int solve(const SmallSolve<Value>& arguments, void* stream) {
  return launch(small_solve_kernel<Value>, arguments.blocks(), SmallSolve<Value>::shared_bytes(arguments.n),
                stream, arguments, static_cast<int>(arguments.tiles()));
}

}  // namespace

int apply_low_rank(void* weight, DType dtype, WeightShape shape, const void* left, const void* right,
                   int64_t rank, double scale, int32_t* refused, void* stream) {
  return with_type(dtype, [&](auto* type) -> int {
    using Weight = std::remove_pointer_t<decltype(type)>;
    using Factor = Compute<Weight>;
    const auto *l = static_cast<const Factor*>(left), *r = static_cast<const Factor*>(right);
    if (refused) {
      const AllFinite<Factor> look{l, shape.batch * shape.rows * rank, r, shape.batch * rank * shape.cols,
                                   refused};
      if (const int error = cudaMemsetAsync(refused, 0, sizeof(*refused), static_cast<cudaStream_t>(stream)))
        return error;
      if (const int error = launch(all_finite_kernel<Factor>, look.blocks(), 0, stream, look)) return error;
    }
    const LowRankUpdate<Weight> update(static_cast<Weight*>(weight), shape, l, r, rank, scale, refused);
    return launch(apply_low_rank_kernel<Weight>, update.blocks(), 0, stream, update);
  });
}

int residual_gram(const void* weight, DType dtype, WeightShape shape, const void* keys, const void* values,
                  const double* preconditioned, int64_t count, void* residual, double* gram, void* stream) {
  return with_type(dtype, [&](auto* type) {
    using Weight = std::remove_pointer_t<decltype(type)>;
    using Key = Compute<Weight>;
    using Residual = RowDots<Weight, Key, Key>;
    using Gram = RowDots<double, Key, double>;
    const auto* key = static_cast<const Key*>(keys);
    const Residual residuals(static_cast<const Weight*>(weight), shape, key, static_cast<const Key*>(values),
                             static_cast<Key*>(residual), count);
    const WeightShape rows = {shape.batch, count, shape.cols, count * shape.cols, shape.cols};
    const Gram products(preconditioned, rows, key, nullptr, gram, count);
    const int64_t blocks = residuals.blocks() + products.blocks();
    return launch(residual_gram_kernel<Residual, Gram>, blocks, 0, stream, residuals, products,
                  static_cast<int>(products.blocks()));
  });
}

int small_solve(const double* system, const void* rhs, bool rhs_is_double, SystemKind kind, int64_t batch,
                int64_t n, int64_t columns, void* solution, int32_t* info, void* stream) {
  if (n > small_solve_limit()) return cudaErrorInvalidValue;
  const int order = static_cast<int>(n);
  if (rhs_is_double)
    return solve<double>({system, static_cast<const double*>(rhs), kind, order, batch, columns,
                          static_cast<double*>(solution), info},
                         stream);
  return solve<float>({system, static_cast<const float*>(rhs), kind, order, batch, columns,
                       static_cast<float*>(solution), info},
                      stream);
}

int64_t small_solve_limit() { return SmallSolve<double>::kLimit; }

}  // namespace engram::cuda

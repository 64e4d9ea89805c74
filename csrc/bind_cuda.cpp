// Python module `_cuda`. Pointers and streams come as integers: tensors, and the checks of their shapes, stay
// in Python. Nothing here touches the driver before it is called: the module imports without a GPU. A launch
// lets other threads of Python run: where the queue is full it waits, perhaps for what itself waits for them.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "cuda/error.h"
#include "engram/low_rank.h"
#include "engram/memory.h"

namespace py = pybind11;
using engram::DType;
using engram::StreamShape;
using engram::SystemKind;
using engram::WeightShape;

static void check(int code, const char* name) {
  if (code == 0) return;
  throw std::runtime_error(std::string(name) + ": the launch failed: " + engram::cuda::error_string(code));
}

static std::optional<std::string> runtime_error() {
  const int code = engram::cuda::runtime_error();
  return code == 0 ? std::nullopt : std::optional<std::string>(engram::cuda::error_string(code));
}

// Why no kernel runs on the current device, or nothing.
static std::optional<std::string> probe() {
  const int code = engram::cuda::probe();
  return code == 0 ? std::nullopt : std::optional<std::string>(engram::cuda::error_string(code));
}

static py::dict build_info() {
  py::dict info;
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  // CUDA 13 serves drivers from 580 on, every CUDA 12 those from 525 on, but compiles PTX with its own alone.
  info["driver"] = CUDART_VERSION >= 13000 ? ">= 580" : ">= 525";
  info["archs"] = ENGRAM_CUDA_ARCHS;
  info["ptxas"] = ENGRAM_PTXAS;
  info["compiler"] = ENGRAM_COMPILER;
  return info;
}

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA C++ kernels.";
  module.def("build_info", build_info);
  module.def("runtime_error", runtime_error);
  module.def("probe", probe);
  module.def("small_solve_limit", engram::cuda::small_solve_limit);

  module.def("apply_low_rank", [](uintptr_t weight, int dtype, int64_t batch, int64_t rows, int64_t cols,
                                  int64_t batch_stride, int64_t row_stride, uintptr_t left, uintptr_t right,
                                  int64_t rank, double scale, uintptr_t refused, uintptr_t stream) {
    py::gil_scoped_release release;
    check(engram::cuda::apply_low_rank(pointer<void>(weight), static_cast<DType>(dtype),
                                       WeightShape{batch, rows, cols, batch_stride, row_stride},
                                       pointer<const void>(left), pointer<const void>(right), rank, scale,
                                       pointer<int32_t>(refused), pointer<void>(stream)),
          "apply_low_rank");
  });

  module.def("residual_gram", [](uintptr_t weight, int dtype, int64_t batch, int64_t rows, int64_t cols,
                                 int64_t batch_stride, int64_t row_stride, uintptr_t keys, uintptr_t values,
                                 uintptr_t preconditioned, int64_t count, uintptr_t residual, uintptr_t gram,
                                 uintptr_t stream) {
    py::gil_scoped_release release;
    check(engram::cuda::residual_gram(pointer<const void>(weight), static_cast<DType>(dtype),
                                      WeightShape{batch, rows, cols, batch_stride, row_stride},
                                      pointer<const void>(keys), pointer<const void>(values),
                                      pointer<const double>(preconditioned), count, pointer<void>(residual),
                                      pointer<double>(gram), pointer<void>(stream)),
          "residual_gram");
  });

  module.def("small_solve", [](uintptr_t system, uintptr_t rhs, bool rhs_is_double, int kind, int64_t batch,
                               int64_t n, int64_t columns, uintptr_t solution, uintptr_t info,
                               uintptr_t stream) {
    py::gil_scoped_release release;
    check(engram::cuda::small_solve(pointer<const double>(system), pointer<const void>(rhs), rhs_is_double,
                                    static_cast<SystemKind>(kind), batch, n, columns, pointer<void>(solution),
                                    pointer<int32_t>(info), pointer<void>(stream)),
          "small_solve");
  });

  module.def("pack_mask", [](uintptr_t mask, int64_t size, uintptr_t packed, uintptr_t stream) {
    py::gil_scoped_release release;
    check(engram::cuda::pack_mask(pointer<const uint8_t>(mask), size, pointer<uint8_t>(packed),
                                  pointer<void>(stream)),
          "pack_mask");
  });

  module.def("top_k_workspace", engram::cuda::top_k_workspace);
  module.def("top_k_mask",
             [](const GraftRows& rows, int64_t k, uintptr_t workspace, uintptr_t invalid, uintptr_t stream) {
               const auto tensors = graft_tensors(rows);
               py::gil_scoped_release release;
               check(engram::cuda::top_k_mask(tensors.data(), tensors.size(), k, pointer<void>(workspace),
                                              pointer<int64_t>(invalid), pointer<void>(stream)),
                     "top_k_mask");
             });

  module.def("sparse_workspace", engram::cuda::sparse_workspace);
  module.def("sparse_list", [](const SparseRows& rows, uintptr_t workspace, uintptr_t stream) {
    const auto tensors = sparse_tensors(rows);
    int64_t chunks = 0;
    py::gil_scoped_release release;
    check(engram::cuda::sparse_list(tensors.data(), tensors.size(), pointer<void>(workspace), &chunks,
                                    pointer<void>(stream)),
          "sparse_list");
    return chunks;
  });
  module.def("sparse_faults", [](uintptr_t list, int64_t count, int64_t chunks, bool wide_indices,
                                 uintptr_t faults, uintptr_t stream) {
    py::gil_scoped_release release;
    check(engram::cuda::sparse_faults(pointer<const void>(list), count, chunks, wide_indices,
                                      pointer<int64_t>(faults), pointer<void>(stream)),
          "sparse_faults");
  });
  module.def("sparse_apply", [](uintptr_t list, int64_t count, int64_t chunks, bool wide_indices,
                                uintptr_t faults, uintptr_t stream) {
    py::gil_scoped_release release;
    check(engram::cuda::sparse_apply(pointer<const void>(list), count, chunks, wide_indices,
                                     pointer<const int64_t>(faults), pointer<void>(stream)),
          "sparse_apply");
  });

  module.def("memory_stream_workspace",
             [](int dtype, int64_t batch, int64_t slots, int64_t width, int64_t count) {
               return engram::cuda::memory_stream_workspace(static_cast<DType>(dtype),
                                                            StreamShape{batch, slots, width, count});
             });
  module.def(
      "memory_stream", [](uintptr_t precision_inverse, uintptr_t memory, uintptr_t weights, uintptr_t latents,
                          int dtype, int64_t batch, int64_t slots, int64_t width, int64_t count,
                          uintptr_t new_precision_inverse, uintptr_t new_memory, uintptr_t readouts,
                          uintptr_t leverages, uintptr_t workspace, uintptr_t stream) {
        py::gil_scoped_release release;
        const int code = engram::cuda::memory_stream(
            pointer<const void>(precision_inverse), pointer<const void>(memory), pointer<const void>(weights),
            pointer<const void>(latents), static_cast<DType>(dtype), StreamShape{batch, slots, width, count},
            pointer<void>(new_precision_inverse), pointer<void>(new_memory), pointer<void>(readouts),
            pointer<void>(leverages), pointer<void>(workspace), pointer<void>(stream));
        // A part of a device may say only now that it has not room for all blocks at once.
        if (code == cudaErrorCooperativeLaunchTooLarge || code == cudaErrorNotSupported) return false;
        check(code, "memory_stream");
        return true;
      });
}

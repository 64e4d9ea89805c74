// Python module `_cpu`. Pointers come as integers: tensors, and the checks of their shapes, stay in Python.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"
#include "engram/rank_one.h"

namespace py = pybind11;
using engram::DType;
using engram::WeightShape;

template <class T>
static T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

static py::dict build_info() {
  py::dict info;
  info["compiler"] = ENGRAM_COMPILER;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
#ifdef ENGRAM_X86
  info["isa_compiled"] = py::make_tuple("baseline", "avx2", "avx512");
#else
  info["isa_compiled"] = py::make_tuple("baseline");
#endif
  info["isa"] = engram::cpu::isa_name(engram::cpu::isa());
  return info;
}

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "C++ kernels for CPUs.";
  module.def("build_info", build_info);

  module.def("apply_low_rank", [](uintptr_t weight, int dtype, int64_t batch, int64_t rows, int64_t cols,
                                  int64_t batch_stride, int64_t row_stride, uintptr_t left, uintptr_t right,
                                  int64_t rank, double scale, int threads) {
    py::gil_scoped_release release;
    engram::cpu::apply_low_rank(pointer<void>(weight), static_cast<DType>(dtype),
                                WeightShape{batch, rows, cols, batch_stride, row_stride},
                                pointer<const void>(left), pointer<const void>(right), rank, scale, threads);
  });

  module.def("residual_gram",
             [](uintptr_t weight, int dtype, int64_t batch, int64_t rows, int64_t cols, int64_t batch_stride,
                int64_t row_stride, uintptr_t keys, uintptr_t values, uintptr_t preconditioned, int64_t count,
                uintptr_t residual, uintptr_t gram, int threads) {
               py::gil_scoped_release release;
               engram::cpu::residual_gram(pointer<const void>(weight), static_cast<DType>(dtype),
                                          WeightShape{batch, rows, cols, batch_stride, row_stride},
                                          pointer<const void>(keys), pointer<const void>(values),
                                          pointer<const double>(preconditioned), count,
                                          pointer<void>(residual), pointer<double>(gram), threads);
             });
}

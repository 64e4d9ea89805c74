// Python module `_cpu`. Pointers come as integers: tensors, and the checks of their shapes, stay in Python.
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind.h"
#include "cpu/isa.h"
#include "cpu/threads.h"
#include "engram/low_rank.h"
#include "engram/memory.h"
#include "engram/pages.h"
#include "engram/ridge.h"

namespace py = pybind11;
using engram::DType;
using engram::RidgeShape;
using engram::StreamShape;
using engram::WeightShape;

// Lists that stay in C++ from one call to the next.
struct GraftList {
  std::vector<engram::GraftTensor> tensors;

  void set_gradients(const std::vector<uintptr_t>& addresses) {
    for (size_t i = 0; i < tensors.size(); ++i) tensors[i].gradient = pointer<const void>(addresses.at(i));
  }
};

struct SparseList {
  std::vector<engram::SparseTensor> tensors;
};

static py::dict build_info() {
  py::dict info;
  info["compiler"] = ENGRAM_COMPILER;
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
  module.def("set_process", engram::cpu::set_process);

  module.def("advise_huge_pages", [](uintptr_t start, int64_t bytes) {
    engram::cpu::advise_huge_pages(pointer<void>(start), bytes);
  });

  module.def("apply_low_rank", [](uintptr_t weight, int dtype, int64_t batch, int64_t rows, int64_t cols,
                                  int64_t batch_stride, int64_t row_stride, uintptr_t left, uintptr_t right,
                                  int64_t rank, double scale, bool look, int threads) {
    py::gil_scoped_release release;
    return engram::cpu::apply_low_rank(pointer<void>(weight), static_cast<DType>(dtype),
                                       WeightShape{batch, rows, cols, batch_stride, row_stride},
                                       pointer<const void>(left), pointer<const void>(right), rank, scale,
                                       look, threads);
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

  module.def("memory_stream", [](uintptr_t precision_inverse, uintptr_t memory, uintptr_t weights,
                                 uintptr_t latents, int dtype, int64_t batch, int64_t slots, int64_t width,
                                 int64_t count, uintptr_t new_precision_inverse, uintptr_t new_memory,
                                 uintptr_t readouts, uintptr_t leverages, int threads) {
    py::gil_scoped_release release;
    engram::cpu::memory_stream(pointer<const void>(precision_inverse), pointer<const void>(memory),
                               pointer<const void>(weights), pointer<const void>(latents),
                               static_cast<DType>(dtype), StreamShape{batch, slots, width, count},
                               pointer<void>(new_precision_inverse), pointer<void>(new_memory),
                               pointer<void>(readouts), pointer<void>(leverages), threads);
  });

  module.def("ridge_memory", [](uintptr_t q, uintptr_t k, uintptr_t v, int dtype, uintptr_t beta,
                                uintptr_t ends, int64_t sequences, int64_t heads, int64_t keys,
                                int64_t values, uintptr_t precision_inverse, uintptr_t memory, uintptr_t out,
                                int threads) {
    py::gil_scoped_release release;
    engram::cpu::ridge_memory(
        pointer<const void>(q), pointer<const void>(k), pointer<const void>(v), static_cast<DType>(dtype),
        pointer<const double>(beta), pointer<const int64_t>(ends), RidgeShape{sequences, heads, keys, values},
        pointer<double>(precision_inverse), pointer<double>(memory), pointer<void>(out), threads);
  });

  // Once for the library: a second copy of the package, under another name, loads the same one, and has the
  // same types.
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> graft_list, sparse_list;
  graft_list.call_once_and_store_result([&]() -> py::object {
    return py::class_<GraftList>(module, "GraftList", py::module_local())
        .def(py::init([](const GraftRows& rows) { return GraftList{graft_tensors(rows)}; }))
        .def("set_gradients", &GraftList::set_gradients);
  });
  sparse_list.call_once_and_store_result([&]() -> py::object {
    return py::class_<SparseList>(module, "SparseList", py::module_local())
        .def(py::init([](const SparseRows& rows) { return SparseList{sparse_tensors(rows)}; }));
  });
  module.attr("GraftList") = graft_list.get_stored();
  module.attr("SparseList") = sparse_list.get_stored();

  module.def("graft_blend", [](const GraftList& list, double bias, int threads) {
    py::gil_scoped_release release;
    engram::cpu::graft_blend(list.tensors.data(), list.tensors.size(), bias, threads);
  });

  module.def("graft_logits_gradient", [](const GraftList& list, double bias, int threads) {
    py::gil_scoped_release release;
    engram::cpu::graft_logits_gradient(list.tensors.data(), list.tensors.size(), bias, threads);
  });

  module.def("graft_mask_step", [](const GraftList& list, double bias, double lr, double l1, int threads) {
    py::gil_scoped_release release;
    engram::cpu::graft_mask_step(list.tensors.data(), list.tensors.size(), bias, lr, l1, threads);
  });

  module.def("pack_mask", [](uintptr_t mask, int64_t size, uintptr_t packed, int threads) {
    py::gil_scoped_release release;
    engram::cpu::pack_mask(pointer<const uint8_t>(mask), size, pointer<uint8_t>(packed), threads);
  });

  module.def("unpack_mask", [](uintptr_t packed, int64_t size, uintptr_t mask, int threads) {
    py::gil_scoped_release release;
    engram::cpu::unpack_mask(pointer<const uint8_t>(packed), size, pointer<uint8_t>(mask), threads);
  });

  module.def("graft_blend_packed", [](uintptr_t pre, uintptr_t ft, uintptr_t mask, int64_t size,
                                      int element_bytes, uintptr_t out, int threads) {
    py::gil_scoped_release release;
    engram::cpu::graft_blend_packed(pointer<const void>(pre), pointer<const void>(ft),
                                    pointer<const uint8_t>(mask), size, element_bytes, pointer<void>(out),
                                    threads);
  });

  module.def("top_k_mask", [](const GraftList& list, int64_t k, int threads) {
    py::gil_scoped_release release;
    return engram::cpu::top_k_mask(list.tensors.data(), list.tensors.size(), k, threads);
  });

  module.def("sparse_faults", [](const SparseList& list, bool wide_indices, int threads) {
    py::gil_scoped_release release;
    return engram::cpu::sparse_faults(list.tensors.data(), list.tensors.size(), wide_indices, threads);
  });

  // Writes if no index is at fault, and returns how many are.
  module.def("sparse_apply", [](const SparseList& list, bool wide_indices, bool checked, int threads) {
    py::gil_scoped_release release;
    const auto* const tensors = list.tensors.data();
    const int64_t count = list.tensors.size();
    const int64_t faults = checked ? 0 : engram::cpu::sparse_faults(tensors, count, wide_indices, threads);
    if (faults == 0) engram::cpu::sparse_apply(tensors, count, wide_indices, threads);
    return faults;
  });

  // `place(counts)` returns a pair of addresses for each tensor.
  module.def("sparse_diff",
             [](const GraftRows& rows, double threshold, bool wide_indices, int threads, py::function place) {
               struct Call {
                 py::function place;
                 size_t count;
               } call{std::move(place), rows.size()};
               const auto ask = [](void* context, const int64_t* changed, engram::SparseTarget* targets) {
                 const auto& call = *static_cast<const Call*>(context);
                 py::gil_scoped_acquire acquire;
                 const std::vector<int64_t> counts(changed, changed + call.count);
                 const auto found = call.place(counts).cast<std::vector<std::array<int64_t, 2>>>();
                 for (size_t i = 0; i < call.count; ++i)
                   targets[i] = {pointer<void>(found.at(i)[0]), pointer<void>(found.at(i)[1])};
               };
               const auto tensors = graft_tensors(rows);
               py::gil_scoped_release release;
               if (!engram::cpu::sparse_diff(tensors.data(), tensors.size(), threshold, wide_indices, ask,
                                             &call, threads))
                 throw std::bad_alloc();
             });
}

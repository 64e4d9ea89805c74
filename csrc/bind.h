// What the modules `_cpu` and `_cuda` share: pointers as integers, lists of tensors as rows of them.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "engram/graft.h"

template <class T>
static T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (out, pre, ft, logits, base, gradient, size, type) of each tensor, or of each weight
// (weight, indices, values, overwritten, count, size, bytes an element).
using GraftRows = std::vector<std::array<int64_t, 8>>;
using SparseRows = std::vector<std::array<int64_t, 7>>;

inline std::vector<engram::GraftTensor> graft_tensors(const GraftRows& rows) {
  std::vector<engram::GraftTensor> tensors;
  tensors.reserve(rows.size());
  for (const auto& row : rows)
    tensors.push_back({pointer<void>(row[0]), pointer<const void>(row[1]), pointer<const void>(row[2]),
                       pointer<float>(row[3]), pointer<const uint8_t>(row[4]), pointer<const void>(row[5]),
                       row[6], static_cast<engram::DType>(row[7])});
  return tensors;
}

inline std::vector<engram::SparseTensor> sparse_tensors(const SparseRows& rows) {
  std::vector<engram::SparseTensor> tensors;
  tensors.reserve(rows.size());
  for (const auto& row : rows)
    tensors.push_back({pointer<void>(row[0]), pointer<const void>(row[1]), pointer<const void>(row[2]),
                       pointer<void>(row[3]), row[4], row[5], static_cast<int>(row[6])});
  return tensors;
}

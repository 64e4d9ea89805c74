// What the CUDA runtime says about the error codes that the launchers return.
#pragma once

#include <cuda_runtime_api.h>

namespace engram::cuda {

inline const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace engram::cuda

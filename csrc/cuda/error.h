// What the CUDA runtime says about the error codes that the launchers return, and about itself.
#pragma once

#include <cuda_runtime_api.h>

namespace engram::cuda {

inline const char* error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// Why the runtime that is built in here can run nothing, such as a driver that is older than it: a
// cudaError_t as an int, or 0. Without a context, which would take memory of the device.
inline int runtime_error() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  cudaGetLastError();  // the runtime keeps it, and would report it as the next launch's
  return error;
}

// Why the kernels of this module cannot run on the current device, such as one that none of them was compiled
// for: a cudaError_t as an int, or 0.
int probe();

}  // namespace engram::cuda

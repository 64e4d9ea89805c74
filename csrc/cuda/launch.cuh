// How kernels are launched: kThreads threads a block, on a stream, an error code back.
#pragma once

#include <cuda_runtime.h>

#include <climits>

#include "block.cuh"

namespace engram::cuda {

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int64_t shared, void* stream,
           Arguments... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  if (shared > 48 * 1024 && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(shared)) != cudaSuccess)
    return cudaGetLastError();
  kernel<<<static_cast<unsigned>(blocks), kThreads, shared, static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  return cudaGetLastError();
}

}  // namespace engram::cuda

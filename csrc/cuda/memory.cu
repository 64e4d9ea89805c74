// Launcher of the streaming write. What it should take on a GPU, and why: docs/gpu-notes.md.
#include <cuda_runtime.h>

#include "engram/memory.h"
#include "memory_stream.cuh"

namespace engram::cuda {
namespace {

template <typename T, bool kResident>
__global__ void __launch_bounds__(kThreads, 1)
    memory_stream_kernel(const __grid_constant__ MemoryStream<T, kResident> stream) {
  extern __shared__ uint4 bytes[];
  const auto member = stream.member(blockIdx.x);
  const auto shared = stream.share(blockIdx.x, reinterpret_cast<T*>(bytes));
  auto* const counter = reinterpret_cast<uint32_t*>(stream.workspace + member.group * StreamPlan::kLine);
  uint32_t turn = 0;
  for (int64_t b = member.group; b < stream.shape.batch; b += stream.plan.groups) {
    stream.begin(member, b, turn, shared);
    for (int64_t row = 0; row < stream.shape.count; row += StreamPlan::kWrites) {
      grid_barrier(counter, (turn + 1) * stream.plan.members);
      stream.write(member, b, row, turn++, shared);
    }
    stream.end(member, b, shared);
  }
}

int plan_for(DType dtype, const StreamShape& shape, StreamPlan& plan) {
  int device = 0, multiprocessors = 0, shared = 0, cooperative = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device) != cudaSuccess)
    return cudaGetLastError();
  if (!cooperative) return cudaErrorNotSupported;
  plan = stream_plan(shape, dtype == DType::f64 ? 8 : 4, multiprocessors, shared);
  return plan.members > 0 ? cudaSuccess : cudaErrorInvalidValue;
}

// As many blocks as are on the device at once: they wait for one another.
template <typename T, bool kResident>
int launch_stream(const void* precision_inverse, const void* memory, const void* weights, const void* latents,
                  void* new_precision_inverse, void* new_memory, void* readouts, void* leverages,
                  void* workspace, const StreamShape& shape, const StreamPlan& plan, void* stream) {
  MemoryStream<T, kResident> program{static_cast<const T*>(precision_inverse),
                                     static_cast<const T*>(memory),
                                     static_cast<const T*>(weights),
                                     static_cast<const T*>(latents),
                                     static_cast<T*>(new_precision_inverse),
                                     static_cast<T*>(new_memory),
                                     static_cast<T*>(readouts),
                                     static_cast<T*>(leverages),
                                     static_cast<char*>(workspace),
                                     shape,
                                     plan};
  void (*const kernel)(MemoryStream<T, kResident>) = memory_stream_kernel<T, kResident>;
  void* arguments[] = {&program};
  const auto queue = static_cast<cudaStream_t>(stream);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(plan.shared)) != cudaSuccess ||
      cudaMemsetAsync(workspace, 0, plan.gram, queue) != cudaSuccess ||
      cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), plan.blocks(), kThreads, arguments,
                                  plan.shared, queue) != cudaSuccess)
    return cudaGetLastError();
  return cudaSuccess;
}

}  // namespace

int memory_stream(const void* precision_inverse, const void* memory, const void* weights, const void* latents,
                  DType dtype, StreamShape shape, void* new_precision_inverse, void* new_memory,
                  void* readouts, void* leverages, void* workspace, void* stream) {
  StreamPlan plan;
  if (const int error = plan_for(dtype, shape, plan)) return error;
  const auto launch = dtype == DType::f64
                          ? (plan.resident ? launch_stream<double, true> : launch_stream<double, false>)
                          : (plan.resident ? launch_stream<float, true> : launch_stream<float, false>);
  return launch(precision_inverse, memory, weights, latents, new_precision_inverse, new_memory, readouts,
                leverages, workspace, shape, plan, stream);
}

int64_t memory_stream_workspace(DType dtype, StreamShape shape) {
  StreamPlan plan;
  return plan_for(dtype, shape, plan) ? -1 : plan.workspace;
}

}  // namespace engram::cuda

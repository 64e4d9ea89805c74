// Launchers of grafting's kernels: they bring lists to the device, and launch grids that depend on sizes
// alone.
#include "engram/graft.h"
#include "launch.cuh"
#include "pack_mask.cuh"
#include "sparse_apply.cuh"
#include "top_k_mask.cuh"

namespace engram::cuda {
namespace {

template <typename Program>
__global__ void __launch_bounds__(kThreads) program_kernel(Program program) {
  program.run(blockIdx.x);
}

template <typename Program>
int launch_program(const Program& program, void* stream) {
  return launch(program_kernel<Program>, program.blocks(), 0, stream, program);
}

// A part of a table as a kernel's argument, of which 4 KB are allowed.
struct Words {
  static constexpr int64_t kCount = 500;
  uint64_t at[kCount];
};

__global__ void __launch_bounds__(kThreads)
    copy_kernel(const __grid_constant__ Words words, int count, uint64_t* to) {
  for (int i = threadIdx.x; i < count; i += kThreads) to[i] = words.at[i];
}

// Unlike a copy of the host's memory, arguments need not be pinned, may change when this returns, and are
// kept by a CUDA graph.
template <typename Tensor>
int copy(const HostList<Tensor>& list, void* to, void* stream) {
  static_assert(sizeof(Listed<Tensor>) % sizeof(uint64_t) == 0);
  const auto* const from = reinterpret_cast<const uint64_t*>(list.entries.get());
  const int64_t total = list.bytes() / static_cast<int64_t>(sizeof(uint64_t));
  for (int64_t first = 0; first < total; first += Words::kCount) {
    const int count = static_cast<int>(total - first < Words::kCount ? total - first : Words::kCount);
    Words words;
    memcpy(words.at, from + first, count * sizeof(uint64_t));
    if (const int error = launch(copy_kernel, 1, 0, stream, words, count, static_cast<uint64_t*>(to) + first))
      return error;
  }
  return cudaSuccess;
}

template <template <typename Index> class Program, typename Faults>
int launch_sparse(const void* list, int64_t count, int64_t chunks, bool wide_indices, Faults* faults,
                  void* stream) {
  const List<SparseTensor> listed{static_cast<const Listed<SparseTensor>*>(list), count, chunks};
  return wide_indices ? launch_program(Program<int64_t>{listed, faults}, stream)
                      : launch_program(Program<int32_t>{listed, faults}, stream);
}

}  // namespace

int pack_mask(const uint8_t* mask, int64_t size, uint8_t* packed, void* stream) {
  return launch_program(PackMask{mask, size, packed}, stream);
}

int64_t top_k_workspace(int64_t count, int64_t keys) {
  return sizeof(TopKWorkspace) + count * static_cast<int64_t>(sizeof(Listed<GraftTensor>)) +
         ByteList::room(keys) * static_cast<int64_t>(sizeof(uint32_t));
}

int top_k_mask(const GraftTensor* tensors, int64_t count, int64_t k, void* workspace, int64_t* invalid,
               void* stream) {
  auto* const selecting = static_cast<TopKWorkspace*>(workspace);
  const HostList<GraftTensor> host_list(tensors, count, &GraftTensor::size, kKeyChunk);
  if (const int error = copy(host_list, selecting + 1, stream)) return error;
  if (cudaMemsetAsync(selecting, 0, offsetof(TopKWorkspace, ranges), static_cast<cudaStream_t>(stream)) !=
      cudaSuccess)
    return cudaGetLastError();
  const List<GraftTensor> list = host_list.at(selecting + 1);
  int64_t keys = 0;
  for (int64_t i = 0; i < count; ++i) keys += tensors[i].size;
  auto* const bytes =
      reinterpret_cast<uint32_t*>(static_cast<char*>(workspace) + sizeof(TopKWorkspace) + host_list.bytes());
  // A byte's number must fit.
  const bool numbered = list.chunks <= UINT32_MAX / kThreads;
  const Candidates candidates(list, selecting, {bytes, numbered ? ByteList::room(keys) : 0});
  for (int pass = 0; pass < 3; ++pass) {
    if (const int error = launch_program(CountKeys(candidates, {pass}), stream)) return error;
    if (const int error = launch_program(SelectBin(candidates, invalid, k, {pass}), stream)) return error;
    if (pass == 0)
      if (const int error = launch_program(SplitKeys(candidates), stream)) return error;
  }
  return launch_program(WriteMasks(candidates), stream);
}

int64_t sparse_workspace(int64_t count) { return count * static_cast<int64_t>(sizeof(Listed<SparseTensor>)); }

int sparse_list(const SparseTensor* tensors, int64_t count, void* workspace, int64_t* chunks, void* stream) {
  const HostList<SparseTensor> list(tensors, count, &SparseTensor::count, kSparseChunk);
  *chunks = list.chunks;
  return copy(list, workspace, stream);
}

int sparse_faults(const void* list, int64_t count, int64_t chunks, bool wide_indices, int64_t* faults,
                  void* stream) {
  if (cudaMemsetAsync(faults, 0, sizeof(int64_t), static_cast<cudaStream_t>(stream)) != cudaSuccess)
    return cudaGetLastError();
  return launch_sparse<SparseFaults>(list, count, chunks, wide_indices, reinterpret_cast<uint64_t*>(faults),
                                     stream);
}

int sparse_apply(const void* list, int64_t count, int64_t chunks, bool wide_indices, const int64_t* faults,
                 void* stream) {
  return launch_sparse<SparseApply>(list, count, chunks, wide_indices, faults, stream);
}

}  // namespace engram::cuda

// Episodic memory: the streaming write.
//
// Row convention: an addressing weight or a latent is one row. Every matrix is contiguous and batched by a
// leading dimension. State and rows have one type, f32 or f64.
#pragma once

#include <cstdint>

#include "engram/dtype.h"

namespace engram {

struct StreamShape {
  int64_t batch;  // B
  int64_t slots;  // K
  int64_t width;  // C
  int64_t count;  // N
};

namespace cpu {

// N > 0 sequential writes to each of B memories, as rank-one updates; P [B, K, K] symmetric, M [B, K, C],
// weights w [B, N, K], latents z [B, N, C], all f32 or all f64. For every row, with u = P w^T and g = w u:
//   P -= u u^T / (1 + g), M += u (z - w M) / (1 + g), readout = w M [B, N, C], leverage = g / (1 + g) [B, N]
// The state is read once, and then passed over once for each row.
void memory_stream(const void* precision_inverse, const void* memory, const void* weights,
                   const void* latents, DType dtype, StreamShape shape, void* new_precision_inverse,
                   void* new_memory, void* readouts, void* leverages, int threads);

}  // namespace cpu

namespace cuda {

// As cpu::memory_stream, also for N = 0, in one cooperative launch; B, K and C are not 0. `device` pointers,
// launched on `stream`, nothing synchronised or allocated. Returns the cudaError_t of the launch as an int
// (0: launched).
int memory_stream(const void* precision_inverse, const void* memory, const void* weights, const void* latents,
                  DType dtype, StreamShape shape, void* new_precision_inverse, void* new_memory,
                  void* readouts, void* leverages, void* workspace, void* stream);

// Bytes of device memory that it works in on the current device, or -1 if it cannot take the shape there.
int64_t memory_stream_workspace(DType dtype, StreamShape shape);

}  // namespace cuda

}  // namespace engram

#include "engram/memory.h"

#include "isa.h"

namespace engram::cpu {

ENGRAM_DECLARE_LEVELS(memory_stream)

void memory_stream(const void* precision_inverse, const void* memory, const void* weights,
                   const void* latents, DType dtype, StreamShape shape, void* new_precision_inverse,
                   void* new_memory, void* readouts, void* leverages, int threads) {
  ENGRAM_DISPATCH(memory_stream)
  (precision_inverse, memory, weights, latents, dtype, shape, new_precision_inverse, new_memory, readouts,
   leverages, threads);
}

}  // namespace engram::cpu

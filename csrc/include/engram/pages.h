// What the kernels ask of the system about memory that others allocated.
#pragma once

#include <cstdint>

namespace engram::cpu {

// Ask for large pages under the whole pages of a range that is about to be written for the first time: a
// fault a page costs more than what a memory-bound kernel writes to it. Nothing happens where there are none.
void advise_huge_pages(void* start, int64_t bytes);

}  // namespace engram::cpu

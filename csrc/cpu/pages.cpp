#include "engram/pages.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace engram::cpu {

void advise_huge_pages([[maybe_unused]] void* start, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr int64_t kWorthwhile = 4 << 20;  // two large pages
  if (bytes < kWorthwhile) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal is no error
#endif
}

}  // namespace engram::cpu

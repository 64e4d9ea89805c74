// Parallel regions, compiled for each instruction set (isa.h) with the bodies that they call.
#pragma once

#include <cstdint>

#include "threads.h"

namespace engram::cpu::ENGRAM_ISA {

// Calls body(part) for each part in [0, parts), side by side.
template <class Body>
void parallel(int64_t parts, const Body& body) {
  const auto call = [](const void* context, int part) { (*static_cast<const Body*>(context))(part); };
  run_parts(static_cast<int>(parts), call, &body);
}

// Calls body(i) for each i in [0, count), in `parts` stretches of one length side by side.
template <class Body>
void parallel_for(int64_t parts, int64_t count, const Body& body) {
  parallel(parts, [&](int part) {
    for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) body(i);
  });
}

// The same, where some take longer than others: each goes to the next thread that has nothing to do.
template <class Body>
void parallel_for_uneven(int64_t parts, int64_t count, const Body& body) {
  int64_t next = 0;
  parallel(parts, [&](int) {
    for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) body(i);
  });
}

}  // namespace engram::cpu::ENGRAM_ISA

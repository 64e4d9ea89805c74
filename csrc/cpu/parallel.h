// Parallel regions, compiled for each instruction set (isa.h) with the bodies that they call.
#pragma once

#include <cstdint>

#include "scratch.h"
#include "threads.h"

namespace engram::cpu::ENGRAM_ISA {

// Calls body(part) for each part in [0, parts), side by side.
template <class Body>
void parallel(int64_t parts, const Body& body) {
  const auto call = [](const void* context, int part) { (*static_cast<const Body*>(context))(part); };
  run_parts(static_cast<int>(parts), call, &body);
}

// Calls body(i, part) for each i in [0, count), in `parts` stretches of one length side by side. A part that
// is done with its own stretch helps with the others.
template <class Body>
void parallel_for(int64_t parts, int64_t count, const Body& body) {
  struct alignas(64) Stretch {
    int64_t next, end;
  };
  const Scratch<Stretch> stretches(parts);
  for (int64_t i = 0; i < parts; ++i) stretches.data()[i] = {count * i / parts, count * (i + 1) / parts};
  parallel(parts, [&](int part) {
    for (int64_t other = 0; other < parts; ++other) {
      Stretch& stretch = stretches.data()[(part + other) % parts];
      for (int64_t i; (i = __atomic_fetch_add(&stretch.next, 1, __ATOMIC_RELAXED)) < stretch.end;)
        body(i, part);
    }
  });
}

}  // namespace engram::cpu::ENGRAM_ISA

// The threads of csrc/cpu/threads.h where no torch is: every part of every round is done once, some of them
// by other threads than the caller.
#include "cpu/threads.h"

#include <cstdio>
#include <thread>

namespace {

constexpr int kMost = 6, kRounds = 300;

struct Round {
  std::thread::id by[kMost];
  int times[kMost] = {};  // not atomic: each is one thread's, and then the caller's
};

void body(const void* context, int part) {
  Round& round = **static_cast<Round* const*>(context);
  ++round.times[part];
  round.by[part] = std::this_thread::get_id();
}

}  // namespace

int main() {
  bool shared = false;
  for (int i = 0; i < kRounds; ++i) {
    Round round;
    Round* const context = &round;
    const int parts = i % (kMost + 1);
    engram::cpu::run_parts(parts, body, &context);
    for (int part = 0; part < kMost; ++part) {
      if (round.times[part] != (part < parts)) {
        std::printf("round %d: part %d of %d was done %d times\n", i, part, parts, round.times[part]);
        return 1;
      }
      shared |= part < parts && round.by[part] != std::this_thread::get_id();
    }
  }
  if (!shared) std::printf("the caller did every part\n");
  return !shared;
}

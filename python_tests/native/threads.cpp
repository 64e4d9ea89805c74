// The threads of csrc/cpu/threads.h: every part of every round is done once, and the caller waits for no
// thread that has not begun.
#include "cpu/threads.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <random>
#include <thread>

namespace {

constexpr int kParts = 6, kRounds = 3000;

struct Round {
  std::thread::id caller = std::this_thread::get_id();
  int times[kParts] = {};  // not atomic: each is one thread's, and then the caller's
  std::atomic<int> by_caller{0};
};

void work_for(int microseconds) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds);
  while (std::chrono::steady_clock::now() < end) {
  }
}

void body(const void* context, int part) {
  Round& round = **static_cast<Round* const*>(context);
  ++round.times[part];
  round.by_caller += part > 0 && std::this_thread::get_id() == round.caller;
  work_for(part);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  int by_caller = 0;
  for (int i = 0; i < kRounds; ++i) {
    Round round;
    Round* const context = &round;
    engram::cpu::run_parts(kParts, body, &context);
    for (int part = 0; part < kParts; ++part) {
      if (round.times[part] == 1) continue;
      std::printf("round %d: part %d was done %d times\n", i, part, round.times[part]);
      return 1;
    }
    by_caller += round.by_caller;
    if (i % 3) work_for(random() % 60);  // up to longer than the threads stay awake
  }
  // Five threads do not wake up so quickly that in no round of thousands one is late.
  if (by_caller == 0) std::printf("the caller did no part but its own\n");
  return by_caller == 0;
}

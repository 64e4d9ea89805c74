#include "threads.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

namespace engram::cpu {

namespace {

// About 20 microseconds: longer than the steps between two regions of one kernel, too short to disturb
// others.
constexpr int kSpins = 1 << 10;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  // False: another thread of the process has the workers now.
  bool run(int parts, void (*body)(const void*, int), const void* context) {
    const std::unique_lock<std::mutex> alone(one_caller_, std::try_to_lock);
    if (!alone) return false;
    const int helped = 1 + hire(parts - 1);
    body_ = body;
    context_ = context;
    ++round_;
    for (int i = 1; i < helped && i < parts; ++i) workers_[i - 1].asked = round_;
    if (sleeping_ > 0) {
      const std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    body(context, 0);
    for (int part = helped; part < parts; ++part) body(context, part);
    for (int i = 1; i < helped && i < parts; ++i) {
      // A worker that has not woken up by now would be waited for longer than its part takes.
      if (take(workers_[i - 1], round_)) {
        body(context, i);
        continue;
      }
      for (int spins = 0; workers_[i - 1].done != round_; ++spins)
        spins < kSpins ? pause() : std::this_thread::yield();
    }
    return true;
  }

  const pid_t process = getpid();

 private:
  struct Worker {
    alignas(64) std::atomic<uint64_t> asked{0};  // the round that it shall work in
    alignas(64) std::atomic<uint64_t> taken{0};  // the last one whose part it, or the caller for it, began
    alignas(64) std::atomic<uint64_t> done{0};   // the last one that it did
  };

  // Whether a worker's part of a round is the one's who asks: the first to ask has it.
  static bool take(Worker& worker, uint64_t round) {
    uint64_t last = worker.taken;
    return last < round && worker.taken.compare_exchange_strong(last, round);
  }

  // As many workers as are wanted, or as the system gives.
  int hire(int wanted) {
    while (static_cast<int>(workers_.size()) < wanted) {
      Worker& worker = workers_.emplace_back();
      try {
        // Never joined: the pool lives as long as its process, and a thread that sleeps ends with it.
        std::thread(&Pool::work, this, std::ref(worker), static_cast<int>(workers_.size())).detach();
      } catch (const std::system_error&) {
        workers_.pop_back();
        break;
      }
    }
    return static_cast<int>(workers_.size());
  }

  void work(Worker& worker, int part) {
    for (uint64_t round = 0;;) {
      for (int spins = 0; worker.asked == round && spins < kSpins; ++spins) pause();
      if (worker.asked == round) {
        std::unique_lock<std::mutex> lock(sleep_);
        ++sleeping_;
        wake_.wait(lock, [&] { return worker.asked != round; });
        --sleeping_;
      }
      round = worker.asked;
      if (!take(worker, round)) continue;
      body_(context_, part);
      worker.done = round;
    }
  }

  std::mutex one_caller_, sleep_;
  std::condition_variable wake_;
  std::atomic<int> sleeping_{0};
  std::deque<Worker> workers_;  // a deque does not move them
  uint64_t round_ = 0;
  void (*body_)(const void*, int) = nullptr;
  const void* context_ = nullptr;
};

// The pool of this process: a fork has none of its parent's threads, and may have its locks.
Pool& pool() {
  static std::atomic<Pool*> current{new Pool};
  Pool* known = current;
  if (known->process == getpid()) return *known;
  Pool* fresh = new Pool;
  if (current.compare_exchange_strong(known, fresh)) return *fresh;
  delete fresh;
  return *known;
}

}  // namespace

void run_parts(int parts, void (*body)(const void*, int), const void* context) {
  if (parts > 1 && pool().run(parts, body, context)) return;
  for (int part = 0; part < parts; ++part) body(context, part);
}

}  // namespace engram::cpu

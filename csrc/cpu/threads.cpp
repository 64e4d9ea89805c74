#include "threads.h"

#include <dlfcn.h>
#include <unistd.h>

#include <system_error>
#include <thread>
#include <vector>

namespace engram::cpu {

namespace {

// The process that torch's threads are of.
pid_t process = getpid();

// The OpenMP runtime that torch runs on, called by name, so that this module is linked to none.
struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*number)() = nullptr;
  int (*count)() = nullptr;

  // A fork has none of its parent's threads, and would wait for them.
  bool here() const { return parallel && number && count && process == getpid(); }
};

const Runtime& runtime() {
  static const Runtime found = [] {
    Runtime runtime;
    if (void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
      // In it and in what it is linked to. Clang's and Intel's runtimes have gcc's entry point too.
      runtime.parallel = reinterpret_cast<decltype(runtime.parallel)>(dlsym(torch, "GOMP_parallel"));
      runtime.number = reinterpret_cast<decltype(runtime.number)>(dlsym(torch, "omp_get_thread_num"));
      runtime.count = reinterpret_cast<decltype(runtime.count)>(dlsym(torch, "omp_get_num_threads"));
      dlclose(torch);
    }
    return runtime;
  }();
  return found;
}

struct Region {
  int parts;
  void (*body)(const void*, int);
  const void* context;
};

// What each thread of the runtime does: there may be more of them than parts, or fewer.
void work(void* given) {
  const Region& region = *static_cast<const Region*>(given);
  const int step = runtime().count();
  for (int part = runtime().number(); part < region.parts; part += step) region.body(region.context, part);
}

void run_on_new_threads(const Region& region) {
  std::vector<std::thread> threads;
  int part = 1;
  try {
    for (; part < region.parts; ++part) threads.emplace_back(region.body, region.context, part);
  } catch (const std::system_error&) {
    // The system gives no more: the others' parts are done here.
  }
  region.body(region.context, 0);
  for (; part < region.parts; ++part) region.body(region.context, part);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void set_process(int id) { process = id; }

void run_parts(int parts, void (*body)(const void*, int), const void* context) {
  Region region{parts, body, context};
  if (parts <= 1) {
    if (parts == 1) body(context, 0);
  } else if (runtime().here()) {
    // As many threads as torch's own regions have: for another number some would be ended, and begun anew.
    runtime().parallel(work, &region, 0, 0);
  } else {
    run_on_new_threads(region);
  }
}

}  // namespace engram::cpu

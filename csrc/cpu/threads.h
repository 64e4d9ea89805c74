// Threads of this module's own, so that it needs no OpenMP runtime beside the one that torch brings.
#pragma once

namespace engram::cpu {

// Calls body(context, part) for each part in [0, parts): part 0 here, each other one by a thread that always
// has that number, so that it finds in its caches what it had there before, or here too if that thread is not
// awake by then. Returns when all are done. If another thread has them at that moment, all is done here. The
// body must not throw.
void run_parts(int parts, void (*body)(const void* context, int part), const void* context);

}  // namespace engram::cpu

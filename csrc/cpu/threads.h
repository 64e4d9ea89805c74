// The threads that torch's own operators run on. They stay awake for a while after each of these, and others
// would wait for their cores: kernels with threads of their own took up to twice as long.
#pragma once

namespace engram::cpu {

// Calls body(context, part) for each part in [0, parts), side by side, and returns when all are done. In a
// process without torch's OpenMP runtime, and in a fork, on threads that are begun for it. The body must not
// throw.
void run_parts(int parts, void (*body)(const void* context, int part), const void* context);

// Says which process torch's threads were begun in; without it, the one that loaded this module.
void set_process(int id);

}  // namespace engram::cpu

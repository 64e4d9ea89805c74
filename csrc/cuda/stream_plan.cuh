// How the state of a streaming write is spread over the blocks of a launch: a function of the shape and of
// two figures of the device.
//
// The state of a memory is X = [P | M], K + C columns of K entries. A group of blocks has a memory at a time,
// each block some columns of X. There are as many blocks as multiprocessors at most, for they wait for one
// another; so each may have all the shared memory of one. Columns that do not fit there are kept in the
// workspace.
#pragma once

#include <limits>

#include "engram/memory.h"
#include "numeric.cuh"

namespace engram::cuda {

struct StreamPlan {
  static constexpr int kWrites = 16;  // rows between two barriers of the grid
  static_assert(kWrites * kWrites == kThreads, "a thread takes one entry of the Gram matrix");
  // Columns whose products are summed together: halves of 4, 5 or 6, whichever leaves the fewest idle.
  static constexpr int kHalves = 2, kLeastGroup = 8, kMostGroup = 12;
  static constexpr int64_t kLine = 128;  // bytes of a line of the caches

  int members;      // blocks a memory; 0: the device has too little shared memory for the shape
  int groups;       // memories at a time
  int64_t columns;  // of X, a block
  int group;        // of them, whose products are summed together
  int64_t pitch;    // elements from one column to the next
  int64_t holders;  // blocks that have columns of P
  bool resident;    // whether the columns fit in shared memory
  int64_t shared;   // bytes a block
  int64_t gram, inverse, state, workspace;  // bytes before each part of the workspace, and of all

  // Slots that are looked at together: in fp64 two a thread would not fit the registers.
  static constexpr int tile(int64_t element) { return static_cast<int>(8 / element) * kThreads; }
  // Entries of a lower triangle: what a block adds to the Gram matrix.
  static constexpr int kPart = kWrites * (kWrites + 1) / 2;
  // Entries of the shared memory that the small factorisation works in: StreamFactor's matrices and vectors.
  static constexpr int factor(int vector) { return kWrites * (kWrites + 2 * (kWrites + vector) + 2); }
  static constexpr int64_t kSums = kWarps * kMostGroup * kWrites;
  int blocks() const { return members * groups; }
  static int64_t round_up(int64_t amount, int64_t size) { return ceil_divide(amount, size) * size; }
};

inline StreamPlan stream_plan(const StreamShape& shape, int64_t element, int64_t multiprocessors,
                              int64_t shared_limit) {
  constexpr int kWrites = StreamPlan::kWrites;
  const int64_t vector = 16 / element, total = shape.slots + shape.width;
  const int64_t padded = StreamPlan::round_up(shape.slots, vector);
  const int64_t tile = padded < StreamPlan::tile(element) ? padded : StreamPlan::tile(element);
  const int64_t fixed = element * (tile * (kWrites + vector) + StreamPlan::kSums +
                                   StreamPlan::factor(static_cast<int>(vector)));
  const int64_t each = element * 3 * kWrites;  // bytes a column: its row of W, its products and its steps
  const int64_t most = shared_limit > fixed ? (shared_limit - fixed) / each : 0;

  StreamPlan plan = {};
  // A block with fewer columns than a group would sum as many products.
  const int64_t useful = ceil_divide(total, StreamPlan::kLeastGroup);
  const int64_t share = shape.batch < multiprocessors ? multiprocessors / shape.batch : 1;
  int64_t members = share < useful ? share : useful;
  if (most > 0 && members * most < total) members = ceil_divide(total, most);
  if (most == 0 || members > multiprocessors) return plan;
  plan.columns = ceil_divide(total, members);
  plan.members = static_cast<int>(ceil_divide(total, plan.columns));
  // The most of the groups that leave the fewest columns idle.
  plan.group = StreamPlan::kMostGroup;
  for (int group = StreamPlan::kMostGroup; group >= StreamPlan::kLeastGroup; group -= StreamPlan::kHalves)
    if (StreamPlan::round_up(plan.columns, group) < StreamPlan::round_up(plan.columns, plan.group))
      plan.group = group;
  const int64_t at_once = multiprocessors / plan.members;
  plan.groups = static_cast<int>(at_once < shape.batch ? at_once : shape.batch);
  plan.holders = ceil_divide(shape.slots, plan.columns);
  plan.pitch = padded + vector;
  plan.shared = fixed + plan.columns * each;
  const int64_t columns = element * plan.columns * plan.pitch;
  plan.resident = plan.shared + columns <= shared_limit;
  if (plan.resident) plan.shared += columns;
  if (plan.columns * plan.pitch > std::numeric_limits<int32_t>::max() / 2) return {};

  // Two turns of what the blocks of a group exchange: one is read while the next is written.
  const auto part = [](int64_t bytes) { return StreamPlan::round_up(bytes, StreamPlan::kLine); };
  plan.gram = plan.groups * StreamPlan::kLine;  // after a counter a group
  plan.inverse = plan.gram + part(element * 2 * plan.groups * plan.holders * StreamPlan::kPart);
  plan.state = plan.inverse + part(element * 2 * plan.groups * shape.slots * kWrites);
  plan.workspace = plan.state + (plan.resident ? 0 : part(plan.blocks() * columns));
  return plan;
}

}  // namespace engram::cuda

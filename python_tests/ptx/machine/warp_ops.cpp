// What lanes of a warp do together: shuffles, sums and barriers; and how they end.
#include "opcode.h"

namespace ptx {

namespace {

enum Shuffle { kNoShuffle, kIndex, kUp, kDown, kButterfly };

// As the PTX ISA defines shfl.sync: c holds the last lane of a segment, and above it the segments' mask.
void shuffle(Warp& w, const Instruction& i, uint32_t lanes) {
  const Operand* o = &i.operand[i.outputs];
  const uint32_t *a = w.in<uint32_t>(o[0]), *b = w.in<uint32_t>(o[1]), *c = w.in<uint32_t>(o[2]);
  const uint32_t undefined = undefined_lanes(w, o[0]);
  for (size_t j = i.outputs + 1; j < i.operand.size(); ++j) require_defined(w, i, j, lanes);
  uint32_t result[kLanes] = {}, valid = 0, bad = 0;
  each_lane(lanes, [&](int l) {
    const int segment = c[l] >> 8 & 31, clamp = c[l] & 31, by = b[l] & 31;
    const int last = (l & segment) | (clamp & ~segment), first = l & segment;
    int from = 0;
    bool inside = false;
    switch (i.variant) {
      case kIndex:
        from = first | (by & ~segment), inside = from <= last;
        break;
      case kUp:
        from = l - by, inside = from >= last;
        break;
      case kDown:
        from = l + by, inside = from <= last;
        break;
      case kButterfly:
        from = l ^ by, inside = from <= last;
        break;
    }
    if (!inside) from = l;
    if (!(lanes >> from & 1))
      fault(w, l, "a shuffle from lane " + std::to_string(from) + ", which takes no part");
    result[l] = a[from];
    bad |= (undefined >> from & 1) << l;
    valid |= uint32_t(inside) << l;
  });
  keep(w, i.operand[0], result, lanes);
  define(w, i.operand[0], lanes, bad, bad);
  if (i.outputs > 1) define(w, i.operand[1], lanes, 0, 0);
  if (i.outputs > 1) each_lane(lanes, [&](int l) { w.set(i.operand[1], l, valid >> l & 1); });
}

void add_up(Warp& w, const Instruction& i, uint32_t lanes) {
  const Operand* o = &i.operand[i.outputs];
  const uint32_t* a = w.in<uint32_t>(o[0]);
  require_defined(w, i, i.outputs + 1, lanes);
  uint32_t sum = 0, result[kLanes] = {};
  each_lane(lanes, [&](int l) { sum += a[l]; });
  each_lane(lanes, [&](int l) { result[l] = sum; });
  const uint32_t bad = undefined_lanes(w, o[0]) & lanes ? lanes : 0;
  keep(w, i.operand[0], result, lanes);
  define(w, i.operand[0], lanes, bad, bad);
}

void synchronise(Warp& w, const Instruction&, uint32_t lanes) {
  // Lanes that are left out stay unordered with the others.
  if (lanes == w.alive) ++w.sync;
}

void nothing(Warp&, const Instruction&, uint32_t) {}

}  // namespace

bool bind_warp(Kernel& kernel, Instruction& i, Opcode& opcode) {
  const std::string& op = opcode.name;
  if (op == "ret" || op == "exit") {
    i.role = Role::exit;
    i.run = nothing;
  } else if (op == "bar" && opcode.take("warp")) {
    opcode.take("sync");
    i.role = Role::together;
    i.outputs = i.mask = 0;
    shape(kernel, i, {4});
    i.run = synchronise;
  } else if (op == "bar" || op == "barrier") {
    if (!opcode.take("sync")) throw Error("a barrier that is not known");
    opcode.take("aligned");
    opcode.take("cta");
    i.role = Role::barrier;
    i.outputs = 0;
    shape(kernel, i, {4});
    if (i.operand[0].kind != Operand::Kind::constant || i.operand[0].value != 0)
      throw Error("a barrier other than 0");
    i.run = nothing;
  } else if (op == "shfl" && opcode.take("sync")) {
    static const std::pair<const char*, Shuffle> kModes[] = {
        {"idx", kIndex}, {"up", kUp}, {"down", kDown}, {"bfly", kButterfly}};
    for (const auto& [name, mode] : kModes)
      if (opcode.take(name)) i.variant = mode;
    i.role = Role::together;
    std::vector<int> widths = {4, 4, 4, 4, 4};
    if (i.outputs == 2) widths.insert(widths.begin() + 1, 1);
    i.mask = widths.size() - 1;
    i.parts = Instruction::Parts::shuffle;
    shape(kernel, i, widths);
    i.run = i.variant == kNoShuffle ? nullptr : shuffle;
  } else if (op == "redux" && opcode.take("sync")) {
    const bool add = opcode.take("add") && (i.type == Type::s32 || i.type == Type::u32);
    i.role = Role::together;
    i.mask = 2;
    shape(kernel, i, {4, 4, 4});
    i.run = add ? add_up : nullptr;
  } else {
    return false;
  }
  return true;
}

}  // namespace ptx

#include "shadow.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "machine.h"

namespace ptx {

namespace {

uint32_t thread_of(const Access& a) { return a.warp * kLanes + std::countr_zero(a.lanes); }

bool ordered(const Access& a, const Warp& w, int lane) {
  const Block& b = *w.block;
  if (a.block != b.index) return a.clock <= b.seen_of(a.block);
  return a.clock < b.clock || (a.warp == w.index && (a.sync < w.sync || a.lanes == 1u << lane));
}

bool ordered(const Reads& r, const Warp& w, int lane) {
  if (r.several_warps && r.block == w.block->index) return r.clock < w.block->clock;
  return ordered(static_cast<const Access&>(r), w, lane);
}

// Takes a read into these, if they are of the same block or if it is ordered after all of them: what is in no
// order with it later is in none with them, or the other way round.
bool absorb(Reads& r, const Access& mine, const Warp& w) {
  const Block& b = *w.block;
  if (r.block != mine.block) {
    if (r.clock > b.seen_of(r.block)) return false;
    r = {mine};
  } else if (r.clock < mine.clock || (!r.several_warps && r.warp == mine.warp && r.sync < mine.sync)) {
    r = {mine};
  } else if (!r.several_warps && r.warp == mine.warp) {
    r.lanes |= mine.lanes;
    r.instruction = mine.instruction;
  } else if (!r.several_warps) {
    r.several_warps = true;
    r.second_warp = mine.warp;
    r.second_lane = std::countr_zero(mine.lanes);
    r.second_instruction = mine.instruction;
  }
  return true;
}

[[noreturn]] void race_with(const Access& a, const char* kind) {
  throw Race{kind, a.block, thread_of(a), a.instruction};
}

}  // namespace

Shadow::Page& Shadow::page_of(uint64_t number) {
  if (number != last_number_) {
    last_ = &pages_[number];
    last_number_ = number;
  }
  return *last_;
}

void Shadow::clear() {
  pages_.clear();
  more_.clear();
  last_number_ = ~0ull;
}

void Shadow::refine(Page& page, int bytes) {
  const int each = page.cell_bytes / bytes;
  std::vector<Cell> finer;
  finer.reserve(kPage / bytes);
  for (const Cell& cell : page.cells)
    for (int j = 0; j < each; ++j) {
      finer.push_back(cell);
      if (j && cell.more >= 0) {
        more_.push_back(more_[cell.more]);
        finer.back().more = more_.size() - 1;
      }
    }
  page.cells = std::move(finer);
  page.cell_bytes = bytes;
}

void Shadow::check_reads(const Warp& w, int lane, const Cell& cell) const {
  const auto check = [&](const Reads& r) {
    if (!r.lanes || ordered(r, w, lane)) return;
    if (r.several_warps && r.block == w.block->index && r.warp == w.index)
      throw Race{"read", r.block, uint32_t(r.second_warp * kLanes + r.second_lane), r.second_instruction};
    Access other = r;  // another lane than this one
    if (r.block == w.block->index && r.warp == w.index) other.lanes &= ~(1u << lane);
    race_with(other, "read");
  };
  check(cell.reads);
  if (cell.more >= 0)
    for (const Reads& r : more_[cell.more]) check(r);
}

void Shadow::add_read(const Access& mine, const Warp& w, Cell& cell) {
  if (!cell.reads.lanes) {
    cell.reads = {mine};
    return;
  }
  if (absorb(cell.reads, mine, w)) return;
  if (cell.more < 0) {
    cell.more = more_.size();
    more_.emplace_back();
  }
  auto& more = more_[cell.more];
  const auto at = std::lower_bound(more.begin(), more.end(), mine.block,
                                   [](const Reads& r, uint32_t block) { return r.block < block; });
  if (at == more.end() || at->block != mine.block)
    more.insert(at, {mine});
  else
    absorb(*at, mine, w);
}

bool Shadow::access(const Warp& w, int lane, uint64_t address, int bytes, bool write,
                    const unsigned char* old, const unsigned char* value) {
  const Access mine{
      w.block->index,    w.block->clock, w.sync, 1u << lane, uint32_t(w.now - w.kernel->code.data()),
      uint16_t(w.index), w.now->atomic};
  const uint32_t step = statistics.warp_instructions;
  Page& page = page_of(address / kPage);
  if (bytes < page.cell_bytes) refine(page, bytes);
  const int size = page.cell_bytes, first = address % kPage / size;
  bool wins = true;
  for (int j = 0; j < bytes / size; ++j) {
    Cell& cell = page.cells[first + j];
    if (cell.write.lanes && !(mine.atomic && cell.write.atomic) && !ordered(cell.write, w, lane)) {
      const bool one_store = write && cell.step == step && cell.write.warp == w.index;
      if (write && value && memcmp(old + j * size, value + j * size, size) == 0)
        ++statistics.same_values;
      else if (!one_store || options.conflicts)
        race_with(cell.write, one_store ? "store of another value by the same instruction" : "write");
      else if (++statistics.conflicts, w.block->machine->random() & 1)
        wins = false;
    }
    if (write) {
      check_reads(w, lane, cell);
      cell.write = mine;
      cell.reads.lanes = 0;
      cell.more = -1;
      cell.step = step;
    } else if (!mine.atomic) {
      add_read(mine, w, cell);
    }
  }
  return wins;
}

}  // namespace ptx

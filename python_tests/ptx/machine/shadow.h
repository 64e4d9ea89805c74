// Who wrote and who read each byte, and whether that happens before what a lane does now.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace ptx {

struct Warp;

// Accesses by lanes of a warp. `clock` counts the barriers of its block, `sync` the synchronisations of all
// of its lanes; between two of these nothing orders its lanes.
struct Access {
  uint32_t block = 0, clock = 0, sync = 0;
  uint32_t lanes = 0;  // none: no access
  uint32_t instruction = 0;
  uint16_t warp = 0;
  bool atomic = false;
};

// Reads of one block between two of its barriers: by one warp, or by more, of which two are kept. A later
// write of the block either is ordered after all of them or is in a race with one of those two.
struct Reads : Access {
  bool several_warps = false;
  uint8_t second_lane = 0;
  uint16_t second_warp = 0;
  uint32_t second_instruction = 0;
};

// What was done to some bytes that have always been accessed together.
struct Cell {
  Access write;       // the last one
  Reads reads;        // since then
  int32_t more = -1;  // reads of further blocks
  uint32_t step = 0;  // when the instruction that wrote ran
};

// What an access is in no order with.
struct Race {
  const char* kind;
  uint32_t block, thread, instruction;
};

class Shadow {
 public:
  // Notes an access of a lane; throws a Race if nothing orders it with one before it. `old` and `value` are
  // what is there and what is written (or null): one value may be written twice. Returns whether the write
  // takes effect: of lanes of one store that disagree, where that is allowed, one wins.
  bool access(const Warp& warp, int lane, uint64_t address, int bytes, bool write, const unsigned char* old,
              const unsigned char* value);
  void clear();

 private:
  static constexpr int kPage = 256;
  // The cells of a page are as fine as the finest access to it.
  struct Page {
    int cell_bytes = kPage;
    std::vector<Cell> cells = std::vector<Cell>(1);
  };
  Page& page_of(uint64_t number);
  void refine(Page& page, int bytes);
  void check_reads(const Warp& warp, int lane, const Cell& cell) const;
  void add_read(const Access& mine, const Warp& warp, Cell& cell);

  std::unordered_map<uint64_t, Page> pages_;
  uint64_t last_number_ = ~0ull;
  Page* last_ = nullptr;
  std::vector<std::vector<Reads>> more_;  // by block
};

}  // namespace ptx

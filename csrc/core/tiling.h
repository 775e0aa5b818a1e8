// How the persistent CUDA engine cuts a problem: pure functions of the problem and the device, tested without one.
//
// A grid of unit_ctas × row_tiles blocks, all on the chip at once, one on each multiprocessor. A block keeps its units' rows of every
// stage's matrix in shared memory for the whole sequence and does them for the rows of its tile; blocks of one tile hand state to each
// other, tiles never meet.
#pragma once

#include "core/plan.h"

namespace rnnkernels {

constexpr int kRowsAtOnce = 8;  // at most: rows whose products a thread adds up side by side

constexpr int kPacketsAtOnce = 8;  // that a thread asks for before it waits for the first: each is a trip to L2

struct Device {
  int multiprocessors;
  int64_t shared_bytes;  // that one block may have
};

// One stage's product in one block. Threads are cut into slices of the depth; in a slice each thread has one row of the block's matrix.
struct StageTiling {
  int64_t units;  // of the stage, in all blocks
  int64_t depth;  // numbers of the operand; 0: no matrix
  int columns;    // results a unit
  int64_t block_units;
  int rows, slices;  // rows of the block's matrix, rounded up to a power of two; rows · slices threads
  int64_t quads;     // depth in fours
  int64_t weights;   // offset in shared memory, [quads][rows][4] in storage type
};

struct Tiling {
  int unit_ctas, row_tiles, threads;
  int rows_at_once;  // as many as there is shared memory for their operand
  StageTiling stage[kMaxStages];
  // Offsets in shared memory, all numbers but the weights.
  int64_t operand;  // [rows_at_once][longest depth in fours · 4]
  int64_t operand_row;
  int64_t partial;             // [slices][kRowsAtOnce][rows]: threads · kRowsAtOnce
  int64_t state[kMaxStates];   // [rows of the tile][block_units]: states, or their gradients
  int64_t between;             // forward, several stages: [rows of the tile][kept][block_units]
  int64_t staged[kMaxStages];  // backward: gate gradients on their way out, [rows_at_once][columns][block_units]
  int64_t shared_bytes;
  // Packets in device memory: for each stage that another reads, [2][B][width] from `packets` on.
  int64_t packets[kMaxStages], packet_width[kMaxStages], packet_count;
  bool fits;

  RNN_FN int64_t tile_rows(int64_t batch) const { return ceil_div(batch, row_tiles); }
};

constexpr int kThreads = 256;

inline int64_t power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

inline Tiling tile(const CellInfo& cell, const Problem& p, bool backward, int unit_ctas, int row_tiles, int rows_at_once = kRowsAtOnce) {
  Tiling t{};
  t.rows_at_once = rows_at_once;
  t.unit_ctas = unit_ctas;
  t.row_tiles = row_tiles;
  t.threads = kThreads;
  t.fits = true;
  const int64_t storage = kStorageBytes[int(p.storage)], number = 4;
  int64_t bytes = 0, longest = 0;
  const auto take = [&](int64_t n) {
    const int64_t at = bytes;
    bytes += ceil_div(n, 16) * 16;
    return at;
  };
  const int64_t rows = t.tile_rows(p.batch);
  for (int s = 0; s < cell.stages; ++s) {
    const Product product = backward ? backward_product(cell, p, s) : forward_product(cell, p, s);
    StageTiling& g = t.stage[s];
    g.units = width_of(p, cell.stage[s].width);
    g.depth = product.depth;
    g.columns = product.columns;
    g.block_units = ceil_div(g.units, unit_ctas);
    const int64_t rows_needed = power_of_two(g.block_units * (g.columns ? g.columns : 1));
    if (rows_needed > t.threads) t.fits = false;
    g.rows = int(rows_needed > t.threads ? t.threads : rows_needed);
    g.slices = t.threads / g.rows;
    g.quads = ceil_div(g.depth, 4);
    g.weights = take(g.quads * g.rows * 4 * storage);
    longest = g.quads * 4 > longest ? g.quads * 4 : longest;
    if (backward) t.staged[s] = take(rows_at_once * cell.hidden_slots(s) * g.block_units * number);
    // What others read: forward, state 0 after the last stage and a later stage's operand; backward, the gate gradients of the H slots.
    const bool read = backward ? cell.hidden_slots(s) > 0 : s + 1 == cell.stages || cell.hidden_slots(s + 1) > 0;
    t.packet_width[s] = read ? (backward ? cell.hidden_slots(s) * g.units : g.units) : 0;
    t.packets[s] = t.packet_count;
    t.packet_count += 2 * p.batch * t.packet_width[s];
  }
  t.operand_row = longest;
  t.operand = take(rows_at_once * longest * number);
  t.partial = take(int64_t(t.threads) * kRowsAtOnce * number);
  for (int i = 0; i < cell.states; ++i) t.state[i] = take(rows * t.stage[i == 0 ? cell.stages - 1 : 0].block_units * number);
  if (!backward && cell.stages > 1) t.between = take(rows * cell.kept * t.stage[0].block_units * number);
  t.shared_bytes = bytes;
  return t;
}

// The cut with the least work a block that fits; fits is false where none does.
inline Tiling tile(const Device& device, const CellInfo& cell, const Problem& p, bool backward) {
  Tiling best{};
  double best_cost = 0;
  const int64_t batch = p.batch > 1 ? p.batch : 1;
  for (int unit_ctas = 1; unit_ctas <= device.multiprocessors && unit_ctas <= p.hidden; ++unit_ctas) {
    // More blocks than the units need would idle.
    if (ceil_div(p.hidden, ceil_div(p.hidden, unit_ctas)) != unit_ctas) continue;
    int64_t row_tiles = device.multiprocessors / unit_ctas;
    if (row_tiles > ceil_div(batch, kRowsAtOnce)) row_tiles = ceil_div(batch, kRowsAtOnce);
    row_tiles = ceil_div(batch, ceil_div(batch, row_tiles));
    Tiling t = tile(cell, p, backward, unit_ctas, int(row_tiles));
    while (t.shared_bytes > device.shared_bytes && t.rows_at_once > 1)
      t = tile(cell, p, backward, unit_ctas, int(row_tiles), t.rows_at_once / 2);
    if (!t.fits || t.shared_bytes > device.shared_bytes) continue;
    // A step of a block: multiply-adds at 128 a cycle; its operand from L2 at 64 bytes a cycle, packets of 8 bytes; a hop between blocks.
    double cycles = 0;
    const double rows = double(t.tile_rows(batch));
    for (int s = 0; s < cell.stages; ++s) {
      const StageTiling& g = t.stage[s];
      if (!g.depth) continue;
      cycles += rows * double(g.depth) * g.rows / 128 + rows * double(g.depth) * 8 / 64 + (unit_ctas > 1 ? 1200 : 200);
    }
    if (!best.fits || cycles < best_cost) best = t, best_cost = cycles;
  }
  return best;
}

}  // namespace rnnkernels

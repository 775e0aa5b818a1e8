// How the persistent CUDA engine cuts a problem: pure functions of the problem and the device, tested without one.
//
// A grid of sequences × row_tiles × unit_ctas blocks. A block keeps its units' rows of every stage's matrix on the chip for the whole
// sequence and does them for the rows of its tile; blocks of one tile hand state to each other, tiles never meet.
#pragma once

#include "core/plan.h"

namespace rnnkernels {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPacketWords = 3, kPacketBytes = 4 * (kPacketWords + 1);  // of operand; with the epoch that they belong to
constexpr int kPacketsAtOnce = 4;   // that a thread asks for before it waits for the first: each is a trip to L2
constexpr int kRowsAtOnce = 64;     // at most: rows whose operand is in shared memory at a time
constexpr int kSequences = 2;       // of one launch, at most: the directions of a layer, which do not depend on each other
constexpr int kClusterBlocks = 8;   // of one cluster, at most: the portable size
constexpr int kClusterNumber = 90;  // architectures from this one on have clusters

// How blocks of a tile hand on what the others read.
enum class Exchange {
  None,  // no stage has a matrix
  Near,  // in the shared memory of each: they are one cluster, or a single block
  Grid   // in device memory, through L2: all blocks are on the chip at once
};

struct Device {
  int multiprocessors;
  int64_t shared_bytes;  // that one block may have
  int cluster_blocks;    // 1: no clusters
};

// A product's shape on the chip. A panel is the rows of the matrix that one warp multiplies at a time; an item is what it multiplies of
// them at once: 4 numbers deep a thread with scalar multiply-adds, two fragments of 16 rows a warp with tensor cores.
struct ProductShape {
  bool tensor;
  int group;        // rows of the batch whose sums a warp keeps
  int item_depth;   // operand words of an item
  int item_words;   // 16-byte words of weights a thread has of it
  int panel_rows;   // at most
  int word_values;  // numbers of the operand in 4 bytes
  int held;         // items that a thread keeps in registers, as many as the compiler finds room for

  // Of each stage's matrix; a cell of several has more to remember besides.
  RNN_FN constexpr int held_of(int stages) const { return stages == 1 ? held : (held - 1) / stages; }
};

inline constexpr ProductShape kExactShape{false, 8, 4, 1, 32, 1, 28}, kTf32Shape{true, 32, 16, 2, 16, 1, 10},
    kHalfShape{true, 32, 16, 2, 16, 2, 12};

inline const ProductShape& product_shape(const Problem& p) {
  if (kStorageBytes[int(p.storage)] == 2) return kHalfShape;
  return p.products == Products::Exact ? kExactShape : kTf32Shape;
}

// One stage in one block.
//
// A matrix's depth is in wire order, the order in which the operand arrives: block by block of those that send it, in a block its columns,
// in a column its units, padded to whole words. Warps are cut into `across` panels side by side × slices of the depth; lanes that a narrow
// panel leaves over cut the depth further. A thread goes through `passes` panels, `per_slice` items of each; it holds the first items of
// the first panel in registers and has the others in shared memory.
struct StageTiling {
  int64_t units;  // in all blocks
  int columns;    // results a unit
  int block_units;
  int source;         // the stage whose results the matrix multiplies
  int operand_words;  // a row of these; 0: no matrix
  int panel_rows, across, slices, per_slice, passes;
  int rows;         // of the block's matrix, in whole panels
  int held;         // items in registers
  int64_t weights;  // offset in shared memory of the other items, [item][word][thread] of 16 bytes
  int64_t packed;   // offset in the workspace of all items, [block of the tile][item][word][thread]
  // What it sends, a row of the batch: send_columns × column_words words from each block.
  int send_columns, column_words;
  int64_t packets;  // [2][rows][send_packets] from here on: offset in shared memory (Near) or packets in device memory (Grid)

  RNN_FN int items() const { return passes * per_slice; }
  // Words from a block, and from all of a tile; packets likewise.
  RNN_FN int share() const { return send_columns * column_words; }
  RNN_FN int send_words(int unit_ctas) const { return unit_ctas * share(); }
  RNN_FN int share_packets() const { return int(ceil_div(share(), kPacketWords)); }
  RNN_FN int send_packets(int unit_ctas) const { return unit_ctas * share_packets(); }
};

struct Tiling {
  Exchange exchange;
  int unit_ctas, row_tiles, tile_rows;
  int sequences;     // of one launch, of the same sizes; blocks of the first come first
  int rows_at_once;  // as many as there is shared memory for their operand
  StageTiling stage[kMaxStages];
  // Offsets in shared memory.
  int64_t operand;  // [rows_at_once][operand_row] words
  int operand_row;
  int64_t partial;  // [slices][group][partial_row] numbers
  int partial_row;
  int64_t state[kMaxStates];   // [tile_rows][block_units] numbers: states, or their gradients
  int64_t between;             // forward, several stages: [tile_rows][kept][block_units] numbers
  int64_t staged[kMaxStages];  // backward: gate gradients on their way out, [group][columns][block_units] numbers
  int64_t shared_bytes;
  int64_t packet_count, workspace_bytes;  // in device memory, of each sequence: packets first
  bool fits;

  RNN_FN int sequence_blocks() const { return unit_ctas * row_tiles; }
  int blocks() const { return sequences * sequence_blocks(); }
};

inline int power_of_two(int64_t n) {
  int p = 1;
  while (p < n) p *= 2;
  return p;
}

// `most_held`: fewer items in registers than there is room for.
inline Tiling tile(const CellInfo& cell, const Problem& p, bool backward, Exchange exchange, int unit_ctas, int row_tiles,
                   int rows_at_once = kRowsAtOnce, int most_held = 1 << 16) {
  const ProductShape& shape = product_shape(p);
  Tiling t{};
  t.exchange = exchange;
  t.rows_at_once = rows_at_once;
  t.unit_ctas = unit_ctas;
  t.row_tiles = row_tiles;
  t.sequences = 1;
  t.tile_rows = int(ceil_div(p.batch > 1 ? p.batch : 1, row_tiles));
  t.fits = true;
  int64_t bytes = 0, partial = 0;
  const auto take = [&](int64_t n) {
    const int64_t at = bytes;
    bytes += ceil_div(n, 16) * 16;
    return at;
  };
  for (int s = 0; s < cell.stages; ++s) {
    StageTiling& g = t.stage[s];
    g.units = width_of(p, cell.stage[s].width);
    g.block_units = int(ceil_div(g.units, unit_ctas));
    // What others read: forward, state 0 after the last stage and a later stage's operand; backward, the gate gradients of the H slots.
    const bool read = s + 1 == cell.stages ? cell.hidden_slots(0) > 0 : cell.hidden_slots(s + 1) > 0;
    g.send_columns = backward ? cell.hidden_slots(s) : int(read);
    g.column_words = int(ceil_div(g.block_units, shape.word_values));
  }
  for (int s = 0; s < cell.stages; ++s) {
    StageTiling& g = t.stage[s];
    const Product product = backward ? backward_product(cell, p, s) : forward_product(cell, p, s);
    g.columns = product.columns;
    g.source = backward ? (s + 1 < cell.stages ? s + 1 : 0) : cell.stage[s].operand == kPreviousState ? cell.stages - 1 : s - 1;
    const int64_t block_rows = int64_t(g.block_units) * (g.columns ? g.columns : 1), words = t.stage[g.source].send_words(unit_ctas);
    if (block_rows > (1 << 16) || words > (1 << 24)) {
      t.fits = false;
      return t;
    }
    const int narrow = power_of_two(block_rows);
    g.panel_rows = shape.tensor || narrow > shape.panel_rows ? shape.panel_rows : narrow < 8 ? 8 : narrow;
    const int panels = int(ceil_div(block_rows, g.panel_rows)), over = shape.tensor ? 1 : 32 / g.panel_rows;
    g.across = power_of_two(panels) < kWarps ? power_of_two(panels) : kWarps;
    g.passes = int(ceil_div(panels, g.across));
    g.rows = g.passes * g.across * g.panel_rows;
    g.slices = kWarps / g.across * over;
    if (product.depth) {
      g.per_slice = int(ceil_div(ceil_div(words, shape.item_depth), g.slices));
      if (over > 1) g.per_slice |= 1;  // slices of one warp read at once: from different banks
      g.operand_words = g.per_slice * g.slices * shape.item_depth;
      g.held = shape.held_of(cell.stages) < most_held ? shape.held_of(cell.stages) : most_held;
      if (g.held > g.per_slice) g.held = g.per_slice;
      g.weights = take(int64_t(g.items() - g.held) * shape.item_words * kThreads * 16);
      if (g.operand_words > t.operand_row) t.operand_row = g.operand_words;
      // Four more than a multiple of 16, so that a fragment's columns fall into different banks.
      if (g.rows + 4 > t.partial_row) t.partial_row = g.rows + 4;
      if (int64_t(g.slices) * shape.group > partial) partial = int64_t(g.slices) * shape.group;
    }
    if (backward) t.staged[s] = take(int64_t(shape.group) * cell.hidden_slots(s) * g.block_units * 4);
    const int64_t sent = 2 * int64_t(g.send_packets(unit_ctas));
    if (exchange == Exchange::Near) g.packets = take(sent * t.tile_rows * kPacketBytes);
    if (exchange == Exchange::Grid) {
      g.packets = t.packet_count;
      t.packet_count += sent * p.batch;
    }
  }
  // Fragments of two rows are read at once: an odd number of half lines between them keeps them in different banks.
  if (shape.tensor) t.operand_row = (t.operand_row / 16 | 1) * 16;
  t.operand = take(int64_t(ceil_div(rows_at_once, 8) * 8) * t.operand_row * 4);
  t.partial = take(partial * t.partial_row * 4);
  for (int i = 0; i < cell.states; ++i) t.state[i] = take(int64_t(t.tile_rows) * t.stage[i == 0 ? cell.stages - 1 : 0].block_units * 4);
  if (!backward && cell.stages > 1) t.between = take(int64_t(t.tile_rows) * cell.kept * t.stage[0].block_units * 4);
  t.shared_bytes = bytes;
  t.workspace_bytes = t.packet_count * kPacketBytes;
  for (int s = 0; s < cell.stages; ++s) {
    t.stage[s].packed = t.workspace_bytes;
    t.workspace_bytes += int64_t(unit_ctas) * t.stage[s].items() * shape.item_words * kThreads * 16;
  }
  return t;
}

// A step of the sequence on the device, by the slowest of its resources: a guess until it has been measured.
inline double step_cycles(const Device& device, const CellInfo& cell, const Problem& p, const Tiling& t) {
  const ProductShape& shape = product_shape(p);
  const double rows = t.tile_rows, groups = double(ceil_div(t.tile_rows, shape.group));
  const double hop = t.exchange == Exchange::Grid ? 1200 : t.unit_ctas > 1 ? 500 : 150;
  const double packet_rate = t.exchange == Exchange::Grid ? 2 : 8;  // a cycle, into one multiprocessor
  double cycles = 0;
  for (int s = 0; s < cell.stages; ++s) {
    const StageTiling& g = t.stage[s];
    const double items = g.items(), in_shared = items - g.held;
    if (g.operand_words) {
      cycles += hop + rows * t.stage[g.source].send_packets(t.unit_ctas) / packet_rate;
      // An item: 4 × 256 multiply-adds a row at 128 a cycle; or on each of 8 warps two fragments for 8 rows, some 8 cycles each on a
      // quarter.
      const double thrice = p.products == Products::ThreeTf32 ? 3 : 1;
      cycles += shape.tensor ? items * double(ceil_div(t.tile_rows, 8)) * 2 * 2 * 8 * thrice : items * rows * 8;
      cycles += groups * in_shared * shape.item_words * kThreads * 16 / 128;
    }
    cycles += groups * 200 + rows * g.block_units * 40 / 128;
  }
  return cycles * double(ceil_div(int64_t(t.blocks()), device.multiprocessors));
}

// The fastest cut that fits by that guess; fits is false where none does.
inline Tiling tile(const Device& device, const CellInfo& cell, const Problem& p, bool backward, int sequences = 1) {
  Tiling best{};
  double best_cycles = 0;
  const int64_t batch = p.batch > 1 ? p.batch : 1;
  const bool matrix = cell.has_matrix();
  const auto consider = [&](Exchange exchange, int unit_ctas, int64_t row_tiles) {
    row_tiles = ceil_div(batch, ceil_div(batch, row_tiles));  // no tile without rows
    if (row_tiles > (1 << 20) || (exchange == Exchange::Grid && sequences * unit_ctas * row_tiles > device.multiprocessors)) return;
    Tiling t = tile(cell, p, backward, exchange, unit_ctas, int(row_tiles));
    const int least = product_shape(p).tensor ? 8 : 1;
    while (t.fits && t.rows_at_once > least && (t.shared_bytes > device.shared_bytes || t.rows_at_once >= 2 * t.tile_rows))
      t = tile(cell, p, backward, exchange, unit_ctas, int(row_tiles), t.rows_at_once / 2);
    if (!t.fits || t.shared_bytes > device.shared_bytes) return;
    t.sequences = sequences;
    const double cycles = step_cycles(device, cell, p, t);
    if (!best.fits || cycles < best_cycles) best = t, best_cycles = cycles;
  };
  const int64_t most = matrix ? device.multiprocessors : ceil_div(p.hidden, 32);
  for (int64_t unit_ctas = 1; unit_ctas <= most && unit_ctas <= p.hidden; ++unit_ctas) {
    // More blocks than the units need would idle.
    if (ceil_div(p.hidden, ceil_div(p.hidden, unit_ctas)) != unit_ctas) continue;
    const int n = int(unit_ctas);
    for (int64_t rows = 1; rows < 2 * batch; rows *= 2) {
      const int64_t row_tiles = ceil_div(batch, rows);
      if (!matrix) consider(Exchange::None, n, row_tiles);
      if (matrix && n <= device.cluster_blocks) consider(Exchange::Near, n, row_tiles);
      if (matrix && n > 1) consider(Exchange::Grid, n, row_tiles);
    }
    if (const int together = device.multiprocessors / (n * sequences); matrix && n > 1 && together) consider(Exchange::Grid, n, together);
  }
  return best;
}

// Whether two such sequences in one launch are sooner done than in two, one after the other, by that guess; where one of them does not fit,
// nor do two.
inline bool gains_together(const Device& device, const CellInfo& cell, const Problem& p, bool backward) {
  const Tiling one = tile(device, cell, p, backward), two = tile(device, cell, p, backward, 2);
  return one.fits && two.fits && step_cycles(device, cell, p, two) < 2 * step_cycles(device, cell, p, one);
}

}  // namespace rnnkernels

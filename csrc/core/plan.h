// Every size, schedule and heuristic of the engines: pure functions of the problem and the machine, tested without running a kernel.
//
// One step of one stage multiplies r rows by a matrix cut into panels of units. Panels may be split over threads (the weights stay where
// they are, one barrier a step) and rows may be (no barrier, each thread reads all weights); on many cores both at once. No choice made
// here changes a bit of the result: every output element is added up over k in the same order, whatever the tile.
#pragma once

#include <stdint.h>

#include "core/run.h"

namespace rnnkernels {

constexpr int kMaxVectorsPerPanel = 8;  // vector registers a panel is wide
constexpr int kMaxTileRows = 32;
constexpr int kMaxFmaRows = 8;  // of one whose sums are vectors

// One matrix of the recurrence as a kernel sees it: `columns` vectors of results for every vector of units.
struct Product {
  int64_t units;  // how many units it gives
  int64_t depth;  // length of the operand, 0: no matrix
  int columns;    // H slots a unit
  WeightType type = WeightType::Numbers;
};

inline int64_t width_of(const Problem& p, Width w) { return w == Width::Output ? p.output : p.hidden; }

// How wide the vector is that a stage's matrix multiplies; 0: no matrix.
inline int64_t operand_width(const CellInfo& cell, const Problem& p, int s) {
  if (!cell.hidden_slots(s)) return 0;
  return cell.stage[s].operand == kPreviousState ? p.output : p.hidden;
}

inline Product forward_product(const CellInfo& cell, const Problem& p, int s) {
  return {width_of(p, cell.stage[s].width), operand_width(cell, p, s), cell.hidden_slots(s), p.weight_type};
}

// The product that gives a stage's slots their x̂, taken for a chunk of steps at a time.
inline Product input_product(const CellInfo& cell, const Problem& p, int s) {
  const int columns = cell.input_slots(s);
  return {width_of(p, cell.stage[s].width), columns ? p.input : 0, columns};
}

// The product that backward adds up for what stage s gave: the transposed matrix of the stage that read it, if it has one.
inline Product backward_product(const CellInfo& cell, const Problem& p, int s) {
  const int reader = s + 1 < cell.stages ? s + 1 : 0;
  const Product f = forward_product(cell, p, reader);
  return {width_of(p, cell.stage[s].width), f.units * f.columns, f.depth ? 1 : 0};
}

// The products over all tokens that backward leaves: dx from the gate gradients and W, and one a matrix from gate gradients and what the
// matrix multiplied. They are taken for `tokens` tokens at a time.
inline Product grad_input_product(const CellInfo& cell, const Problem& p) { return {p.input, cell.input_slots() * p.hidden, 1}; }
inline Product grad_weight_product(int64_t operand_width, int64_t tokens) { return {operand_width, tokens, 1}; }

// So many tokens are added up before their sum is added to others: one chain over thousands would lose digits.
constexpr int64_t kTokensInAChain = 16;
// The error of a chain of sums grows with its length, so a product by vectors is several of so many words, added up in their order.
constexpr int64_t kWordsInAChain = 256;

struct Machine {
  int lanes;      // of the number type
  int registers;  // accumulators a tile may use
  int64_t number_bytes;
  bool pairs = false;     // tensors are bfloat16, of which the processor multiplies two at once
  bool matrices = false;  // and it does so a tile at a time
  double fma_ns = 0.28;   // one vector multiply-add, steady state; also one vector load, or two broadcasts
  double latency = 4;     // multiply-adds in flight that reach it
  double l2_gbs = 110, l3_gbs = 60, memory_gbs = 12;
  int64_t chunk_bytes = 256 << 10;  // of input gates a thread makes at a time: they are still in its L2 when the steps want them
  int64_t grad_tokens = 256;        // of a chunk of gate gradients: long enough for sums over them to be written seldom
  int64_t l1_bytes = 24 << 10;      // that weights can have
  int64_t l2_bytes = 900 << 10, l3_bytes = 16 << 20;
  double barrier_ns = 250, line_ns = 5;      // line: of an operand that another thread wrote
  double fork_ns = 1500, pointwise_ns = 12;  // pointwise: a vector of one slot
};

// What of a first data cache weights can have beside states and gates.
inline int64_t weights_in_l1(int64_t cache_bytes) { return cache_bytes / 4 * 3; }

// Whether the rows of the input are no operands as they lie: an odd one of pairs would end in half a word of something else.
inline bool converts_input(const Machine& m, const Problem& p) {
  return m.pairs ? p.input % 2 != 0 : kStorageBytes[int(p.storage)] != m.number_bytes;
}

struct Schedule {
  int row_groups = 1, unit_groups = 1;
  int blocks[kMaxStages] = {1, 1, 1, 1};  // vectors of units a panel
  int input_blocks[kMaxStages] = {1, 1, 1,
                                  1};  // likewise for the input's product: a divisor, so that panels' owners own whole ones of these
  int64_t chunk = 1;                   // steps whose input gates are made at a time
  int64_t grad_chunk = 1;  // steps whose tokens are one chain of backward's products; this and the next: the same for any threads
  int sum_groups = 1;      // of rows, whose sums over tokens are added up apart
  int round_chunks = 1;    // between two rounds of these products
  // Of a chunk's gate gradients: how many tokens' a thread has as numbers at a time, and how many units' of a slot it turns.
  int64_t numbers_tokens = 1, turned_units = 1;
  int grad_input_blocks = 1, grad_weight_ih_blocks = 1, grad_weight_blocks[kMaxStages] = {1, 1, 1, 1};
  double ns = 0;  // the model's estimate
  int threads() const { return row_groups * unit_groups; }
  bool same_team(const Schedule& other) const { return row_groups == other.row_groups && unit_groups == other.unit_groups; }
};

RNN_FN int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A packed panel: [depth][blocks][columns][lanes]; of int8 after the factors [blocks][columns][lanes]. In pairs two k share a word as wide
// as a number, and the last one of an odd depth has zero beside it.
inline bool in_pairs(const Machine& m, const Product& p) { return m.pairs && p.type != WeightType::Int8; }
inline int64_t words(const Machine& m, const Product& p, int64_t depth) { return in_pairs(m, p) ? ceil_div(depth, 2) : depth; }
inline int64_t panel_count(const Machine& m, const Product& p, int blocks) { return ceil_div(p.units, int64_t(blocks) * m.lanes); }
inline int64_t panel_elements(const Machine& m, const Product& p, int blocks) {
  return words(m, p, p.depth) * blocks * p.columns * m.lanes;
}
inline int64_t panel_bytes(const Machine& m, const Product& p, int blocks) {
  const int64_t elements = panel_elements(m, p, blocks);
  if (p.type == WeightType::Numbers || in_pairs(m, p)) return elements * m.number_bytes;
  const int64_t factors = int64_t(blocks) * p.columns * m.lanes * m.number_bytes;
  return p.type == WeightType::BF16 ? elements * 2 : factors + ceil_div(elements, m.number_bytes) * m.number_bytes;
}

// Numbers of a tile's row: whole vectors, also past the last unit.
inline int64_t tile_row(const Machine& m, const Product& p, int blocks) { return int64_t(blocks) * p.columns * m.lanes; }

// Of the matrices that the input meets and of the recurrent ones, as panels or, of their gradients, as numbers.
struct MatrixBytes {
  int64_t input, recurrent;
};
inline MatrixBytes matrix_bytes(Machine m, const CellInfo& cell, const Problem& p, bool gradients = false) {
  m.pairs = m.pairs && !gradients;
  const auto bytes = [&](const Product& product) { return panel_count(m, product, 1) * panel_bytes(m, product, 1); };
  MatrixBytes found{0, 0};
  for (int stage = 0; stage < cell.stages; ++stage) {
    found.input += bytes(input_product(cell, p, stage));
    found.recurrent += bytes(forward_product(cell, p, stage));
  }
  return found;
}

inline bool by_matrices(const Machine& m, const Product& p) { return m.matrices && in_pairs(m, p); }

inline int tile_rows(const Machine& m, const Product& p, int vectors) {
  if (by_matrices(m, p)) return kMaxTileRows;
  const int r = m.registers / vectors;
  return r < 1 ? 1 : r > kMaxFmaRows ? kMaxFmaRows : r;
}

// How many multiply-adds of vectors of numbers the processor would do in the time that products of this kind take for one of words.
inline double at_once(const Machine& m) { return m.matrices ? 12 : m.pairs ? 2 : 1; }

// One step's time of one thread that has `rows` rows and its share of the panels.
inline double product_ns(const Machine& m, const Product& p, int blocks, int64_t rows, int unit_groups) {
  const int columns = p.columns ? p.columns : 1;
  const int vectors = blocks * columns;
  const int64_t panels = ceil_div(ceil_div(p.units, int64_t(blocks) * m.lanes), unit_groups);
  const double pointwise = double(panels) * vectors * rows * m.pointwise_ns;
  if (!p.depth) return pointwise;
  const int64_t passes = ceil_div(rows, tile_rows(m, p, vectors));
  const double height = double(rows) / passes;
  double arithmetic = double(panels) * passes * m.fma_ns;
  if (by_matrices(m, p)) {
    // Of sixteen words: a cycle for each row of each tile, eight to load one, and a chain's latency; then the sums are stored.
    const double busy = vectors * height, loads = 8.0 * (vectors + 1), waits = 52;
    const double cycles = busy > loads ? busy > waits ? busy : waits : loads > waits ? loads : waits;
    arithmetic *= double(ceil_div(words(m, p, p.depth), 16)) * cycles + 2 * height * vectors + 40;
  } else {
    const double tile = vectors * height, loads = vectors + 0.5 * height;  // tile: multiply-adds in flight
    const double cycle = (tile > m.latency ? tile > loads ? tile : loads : m.latency > loads ? m.latency : loads) + 1;
    arithmetic *= double(words(m, p, p.depth)) * cycle;
  }
  const double bytes = double(panels) * double(panel_bytes(m, p, blocks));
  const double rate = bytes <= m.l1_bytes                 ? 4 * m.l2_gbs
                      : bytes <= m.l2_bytes               ? m.l2_gbs
                      : bytes * unit_groups <= m.l3_bytes ? m.l3_gbs
                                                          : m.memory_gbs;
  // Steps walk the panels forth and back: the one where they turn is still in L1, if it fits there.
  const double panel = double(panel_bytes(m, p, blocks));
  const double near = bytes > m.l1_bytes && panel <= m.l1_bytes ? panel : 0;
  const double traffic = near / (4 * m.l2_gbs) + (bytes - near) / rate + (passes - 1) * bytes / m.l2_gbs;
  // Streaming and arithmetic overlap, but not wholly.
  const double longer = arithmetic > traffic ? arithmetic : traffic, shorter = arithmetic > traffic ? traffic : arithmetic;
  return longer + 0.3 * shorter + pointwise;
}

inline int best_blocks(const Machine& m, const Product& p, int64_t rows, int unit_groups, int most = kMaxVectorsPerPanel) {
  const int columns = p.columns ? p.columns : 1;
  int best = 1;
  double best_ns = 0;
  for (int blocks = 1; blocks == 1 || (blocks <= most && blocks * columns <= kMaxVectorsPerPanel && blocks * columns <= m.registers);
       blocks *= 2) {
    const double ns = product_ns(m, p, blocks, rows, unit_groups);
    if (blocks == 1 || ns < best_ns) best = blocks, best_ns = ns;
  }
  return best;
}

constexpr int kSumGroups = 2;
constexpr int kRoundChunks = 4;
constexpr int64_t kNumbersTokens = 128;

// Where matrices are not large and tokens many, backward's sums are cut in two, so that threads which have halved the batch need not hand
// each other their gate gradients.
inline int sum_groups(const Machine& m, const CellInfo& cell, const Problem& p) {
  const MatrixBytes bytes = matrix_bytes(m, cell, p, true);
  const bool many = !p.rows && !p.units && !p.complete && p.batch >= 16 && p.steps * p.batch >= 2 * (p.input + p.output);
  return many && bytes.recurrent <= 2 * m.l2_bytes && bytes.input <= 2 * m.l2_bytes ? kSumGroups : 1;
}

// At most so many rows of a step are a group's. With lengths the groups have about as many tokens, not rows.
inline int64_t most_rows(const Problem& p, int groups) { return p.lengths ? p.batch : ceil_div(p.batch, groups); }

// The part of a backward schedule that is no choice among schedules.
inline Schedule grad_schedule(const Machine& m, const CellInfo& cell, const Problem& p) {
  Schedule s;
  s.sum_groups = sum_groups(m, cell, p);
  const int64_t rows = p.batch > 1 ? ceil_div(p.batch, s.sum_groups) : 1;
  // Fewer tokens a group where so many would leave the cache before the other group is done.
  const bool fit = m.grad_tokens * cell.room() * p.hidden * m.number_bytes <= m.l2_bytes;
  const int64_t chunk = ceil_div(fit ? m.grad_tokens : m.grad_tokens / s.sum_groups, rows);
  s.grad_chunk = chunk < p.steps ? chunk : p.steps > 1 ? p.steps : 1;
  const int64_t tokens = s.grad_chunk * rows;
  // The sums of large matrices come from far each time: seldom then, several chunks one after the other, of a few units each time.
  const MatrixBytes sums = matrix_bytes(m, cell, p, true);
  const int64_t chunks = ceil_div(p.steps > 1 ? p.steps : 1, s.grad_chunk);
  if (sums.input + sums.recurrent > m.l2_bytes && s.sum_groups == 1) s.round_chunks = chunks < kRoundChunks ? int(chunks) : kRoundChunks;
  s.grad_input_blocks = best_blocks(m, grad_input_product(cell, p), tokens, 1);
  s.grad_weight_ih_blocks = best_blocks(m, grad_weight_product(p.input, tokens), p.hidden, 1);
  for (int stage = 0; stage < cell.stages; ++stage)
    s.grad_weight_blocks[stage] = best_blocks(m, grad_weight_product(operand_width(cell, p, stage), tokens), p.hidden, 1);
  return s;
}

// Of a backward schedule, what follows from its threads: each has its share at a time, but no more than stays in its cache.
inline void share_gradients(const Machine& m, const Problem& p, Schedule& s) {
  const auto share = [&](int64_t n) { return ceil_div(n > 1 ? n : 1, s.threads()); };
  const int64_t tokens = share(s.grad_chunk * most_rows(p, s.sum_groups)), units = ceil_div(share(p.hidden), m.lanes) * m.lanes;
  const int64_t few = m.l2_bytes / 2 / ((p.input + p.output) * m.number_bytes) / m.lanes * m.lanes;
  const int64_t tile = m.matrices ? kMaxTileRows : kMaxFmaRows;
  s.numbers_tokens = tokens < tile ? tile : tokens < kNumbersTokens ? tokens : kNumbersTokens;
  s.turned_units = few < m.lanes ? m.lanes : few < units ? few : units;
}

// How many steps a layer of a chain is behind the one below: enough rows for a tile of the input's product, and few of all steps.
inline int64_t chain_steps(const Problem& p) {
  const int64_t tile = ceil_div(kMaxFmaRows, p.batch > 1 ? p.batch : 1), few = ceil_div(p.steps, 16);
  return tile > few ? tile : few;
}

// The quickest schedule of at least and at most so many threads.
inline Schedule plan(const Machine& m, const CellInfo& cell, const Problem& p, bool backward) {
  const int most = p.threads < 1 ? 1 : p.threads, least = p.least < most ? p.least : most;
  const bool cut = p.row_groups > 0 && p.row_groups <= most && p.row_groups <= p.batch && most / p.row_groups * p.row_groups >= least;
  const bool gradients = backward && !p.complete;
  const Schedule base = gradients ? grad_schedule(m, cell, p) : Schedule();
  double products = 0;  // multiply-adds a token of the products outside the recurrence
  if (gradients) {
    products = 2.0 * double(p.input) * double(cell.input_slots() * p.hidden);
    for (int stage = 0; stage < cell.stages; ++stage)
      products += double(operand_width(cell, p, stage)) * double(cell.hidden_slots(stage) * width_of(p, cell.stage[stage].width));
  }
  Schedule best;
  bool found = false;
  for (int row_groups = 1; row_groups <= most && row_groups <= (p.batch > 1 ? p.batch : 1); ++row_groups) {
    if (cut && row_groups != p.row_groups) continue;
    for (int unit_groups = 1; row_groups * unit_groups <= most; ++unit_groups) {
      if (row_groups * unit_groups < least) continue;
      Schedule s = base;
      s.row_groups = row_groups;
      s.unit_groups = unit_groups;
      const int64_t rows = ceil_div(p.batch, row_groups);
      double pack = 0, step = 0;
      double input = products * double(p.batch) * double(p.steps) / (m.lanes * at_once(m)) * 1.15 * m.fma_ns / s.threads();
      for (int stage = 0; stage < cell.stages; ++stage) {
        Product product = backward ? backward_product(cell, p, stage) : forward_product(cell, p, stage);
        if (p.complete) product.depth = 0;
        // With modules, panels that none begins in the middle of: a product of theirs begins where the module of their first unit does, and
        // is to begin at the same place however wide they are.
        int most = p.units ? 1 : kMaxVectorsPerPanel;
        while (p.units && 2 * most <= kMaxVectorsPerPanel && p.module % (2 * most * m.lanes) == 0) most *= 2;
        s.blocks[stage] = best_blocks(m, product, rows, unit_groups, most);
        const Product x = input_product(cell, p, stage);
        s.input_blocks[stage] = best_blocks(m, x, rows * (p.steps > 1 ? p.steps : 1), unit_groups, s.blocks[stage]);
        step += product_ns(m, product, s.blocks[stage], rows, unit_groups);
        if (product.depth && unit_groups > 1) {
          const double row = double(product.depth) * (unit_groups - 1) / unit_groups * m.number_bytes / 64;
          step += m.barrier_ns + 50 * (unit_groups - 2) + double(rows) * row * m.line_ns;
        }
        if (!backward && !p.complete) {
          input += product_ns(m, x, s.input_blocks[stage], rows * p.steps, unit_groups);
          pack += double(x.units) * x.columns * x.depth / (m.lanes * (m.pairs ? 2 : 1)) * 2 * m.fma_ns / s.threads();
        }
        pack += double(product.units) * product.columns * product.depth / (m.lanes * (m.pairs ? 2 : 1)) * 2 * m.fma_ns / s.threads();
      }
      s.ns = step * double(p.steps) + input + pack + (s.threads() > 1 ? m.fork_ns : 0);
      // What a step of a chunk takes of a thread's memory: its gates and, where it is not one as it lies, its input as an operand.
      const int64_t bytes =
          (rows * cell.input_slots() * ceil_div(p.hidden, unit_groups) + (converts_input(m, p) ? p.batch * p.input : 0)) * m.number_bytes;
      s.chunk = m.chunk_bytes / (bytes > 0 ? bytes : 1);
      if (p.chained && s.chunk > chain_steps(p)) s.chunk = chain_steps(p);
      s.chunk = s.chunk < 1 ? 1 : s.chunk > p.steps ? p.steps : s.chunk;
      if (!found || s.ns < best.ns) best = s, found = true;
    }
  }
  if (gradients) share_gradients(m, p, best);
  return best;
}

// A row of numbers in the workspace: an odd number of cache lines, so that the rows of a tile do not fall into the same few sets of the
// cache.
RNN_FN int64_t padded(int64_t width, int64_t number_bytes) {
  const int64_t line = 64 / number_bytes;
  return (ceil_div(width, line) | 1) * line;
}

// The even split of n things over groups: group i has [begin(i), begin(i + 1)). No groups: of nothing.
class Split {
 public:
  Split(int64_t n, int64_t groups) : each_(groups ? n / groups : 0), longer_(groups ? n % groups : 0) {}
  int64_t operator()(int64_t i) const { return each_ * i + (longer_ < i ? longer_ : i); }

 private:
  int64_t each_, longer_;
};
inline int64_t split(int64_t n, int64_t groups, int64_t i) { return Split(n, groups)(i); }

// Doubles of a row's parts of sums: for each vector of units, each value's sum and that of its squares.
inline int64_t partial_row(const Machine& m, const CellInfo& cell, const Problem& p) {
  int most = 0;
  for (int s = 0; s < cell.stages; ++s) {
    if (cell.stage[s].sums > most) most = cell.stage[s].sums;
    if (cell.stage[s].back_sums > most) most = cell.stage[s].back_sums;
  }
  return ceil_div(p.hidden, m.lanes) * 2 * most;
}

// Tells a panel's weights from others: what has the same one is the same, but for at most one chance in 2^64.
struct Fingerprint {
  uint64_t bits[2];
  bool operator==(const Fingerprint& other) const { return bits[0] == other.bits[0] && bits[1] == other.bits[1]; }
};

// Where everything lies in the workspace, in bytes, each part on its own cache line. Rows of numbers are padded().
struct Layout {
  int64_t packed[kMaxStages], packed_input[kMaxStages];  // from the caller's memory on, where the problem keeps them
  int64_t prints[kMaxStages], input_prints[kMaxStages];  // there too: of what weights each panel was made
  int64_t packed_bytes;
  int64_t wide, wide_bytes;      // where weights are narrower than numbers, a panel of numbers for each thread, so many bytes apart
  int64_t paired, paired_bytes;  // an operand's rows in pairs, [B][words] for each thread, so many bytes apart
  int64_t state[kMaxStates];     // forward: state 0 twice, [2][B][P], the others once, [B][H]; backward: carried gradients, once
  int64_t between;               // forward, several stages: this step's kept values, [B][kept·H]
  int64_t operand[kMaxStages];   // backward: pre-activation gradients for the product, [B][H slots · width]; stage 0 twice
  int64_t gates[kMaxStages];     // forward: input gates of a chunk as tiles have them, numbers, tile_row() for each token and panel
  // Sums over a row's units: doubles [B][vectors of units][sums][2], twice, so that a stage's are not written over while they are read; and
  // what became of them, for each thread, numbers [B][moments()] forward, [B][kMaxSums] backward.
  int64_t partial, totals;
  int64_t bias[kMaxStages];  // forward: of the input's slots, a tile_row() for each panel
  int64_t numbers;           // forward, half types: a chunk's input as operands, for each thread [chunk · B][I]
  // Backward's products: panels of W; for each thread, grad_thread bytes apart, gate gradients as operands [numbers_tokens][X slots·H] and
  // turned [turned_units][K]; for each group of rows, grad_group bytes apart, panels of the input and of each stage's operand,
  // [round_chunks] times of its K tokens of a chunk, and sums over the slots and vectors. The weights' sums, grad_sums bytes apart, for
  // each group but those whose place is the result itself: the first `grad_direct`.
  int64_t grad_packed, grad_numbers, grad_turned, grad_thread, grad_input, grad_operand[kMaxStages], grad_slots, grad_vectors, grad_group;
  int64_t grad_weight_ih, grad_weights[kMaxStages], grad_sums;
  int grad_direct;
  int64_t bytes = 0;

  int64_t take(int64_t n) {
    const int64_t at = bytes;
    bytes += ceil_div(n, 64) * 64;
    return at;
  }
};

inline Layout layout(const Machine& m, const CellInfo& cell, const Problem& p, const Schedule& s, bool backward) {
  Layout l;
  const auto panels = [&](const Product& product, int blocks) {
    return p.complete ? 0 : panel_count(m, product, blocks) * panel_bytes(m, product, blocks);
  };
  const auto rows = [&](int64_t width) { return p.batch * padded(width, m.number_bytes) * m.number_bytes; };
  for (int stage = 0; stage < cell.stages; ++stage) {
    l.packed[stage] = l.take(panels(backward ? backward_product(cell, p, stage) : forward_product(cell, p, stage), s.blocks[stage]));
    l.packed_input[stage] = l.take(backward ? 0 : panels(input_product(cell, p, stage), s.input_blocks[stage]));
  }
  for (int stage = 0; stage < cell.stages; ++stage) {
    const auto prints = [&](const Product& product, int blocks) {
      return p.keeps_packed ? panel_count(m, product, blocks) * int64_t(sizeof(Fingerprint)) : 0;
    };
    l.prints[stage] = l.take(prints(forward_product(cell, p, stage), s.blocks[stage]));
    l.input_prints[stage] = l.take(prints(input_product(cell, p, stage), s.input_blocks[stage]));
  }
  l.packed_bytes = l.bytes;
  if (p.keeps_packed) l.bytes = 0;
  l.wide_bytes = l.paired_bytes = 0;
  for (int stage = 0; stage < cell.stages; ++stage) {
    const Product product = backward ? backward_product(cell, p, stage) : forward_product(cell, p, stage);
    const bool pairs = in_pairs(m, product), narrow = product.type != WeightType::Numbers && !pairs;
    const int64_t wide = narrow ? panel_elements(m, product, s.blocks[stage]) * m.number_bytes : 0;
    const int64_t paired = pairs && !p.complete ? rows(words(m, product, product.depth)) : 0;
    if (wide > l.wide_bytes) l.wide_bytes = wide;
    if (paired > l.paired_bytes) l.paired_bytes = paired;
  }
  l.wide = l.take(s.threads() * l.wide_bytes);
  l.paired = l.take(s.threads() * l.paired_bytes);
  for (int stage = 0; stage < cell.stages; ++stage) {
    const int64_t width = width_of(p, cell.stage[stage].width) * cell.hidden_slots(stage);
    l.operand[stage] = l.take(backward ? (stage == 0 ? 2 : 1) * rows(width) : 0);
  }
  for (int i = 0; i < cell.states; ++i) l.state[i] = l.take((i == 0 && !backward ? 2 : 1) * rows(width_of(p, cell.state_width(i))));
  l.between = l.take(!backward && cell.stages > 1 ? rows(cell.kept * p.hidden) : 0);
  l.partial = l.take(cell.moments() ? 2 * p.batch * partial_row(m, cell, p) * int64_t(sizeof(double)) : 0);
  l.totals = l.take(cell.moments() ? s.threads() * p.batch * (backward ? kMaxSums : cell.moments()) * m.number_bytes : 0);
  const bool input = !backward && !p.complete;
  for (int stage = 0; stage < cell.stages; ++stage) {
    const Product product = input_product(cell, p, stage);
    const int64_t row = input ? panel_count(m, product, s.blocks[stage]) * tile_row(m, product, s.blocks[stage]) * m.number_bytes : 0;
    l.gates[stage] = l.take(s.chunk * p.batch * row);
    l.bias[stage] = l.take(row);
  }
  const bool gradients = backward && !p.complete;
  const int64_t tokens = gradients ? s.grad_chunk * most_rows(p, s.sum_groups) : 0, units = gradients ? cell.slots * p.hidden : 0;
  const auto matrix = [&](int64_t n, int64_t width) { return n * padded(width, m.number_bytes) * m.number_bytes; };
  l.grad_packed = l.take(gradients ? panels(grad_input_product(cell, p), s.grad_input_blocks) : 0);
  const int64_t first_thread = l.bytes;
  l.grad_numbers = l.take(gradients ? matrix(s.numbers_tokens, cell.input_slots() * p.hidden) : 0);
  l.grad_turned = l.take(gradients ? matrix(s.turned_units, tokens) : 0);
  l.grad_thread = l.bytes - first_thread;
  l.take((s.threads() - 1) * l.grad_thread);
  const int64_t first_group = l.bytes;
  l.grad_input = l.take(gradients ? s.round_chunks * panels(grad_weight_product(p.input, tokens), s.grad_weight_ih_blocks) : 0);
  l.grad_slots = l.take(units * m.number_bytes);
  l.grad_vectors = l.take(gradients ? cell.vectors * p.hidden * m.number_bytes : 0);
  for (int stage = 0; stage < cell.stages; ++stage) {
    const Product product = grad_weight_product(operand_width(cell, p, stage), tokens);
    l.grad_operand[stage] = l.take(gradients ? s.round_chunks * panels(product, s.grad_weight_blocks[stage]) : 0);
  }
  l.grad_group = l.bytes - first_group;
  l.take((s.sum_groups - 1) * l.grad_group);
  l.grad_direct = kStorageBytes[int(p.storage)] == m.number_bytes ? 1 : 0;
  const int64_t first_sums = l.bytes, copies = gradients ? s.sum_groups - l.grad_direct : 0;
  l.grad_weight_ih = l.take(copies ? cell.input_slots() * p.hidden * p.input * m.number_bytes : 0);
  for (int stage = 0; stage < cell.stages; ++stage) {
    const int64_t rows = cell.hidden_slots(stage) * width_of(p, cell.stage[stage].width);
    l.grad_weights[stage] = l.take(copies ? rows * operand_width(cell, p, stage) * m.number_bytes : 0);
  }
  l.grad_sums = l.bytes - first_sums;
  if (copies > 1) l.take((copies - 1) * l.grad_sums);
  l.numbers = l.take(input && converts_input(m, p) ? s.threads() * s.chunk * p.batch * p.input * m.number_bytes : 0);
  return l;
}

}  // namespace rnnkernels

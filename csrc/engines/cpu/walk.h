// What forward and backward share: a problem cut for a team, and the walk of one member through its tiles of a stage.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "engines/cpu/table.h"
#include "engines/cpu/team.h"

namespace rnnkernels::cpu {

const Isa& current();  // the chosen instruction set
const Page& page_of(int cell, const Isa&);

inline int number_of(Storage s) { return s == Storage::F64; }

inline Machine machine(const Isa& isa, const Problem& p) {
  Machine m{};
  m.lanes = isa.number[number_of(p.storage)].lanes;
  m.registers = isa.number[number_of(p.storage)].registers;
  m.number_bytes = kNumberBytes[int(p.storage)];
  return m;
}

// Address arithmetic on untyped memory; null stays null.
template <class P>
P* at(P* base, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
  return base ? reinterpret_cast<Byte*>(base) + bytes : nullptr;
}

class Walk {
 public:
  Walk(const Problem& problem, const Page& which, bool backward)
      : p(problem),
        cell(which.cell),
        isa(current()),
        m(machine(isa, p)),
        ops(isa.number[number_of(p.storage)]),
        storage(isa.storage[int(p.storage)]),
        page(which.ops[int(p.storage)]),
        plan_(plan(m, cell, p, backward)),
        memory(layout(m, cell, p, plan_, backward)),
        storage_bytes(kStorageBytes[int(p.storage)]),
        number_bytes(m.number_bytes),
        barriers(new Barrier[size_t(plan_.row_groups)]) {
    for (int s = 0; s < cell.stages; ++s) {
      products[s] = backward ? backward_product(cell, p, s) : forward_product(cell, p, s);
      inputs[s] = input_product(cell, p, s);
    }
    offsets.resize(size_t(p.steps) + 1, 0);
    for (int64_t t = 0; t < p.steps; ++t) offsets[size_t(t) + 1] = offsets[size_t(t)] + rows(t);
  }

  int64_t rows(int64_t t) const { return p.rows ? p.rows[t] : p.batch; }
  int64_t width(int state) const { return width_of(p, cell.state_width(state)); }
  int64_t width_of_stage(int s) const { return width_of(p, cell.stage[s].width); }
  // The step that a walk from the sequence's start (in its own direction of time), or from its end, visits as its n-th.
  int64_t step(int64_t n, bool from_start) const { return p.reverse != from_start ? n : p.steps - 1 - n; }

  struct Member {
    int row_group, unit_group, row_groups, unit_groups;
    int id, members;
    uint32_t round = 0, team_round = 0;
  };
  Member member(int id, int members) const {
    // A team that came out smaller than planned shares the units; any cut gives the same bits.
    if (members != plan_.threads()) return {0, id, 1, members, id, members};
    return {id / plan_.unit_groups, id % plan_.unit_groups, plan_.row_groups, plan_.unit_groups, id, members};
  }
  // Once by the team, before its first wait: only then is it known how many came.
  void start(const Member& me) {
    if (me.id != 0) return;
    for (int g = 0; g < me.row_groups; ++g) barriers[size_t(g)].start(me.unit_groups);
    team.start(me.members);
  }
  void wait(Member& me) const {
    if (me.unit_groups > 1) barriers[size_t(me.row_group)].wait(me.round);
  }
  void wait_all(Member& me) const { team.wait(me.team_round); }

  // A row group's rows of a step. They lie side by side, since what one core writes another's prefetcher would fetch; but in a ragged batch
  // the groups take turns, so that all stay busy to the end.
  struct Rows {
    int64_t first, count;
    int stride;
    int64_t operator[](int64_t i) const { return first + i * stride; }
  };
  Rows rows_of(const Member& me, int64_t active) const {
    if (p.rows) return {me.row_group, active > me.row_group ? ceil_div(active - me.row_group, me.row_groups) : 0, me.row_groups};
    const int64_t first = split(active, me.row_groups, me.row_group);
    return {first, split(active, me.row_groups, me.row_group + 1) - first, 1};
  }

  // The units of stage s that a unit group owns: whole panels.
  struct Units {
    int64_t begin, end;
  };
  Units units_of(const Member& me, int s) const {
    const int64_t panels = panel_count(m, products[s], plan_.blocks[s]), panel_units = plan_.blocks[s] * m.lanes;
    return {std::min(products[s].units, split(panels, me.unit_groups, me.unit_group) * panel_units),
            std::min(products[s].units, split(panels, me.unit_groups, me.unit_group + 1) * panel_units)};
  }
  // The input's slots come first, stage by stage.
  int64_t first_input_slot(int s) const {
    int64_t first = 0;
    for (int i = 0; i < s; ++i) first += cell.input_slots(i);
    return first;
  }

  // Bytes of a row of numbers in the workspace.
  int64_t row_bytes(int64_t width) const { return padded(width, number_bytes) * number_bytes; }

  // This member's share of the panels of weights [columns·units, depth], or of [depth, units].
  void pack(const Member& me, const Product& product, int blocks, const void* weights, void* packed) const {
    if (!product.depth || p.complete) return;
    const int64_t panels = panel_count(m, product, blocks);
    storage.pack(weights, product, blocks, split(panels, me.members, me.id), split(panels, me.members, me.id + 1), packed);
  }
  void pack_transposed(const Member& me, const Product& product, int blocks, const void* weights, void* packed) const {
    if (!product.depth || p.complete) return;
    const int64_t panels = panel_count(m, product, blocks);
    std::vector<const void*> rows(static_cast<size_t>(product.depth));
    for (int64_t k = 0; k < product.depth; ++k) rows[size_t(k)] = at(weights, k * product.units * storage_bytes);
    storage.spread(rows.data(), product, blocks, split(panels, me.members, me.id), split(panels, me.members, me.id + 1), 0, product.depth,
                   packed);
  }

  // Rows [first, last), each where operand(row) says, times panels [begin, end); take(row, rows, unit, sums) gets each tile.
  template <class Operand, class Take>
  void multiply(const Product& product, int blocks, const void* packed, int64_t begin, int64_t end, int64_t first, int64_t last,
                const Operand& operand, const Take& take) const {
    const int vectors = blocks * product.columns;
    const int64_t count = last - first, tiles = ceil_div(count, tile_rows(m, vectors));
    const int64_t panel_bytes = panel_elements(m, product, blocks) * number_bytes;
    alignas(64) char sums[kMaxVectorsPerPanel * kMaxTileRows * 64];
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = first + split(count, tiles, tile);
        const int n = int(first + split(count, tiles, tile + 1) - row);
        const void* operands[kMaxTileRows];
        for (int r = 0; r < n; ++r) operands[r] = operand(row + r);
        ops.product[vectors - 1][n - 1](operands, at(packed, panel * panel_bytes), product.depth, sums);
        take(row, n, panel * blocks * m.lanes, sums);
      }
  }

  // This member's tiles of one stage: operand(row) times every panel of its own, each tile handed to pointwise(rows, unit, sums).
  // Even steps walk the panels forward and odd ones backward, so that what the cache saw last is wanted first.
  template <class Operand, class Pointwise>
  void tiles(const Member& me, int s, int64_t active, bool multiply, bool backwards, const void* workspace, const Operand& operand,
             const Pointwise& pointwise) const {
    const Product& product = products[s];
    const int blocks = plan_.blocks[s], vectors = blocks * std::max(product.columns, 1);
    const int64_t panels = panel_count(m, product, blocks);
    const int64_t begin = split(panels, me.unit_groups, me.unit_group), end = split(panels, me.unit_groups, me.unit_group + 1);
    const Rows mine = rows_of(me, active);
    const int64_t tile_count = ceil_div(mine.count, tile_rows(m, vectors));
    const int64_t panel_bytes = panel_elements(m, product, blocks) * number_bytes;
    multiply = multiply && product.depth;
    alignas(64) char sums[kMaxVectorsPerPanel * kMaxTileRows * 64];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = backwards ? end - 1 - (i - begin) : i;
      for (int64_t tile = 0; tile < tile_count; ++tile) {
        const int64_t first = split(mine.count, tile_count, tile), last = split(mine.count, tile_count, tile + 1);
        const RowSet set{mine[first], int(last - first), mine.stride};
        if (multiply) {
          const void* operands[kMaxTileRows];
          for (int r = 0; r < set.count; ++r) operands[r] = operand(set[r]);
          if (i == begin && me.unit_groups > 1) fetch(operands, set.count, product.depth);
          ops.product[vectors - 1][set.count - 1](operands, at(workspace, memory.packed[s] + panel * panel_bytes), product.depth, sums);
        }
        pointwise(set, panel * blocks * m.lanes, multiply ? sums : nullptr);
      }
    }
  }

  // Where stage s puts its parts of the sums over a row's units, and what they come to for this member's rows: mean and variance of each
  // value (moments) or its mean alone, as numbers, `count` values from `first` on of rows of `width`. The vectors' parts are added up in
  // their order, whoever made them.
  double* partial(void* workspace, int s) const {
    return static_cast<double*>(at(workspace, memory.partial)) + (s & 1) * p.batch * partial_row(m, cell, p);
  }
  void add_sums(const Member& me, int s, int count, bool moments, int64_t active, const void* workspace, void* totals, int width,
                int first) const {
    const Rows mine = rows_of(me, active);
    const int64_t row = partial_row(m, cell, p), units = width_of_stage(s), vectors = ceil_div(units, m.lanes);
    const double* const parts = static_cast<const double*>(at(workspace, memory.partial)) + (s & 1) * p.batch * row;
    for (int64_t i = 0; i < mine.count; ++i)
      for (int j = 0; j < count; ++j) {
        double sum = 0, squares = 0;
        for (int64_t v = 0; v < vectors; ++v) {
          sum += parts[mine[i] * row + (v * count + j) * 2];
          squares += parts[mine[i] * row + (v * count + j) * 2 + 1];
        }
        const double mean = sum / double(units), variance = std::max(squares / double(units) - mean * mean, 0.0);
        const int64_t to = mine[i] * width + first + (moments ? 2 * j : j);
        put_number(totals, to, mean);
        if (moments) put_number(totals, to + 1, variance);
      }
  }
  void put_number(void* numbers, int64_t i, double x) const {
    if (number_bytes == sizeof(double))
      static_cast<double*>(numbers)[i] = x;
    else
      static_cast<float*>(numbers)[i] = float(x);
  }

  // Rows that other cores have just written: asked for all at once, they arrive together.
  void fetch(const void* const* rows, int count, int64_t numbers) const {
    for (int r = 0; r < count; ++r)
      for (int64_t i = 0; i < numbers * number_bytes; i += 64) __builtin_prefetch(at(rows[r], i));
  }

  // How many steps a row takes part in.
  int64_t steps_of(int64_t row) const {
    return p.rows ? std::partition_point(p.rows, p.rows + p.steps, [&](int64_t rows) { return rows > row; }) - p.rows : p.steps;
  }

  // This member's share of n things that lie side by side, cut at whole vectors.
  template <class Range>
  void each_vector(const Member& me, int64_t n, const Range& range) const {
    const int64_t vectors = ceil_div(n, m.lanes);
    const int64_t begin = std::min(n, split(vectors, me.members, me.id) * m.lanes);
    const int64_t end = std::min(n, split(vectors, me.members, me.id + 1) * m.lanes);
    if (begin < end) range(begin, end - begin);
  }

  // Rows of a [B, width] matrix that are this member's to prepare or to finish.
  template <class Row>
  void each_row(const Member& me, const Row& row) const {
    for (int64_t b = split(p.batch, me.members, me.id); b < split(p.batch, me.members, me.id + 1); ++b) row(b);
  }
  void load_or_zero(const void* from, int64_t b, int64_t n, void* to) const {
    if (from)
      storage.load(at(from, b * n * storage_bytes), n, to);
    else
      std::memset(to, 0, size_t(n * number_bytes));
  }

  const Problem p;
  const CellInfo& cell;
  const Isa& isa;
  const Machine m;
  const NumberOps& ops;
  const StorageOps& storage;
  const PageOps& page;
  const Schedule plan_;
  const Layout memory;
  const int64_t storage_bytes, number_bytes;
  Product products[kMaxStages], inputs[kMaxStages];
  std::vector<int64_t> offsets;               // [T + 1]: token of each step's row 0
  const std::unique_ptr<Barrier[]> barriers;  // one a row group
  mutable Barrier team;
};

}  // namespace rnnkernels::cpu

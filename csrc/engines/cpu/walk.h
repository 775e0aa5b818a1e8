// What forward and backward share: a problem cut for a team, and the walk of one member through its tiles of a stage.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "engines/cpu/machine.h"
#include "engines/cpu/team.h"

namespace rnnkernels::cpu {

const Page& page_of(int cell, const Isa&);

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
    for (int64_t t = 0; t < p.steps; ++t) offsets[size_t(t) + 1] = offsets[size_t(t)] + (p.rows ? p.rows[t] : p.batch);
    if (p.lengths) sort_rows();
    if (p.units) share_panels();
    if (p.resets) {
      marks.resize(size_t(p.steps * p.batch));
      int32_t number = 0;
      for (int64_t t = 0, i = 0; t < p.steps; ++t)
        for (int64_t b = 0; b < p.batch; ++b, ++i) {
          const int32_t mark = p.resets[i] ? number++ : -1;
          marks[size_t(i)] = t > 0 && (!p.lengths || t < p.lengths[b]) ? mark : -1;
        }
    }
  }

  // How many rows take part in a step: the first of the batch or, where they end in any order, of the longest.
  int64_t rows(int64_t t) const { return p.rows ? p.rows[t] : p.lengths ? active[size_t(t)] : p.batch; }
  int64_t width(int state) const { return width_of(p, cell.state_width(state)); }
  int64_t width_of_stage(int s) const { return width_of(p, cell.stage[s].width); }
  // The step that a walk from the sequence's start (in its own direction of time), or from its end, visits as its n-th.
  int64_t step(int64_t n, bool from_start) const { return p.reverse != from_start ? n : p.steps - 1 - n; }

  // The marks, by row, between step t and the one walked before it, or the one after it: -1, or the mark's number. Null: there are none.
  const int32_t* marks_before(int64_t t) const { return marks_at(p.reverse ? t + 1 : t); }
  const int32_t* marks_after(int64_t t) const { return marks_at(p.reverse ? t : t + 1); }
  // A step told what replaces the states where `found` has marks, if anywhere.
  template <class Step>
  void set_resets(Step& step, const int32_t* found, const Given* reset) const {
    step.resets = found;
    if (!found) return;
    const int64_t t = (found - marks.data()) / p.batch;
    for (int i = 0; i < cell.states; ++i) {
      step.reset[i] = at(reset[i].data, t * reset[i].token * storage_bytes);
      step.reset_row[i] = reset[i].row;
    }
  }

  // Units of stage s that take part in step t.
  int64_t units(int64_t t, int s) const { return p.units ? p.units[t] : width_of_stage(s); }

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

  // A row group's rows of a step. They lie side by side, since what one core writes another's prefetcher would fetch; with lengths each
  // group has about as many tokens. But in a packed batch, whose rows are sorted, the groups take turns, so that all stay busy to the end.
  struct Rows {
    int64_t first, count;
    int stride;
    const int64_t* order;
    RowSet some(int64_t begin, int64_t end) const { return {first + begin * stride, int(end - begin), stride, order}; }
    int64_t operator[](int64_t i) const { return some(i, i + 1)[0]; }
  };
  Rows rows_of(const Member& me, int64_t active) const {
    if (p.lengths && me.row_groups != plan_.row_groups) return {0, active, 1, sorted.data()};
    if (p.lengths) {
      const auto [first, last] = range_of(me);
      const int64_t count = std::partition_point(ranks.begin() + first, ranks.begin() + last, [&](int64_t r) { return r < active; }) -
                            (ranks.begin() + first);
      return {0, count, 1, order.data() + first};
    }
    if (p.rows) return {me.row_group, active > me.row_group ? ceil_div(active - me.row_group, me.row_groups) : 0, me.row_groups, nullptr};
    const int64_t first = split(active, me.row_groups, me.row_group);
    return {first, split(active, me.row_groups, me.row_group + 1) - first, 1, nullptr};
  }
  // The rows [first, last) among which are all that a row group owns, but in a packed batch.
  std::pair<int64_t, int64_t> range_of(const Member& me) const {
    if (!p.lengths || me.row_groups != plan_.row_groups)
      return {split(p.batch, me.row_groups, me.row_group), split(p.batch, me.row_groups, me.row_group + 1)};
    return {cuts[size_t(me.row_group)], cuts[size_t(me.row_group) + 1]};
  }

  // The panels of stage s that a unit group owns. They lie side by side; but where steps end at a unit, each group takes those that make
  // about as much work as another's.
  struct Panels {
    int64_t first, count;
    const int64_t* chosen;
    int64_t operator[](int64_t i) const { return chosen ? chosen[i] : first + i; }
  };
  Panels panels_of(const Member& me, int s) const {
    const int64_t panels = panel_count(m, products[s], plan_.blocks[s]);
    if (p.units && me.unit_groups == plan_.unit_groups) {
      const std::vector<int64_t>& share = shares[size_t(me.unit_group)];
      return {0, int64_t(share.size()), share.data()};
    }
    const int64_t first = split(panels, me.unit_groups, me.unit_group);
    return {first, split(panels, me.unit_groups, me.unit_group + 1) - first, nullptr};
  }
  // How many the unit groups before it own.
  int64_t panels_before(const Member& me, int s) const {
    const Panels own = panels_of(me, s);
    if (!own.chosen) return own.first;
    int64_t before = 0;
    for (int g = 0; g < me.unit_group; ++g) before += int64_t(shares[size_t(g)].size());
    return before;
  }

  const PanelOps& panels(const Product& product) const { return in_pairs(m, product) ? isa.pairs->panels : storage.panels; }
  const Tiles& kernels(const Product& product) const {
    return in_pairs(m, product) ? isa.pairs->products : ops.products[int(product.type)];
  }
  // n numbers of storage type as an operand's row.
  void load_operand(const void* from, int64_t n, void* to) const {
    if (!m.pairs) return storage.load(from, n, to);
    std::memcpy(to, from, size_t(n * storage_bytes));
    if (n % 2) std::memset(at(to, n * storage_bytes), 0, size_t(storage_bytes));
  }

  // Bytes of a row of numbers in the workspace.
  int64_t row_bytes(int64_t width) const { return padded(width, number_bytes) * number_bytes; }

  // Rows [first, last), each where operand(row) says, times panels [begin, end), the sums of each tile where place(row, panel) says, and
  // then take(row, rows, unit). depth(row): how much of the operands of rows from this one on is not zero. wanted(row, rows, unit): what a
  // tile to come needs besides panels.
  template <class Operand, class Place, class Take, class Depth, class Wanted>
  void multiply(const Product& product, int blocks, const void* packed, int64_t begin, int64_t end, int64_t first, int64_t last,
                const Operand& operand, const Place& place, const Take& take, const Depth& depth, const Wanted& wanted) const {
    const int vectors = blocks * product.columns;
    const int64_t count = last - first, tiles = ceil_div(count, tile_rows(m, product, vectors));
    const int64_t bytes = panel_bytes(m, product, blocks);
    const PanelsAhead panels(m, product, blocks, end - begin, tiles);
    const Tiles& kernel = kernels(product);
    const Split cut(count, tiles);
    for (int64_t panel = begin; panel < end; ++panel) {
      const void* const next = panel + 1 < end ? at(packed, (panel + 1) * bytes) : nullptr;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = first + cut(tile);
        const int n = int(first + cut(tile + 1) - row);
        const void* operands[kMaxTileRows];
        for (int r = 0; r < n; ++r) operands[r] = operand(row + r);
        const bool turns = tile + 1 == tiles;
        const int64_t then = turns ? 0 : tile + 1;
        ask_and_multiply(kernel, vectors, n, operands, at(packed, panel * bytes), words(m, product, depth(row)), place(row, panel), panels,
                         next, tile, turns,
                         [&] { return wanted(first + cut(then), int(cut(then + 1) - cut(then)), (panel + turns) * blocks * m.lanes); });
        take(row, n, panel * blocks * m.lanes);
      }
    }
  }

  // Of an operand, what a product reads.
  struct Depth {
    int64_t begin, end;
  };
  Depth whole(int s) const { return {0, products[s].depth}; }
  // Of a transposed matrix, what reads the units of the panel that starts at `unit`: with modules, those of their own and lower ones.
  Depth readers(int s, int64_t unit) const {
    if (!p.units) return whole(s);
    return {0, std::min(((unit + plan_.blocks[s] * m.lanes - 1) / p.module + 1) * p.module, p.hidden)};
  }

  // This member's tiles of one stage: operand(row) times every panel of its own that has units below `units`, as far as depth(unit) says,
  // each tile handed to pointwise(rows, unit, input, sums): what input(panel, row) says of the panel and the row by their numbers among its
  // own, null for nothing, and what became of it where both feed its slots alike, else the product alone, null for zero. Even steps walk
  // the panels forward and odd ones backward, so that what the cache saw last is wanted first. Operands are numbers, to be made pairs in
  // the workspace where panels are of pairs. wanted(rows, unit): what the page of a tile to come needs.
  template <class Operand, class Reads, class Input, class Pointwise, class Wanted>
  void tiles(const Member& me, int s, int64_t active, int64_t units, bool multiply, bool backwards, const void* packed, void* workspace,
             const Operand& operand, const Reads& depth, const Input& input, const Pointwise& pointwise, const Wanted& wanted) const {
    const Product& product = products[s];
    const int blocks = plan_.blocks[s], vectors = blocks * std::max(product.columns, 1);
    const Panels own = panels_of(me, s);
    const Rows mine = rows_of(me, active);
    const int64_t tile_count = ceil_div(mine.count, tile_rows(m, product, vectors));
    const int64_t bytes = panel_bytes(m, product, blocks);
    multiply = multiply && product.depth;
    bool fetched = me.unit_groups == 1, made = false;
    const bool pairs = multiply && in_pairs(m, product);
    void* const paired = at(workspace, memory.paired + me.id * memory.paired_bytes);
    const int64_t paired_row = pairs ? row_bytes(words(m, product, product.depth)) : 0;
    const PanelsAhead panels(m, product, blocks, own.count, tile_count);
    const Tiles& kernel = kernels(product);
    alignas(64) char sums[kTileBytes];
    const bool alike = cell.fed_alike(s);
    const Split cut(mine.count, tile_count);
    const auto number_of = [&](int64_t i) { return backwards ? own.count - 1 - i : i; };
    const auto panel_of = [&](int64_t i) { return own[number_of(i)]; };
    for (int64_t i = 0; i < own.count; ++i) {
      const int64_t panel = panel_of(i), unit = panel * blocks * m.lanes;
      if (unit >= units) continue;
      const Depth reads = multiply ? depth(unit) : Depth{0, 0};
      const void* const first = at(packed, memory.packed[s] + reads.begin * vectors * m.lanes * number_bytes);
      const void* const next = i + 1 < own.count ? at(first, panel_of(i + 1) * bytes) : nullptr;
      for (int64_t tile = 0; tile < tile_count; ++tile) {
        const RowSet set = mine.some(cut(tile), cut(tile + 1));
        const void* const given = input(number_of(i), cut(tile));
        const void* result = alike ? given : nullptr;
        if (reads.begin < reads.end) {
          const void* operands[kMaxTileRows];
          for (int r = 0; r < set.count; ++r) operands[r] = at(operand(set[r]), reads.begin * number_bytes);
          const int64_t length = reads.end - reads.begin;
          if (!fetched) fetch(operands, set.count, length);
          for (int r = 0; pairs && r < set.count; ++r) {
            void* const row = at(paired, (cut(tile) + r) * paired_row);
            if (!made) isa.pairs->narrow(operands[r], length, row);
            operands[r] = row;
          }
          const bool turns = tile + 1 == tile_count;
          const Sums with_given{result, vectors * m.lanes, sums, vectors * m.lanes};
          ask_and_multiply(kernel, vectors, set.count, operands, at(first, panel * bytes), words(m, product, length), with_given, panels,
                           next, tile, turns, [&] {
                             const int64_t then = turns ? 0 : tile + 1;
                             return wanted(mine.some(cut(then), cut(then + 1)), turns ? panel_of(i + 1) * blocks * m.lanes : unit);
                           });
          result = sums;
        }
        pointwise(set, unit, given, result);
      }
      fetched = made = true;
    }
  }

  // One tile's product, which asks for some of the panel that follows where that is far away, else for what the tile that follows wants.
  template <class Wanted>
  void ask_and_multiply(const Tiles& kernel, int vectors, int rows, const void* const* operands, const void* panel, int64_t depth,
                        const Sums& sums, const PanelsAhead& panels, const void* next, int64_t tile, bool turns,
                        const Wanted& wanted) const {
    Soon soon;
    bool asks = false;
    if ((next || !turns) && asks_ahead(rows, vectors, m.lanes)) {
      if (panels.wanted(next, tile, depth))
        soon = {{panels.lines(next, tile, depth), {}, {}}, {}}, asks = true;
      else if constexpr (!std::is_void_v<decltype(wanted())>)
        soon = wanted(), asks = soon.any();
    }
    kernel.tile[vectors - 1][rows - 1](operands, panel, depth, sums, asks ? &soon : nullptr);
  }
  // Whether that is done for what the pages of this member's tiles read; where their rows lie apart it is not.
  bool asks_for_pages(const Member& me, int s, int64_t active) const {
    const int vectors = plan_.blocks[s] * std::max(products[s].columns, 1);
    const Rows mine = rows_of(me, active);
    return products[s].depth && mine.count && mine.stride == 1 && !mine.order &&
           asks_ahead(mine.count / ceil_div(mine.count, tile_rows(m, products[s], vectors)), vectors, m.lanes) &&
           !PanelsAhead(m, products[s], plan_.blocks[s], panels_of(me, s).count, 1).far();
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

  // Where so many groups of rows begin: with lengths each has about as many tokens.
  std::vector<int64_t> cut_rows(int groups) const {
    std::vector<int64_t> found(size_t(groups) + 1, p.batch);
    found[0] = 0;
    if (!p.lengths) {
      for (int g = 1; g < groups; ++g) found[size_t(g)] = split(p.batch, groups, g);
      return found;
    }
    const int64_t tokens = std::accumulate(p.lengths, p.lengths + p.batch, int64_t(0));
    for (int64_t b = 0, sum = 0, g = 1; b < p.batch && g < groups; sum += p.lengths[b++])
      while (g < groups && sum >= split(tokens, groups, g)) found[size_t(g++)] = b;
    return found;
  }

  // How many steps a row takes part in.
  int64_t steps_of(int64_t row) const {
    if (p.lengths) return p.lengths[row];
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
  // With lengths: zeros for the tokens past the ends of this member's rows of [T, B, width].
  void clear_past_ends(const Member& me, int64_t width, void* to) const {
    if (!p.lengths || !to) return;
    each_row(me, [&](int64_t b) {
      for (int64_t t = p.lengths[b]; t < p.steps; ++t)
        std::memset(at(to, (t * p.batch + b) * width * storage_bytes), 0, size_t(width * storage_bytes));
    });
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
  std::vector<int64_t> offsets;  // [T + 1]: token of each step's row 0
  std::vector<int64_t> sorted;   // with lengths: the rows, the longest first

 private:
  void sort_rows() {
    const auto longer = [&](int64_t a, int64_t b) { return p.lengths[a] > p.lengths[b]; };
    sorted.resize(size_t(p.batch));
    std::iota(sorted.begin(), sorted.end(), int64_t(0));
    order = sorted;
    std::stable_sort(sorted.begin(), sorted.end(), longer);
    active.resize(size_t(p.steps));
    for (int64_t t = 0, n = p.batch; t < p.steps; ++t) {
      while (n > 0 && p.lengths[sorted[size_t(n) - 1]] <= t) --n;
      active[size_t(t)] = n;
    }
    cuts = cut_rows(plan_.row_groups);
    std::vector<int64_t> rank(order.size());
    for (size_t i = 0; i < sorted.size(); ++i) rank[size_t(sorted[i])] = int64_t(i);
    for (size_t g = 0; g + 1 < cuts.size(); ++g)
      std::sort(order.begin() + cuts[g], order.begin() + cuts[g + 1],
                [&](int64_t a, int64_t b) { return rank[size_t(a)] < rank[size_t(b)]; });
    ranks.resize(order.size());
    for (size_t i = 0; i < order.size(); ++i) ranks[i] = rank[size_t(order[i])];
  }

  // The panels, that which takes part in most steps first, each to the group that has least to do so far.
  void share_panels() {
    shares.resize(size_t(plan_.unit_groups));
    std::vector<int64_t> steps(shares.size());
    for (int64_t panel = 0; panel < panel_count(m, products[0], plan_.blocks[0]); ++panel) {
      const auto least = size_t(std::min_element(steps.begin(), steps.end()) - steps.begin());
      shares[least].push_back(panel);
      const int64_t unit = panel * plan_.blocks[0] * m.lanes;
      steps[least] += std::count_if(p.units, p.units + p.steps, [&](int64_t units) { return units > unit; });
    }
  }

  const int32_t* marks_at(int64_t t) const { return p.resets && t > 0 && t < p.steps ? marks.data() + t * p.batch : nullptr; }

  std::vector<std::vector<int64_t>> shares;  // with units: the panels of each unit group
  // With lengths: where each row group's rows begin; these, the longest first; which place each has among all.
  std::vector<int64_t> cuts, order, ranks;
  std::vector<int64_t> active;                // with lengths: how many rows take part in each step
  std::vector<int32_t> marks;                 // with resets: by token, the number of its mark, or -1 where there is none or no effect
  const std::unique_ptr<Barrier[]> barriers;  // one a row group
  mutable Barrier team;
};

}  // namespace rnnkernels::cpu

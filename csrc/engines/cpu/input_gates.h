// What the forward walk feeds on: the input's product, made where it is used.
#pragma once

#include "engines/cpu/packing.h"

namespace rnnkernels::cpu {

// Where the packed weights lie.
inline void* packed_in(const Forward& f) { return f.problem.keeps_packed ? f.packed : f.workspace; }

// What is known of them from an earlier call.
inline Packer::Kept kept_in(const Forward& f, int64_t prints) {
  if (!f.problem.keeps_packed || f.pack == Pack::All) return {};
  return {static_cast<Fingerprint*>(at(f.packed, prints)), f.pack};
}

// The input gates of a chunk of steps, made by each member for the units and rows it owns, so that nobody waits for anybody. They stay as
// the product leaves them, whole panels of numbers, in a region of the member's: what one core writes next to another's memory, prefetchers
// carry back and forth.
class InputGates {
 public:
  InputGates(const Walk& walk, const Forward& forward) : w(walk), f(forward) {}

  // A chunk's rows, step by step, and what they multiply: a member's own, kept from chunk to chunk so that it is allocated once.
  struct alignas(128) Chunk {
    std::vector<int64_t> steps;
    std::vector<int64_t> first;  // row of each step of the walk
    std::vector<const void*> operands;
    std::vector<int64_t> units;  // that take part, of each row; falling
  };

  // The biases in panels, as products add them.
  void start(const Walk::Member& me) const {
    for (int s = 0; s < w.cell.stages; ++s) {
      const int64_t panels = w.inputs[s].columns ? panel_count(w.m, w.inputs[s], w.plan_.blocks[s]) * w.plan_.blocks[s] : 0;
      for (int64_t v = split(panels, me.members, me.id); v < split(panels, me.members, me.id + 1); ++v) start_units(s, v);
    }
  }
  void pack(const Packer& packer) const {
    for (int s = 0; s < w.cell.stages; ++s) {
      const void* weights = at(f.weight_ih, w.cell.first_input_slot(s) * w.p.hidden * w.p.input * w.storage_bytes);
      void* const packed = at(packed_in(f), w.memory.packed_input[s]);
      packer.pack(w.inputs[s], w.plan_.input_blocks[s], weights, packed, kept_in(f, w.memory.input_prints[s]));
    }
  }

  // A member's part of the workspace for a stage, [panel][row][vector][lane]: where a tile begins, by the numbers of its panel and its
  // first row among the member's own. Null: there is nothing.
  struct Region {
    void* gates;
    int64_t panel_bytes, row_bytes;
    void* operator()(int64_t panel, int64_t row) const { return at(gates, panel * panel_bytes + row * row_bytes); }
  };
  // Of the walk's n-th step alone.
  Region made(const Walk::Member& me, int64_t n, int s, const Chunk& chunk) const {
    if (w.p.complete || !w.inputs[s].columns) return {nullptr, 0, 0};
    const Region region = region_of(me, s);
    return {region(0, chunk.first[size_t(n % w.plan_.chunk)]), region.panel_bytes, region.row_bytes};
  }

  void make(const Walk::Member& me, int64_t n0, Chunk& chunk) const {
    chunk.operands.clear();
    chunk.units.clear();
    chunk.steps.resize(size_t(std::min(w.plan_.chunk, w.p.steps - n0)));
    chunk.first.resize(chunk.steps.size());
    std::iota(chunk.steps.begin(), chunk.steps.end(), n0);
    if (w.p.units)
      std::stable_sort(chunk.steps.begin(), chunk.steps.end(),
                       [&](int64_t a, int64_t b) { return w.p.units[w.step(a, true)] > w.p.units[w.step(b, true)]; });
    const int64_t input_bytes = w.p.input * w.storage_bytes;
    const bool convert = converts_input(w.m, w.p);
    char* numbers = static_cast<char*>(f.workspace) + w.memory.numbers + me.id * w.plan_.chunk * w.p.batch * w.p.input * w.number_bytes;
    for (int64_t n : chunk.steps) {
      const int64_t t = w.step(n, true), token = w.offsets[size_t(t)];
      const Walk::Rows mine = w.rows_of(me, w.rows(t));
      chunk.first[size_t(n - n0)] = int64_t(chunk.operands.size());
      for (int64_t i = 0; i < mine.count; ++i) {
        const void* x = at(f.input, (token + mine[i]) * input_bytes);
        if (convert) {
          w.load_operand(x, w.p.input, numbers);
          x = numbers;
          numbers += w.p.input * w.number_bytes;
        }
        chunk.operands.push_back(x);
        if (w.p.units) chunk.units.push_back(w.p.units[t]);
      }
    }
    for (int s = 0; s < w.cell.stages; ++s) {
      if (!w.inputs[s].columns) continue;
      if (n0 == 0) clear_past_units(me, s);
      make_stage(me, s, chunk);
    }
  }

 private:
  // A stage's biases for the v-th vector of units, zeros beyond the last unit.
  void start_units(int s, int64_t v) const {
    const int64_t unit = v * w.m.lanes, n = std::min<int64_t>(w.m.lanes, w.inputs[s].units - unit), bytes = w.m.lanes * w.number_bytes;
    const int first = w.cell.first_input_slot(s), columns = w.inputs[s].columns;
    int h = 0;  // rows of U's bias before
    for (int i = 0; i < first + columns; ++i) {
      const bool biased = w.cell.biased(i);
      if (i >= first) {
        void* const to = at(f.workspace, w.memory.bias[s] + (v * columns + i - first) * bytes);
        std::memset(to, 0, size_t(bytes));
        if (n > 0 && f.bias_ih) w.storage.load(at(f.bias_ih, (i * w.p.hidden + unit) * w.storage_bytes), n, to);
        if (n > 0 && f.bias_hh && biased) w.storage.add(at(f.bias_hh, (h * w.p.hidden + unit) * w.storage_bytes), n, to);
      }
      h += biased;
    }
  }

  // Of a chunk's rows.
  Region region_of(const Walk::Member& me, int s) const {
    const auto [first, last] = w.range_of(me);
    const int64_t row_bytes = tile_row(w.m, w.inputs[s], w.plan_.blocks[s]) * w.number_bytes;
    const int64_t panels = panel_count(w.m, w.inputs[s], w.plan_.blocks[s]), rows = w.plan_.chunk * (last - first);
    const int64_t before = w.plan_.chunk * first * panels + rows * w.panels_before(me, s);
    return {at(f.workspace, w.memory.gates[s] + before * row_bytes), rows * row_bytes, row_bytes};
  }

  void make_stage(const Walk::Member& me, int s, const Chunk& chunk) const {
    const Product& product = w.inputs[s];
    const int blocks = w.plan_.input_blocks[s], finer = w.plan_.blocks[s] / blocks;
    const int64_t all = panel_count(w.m, product, blocks), part_bytes = tile_row(w.m, product, blocks) * w.number_bytes;
    const Walk::Panels own = w.panels_of(me, s);
    const Region region = region_of(me, s);
    const int64_t row_bytes = w.p.input * (w.m.pairs && !converts_input(w.m, w.p) ? w.storage_bytes : w.number_bytes);
    const Pieces inputs(row_bytes, row_bytes);
    // Of panels from the member's `number`-th on, which is `first`.
    const auto panels = [&](int64_t number, int64_t first, int64_t last, int64_t count) {
      const int64_t begin = first * finer;
      w.multiply(
          product, blocks, at(packed_in(f), w.memory.packed_input[s]), begin, std::min(last * finer, all), 0, count,
          [&](int64_t row) { return chunk.operands[size_t(row)]; },
          [&](int64_t row, int64_t panel) {
            return Sums{at(f.workspace, w.memory.bias[s] + panel * part_bytes), 0,
                        at(region(number + panel / finer - first, row), panel % finer * part_bytes), region.row_bytes / w.number_bytes};
          },
          [](int64_t, int, int64_t) {}, [&](int64_t) { return product.depth; },
          // Inputs come from far away once, for the first panel.
          [&](int64_t row, int n, int64_t unit) {
            Soon soon{};
            if (unit != begin * blocks * w.m.lanes) return soon;
            const auto place = [&](int r) { return int64_t(reinterpret_cast<intptr_t>(chunk.operands[size_t(row + r)])); };
            soon.reads[0] = inputs.at(chunk.operands[size_t(row)], run_of(n, row_bytes, place));
            return soon;
          });
    };
    if (!w.p.units) return panels(0, own.first, own.first + own.count, int64_t(chunk.operands.size()));
    for (int64_t i = 0; i < own.count; ++i) {
      const int64_t unit = own[i] * w.plan_.blocks[s] * w.m.lanes;
      panels(i, own[i], own[i] + 1, std::partition_point(chunk.units.begin(), chunk.units.end(), [&](int64_t units) {
                                      return units > unit;
                                    }) - chunk.units.begin());
    }
  }

  // Zeros where a tile reads past the last unit and no product writes.
  void clear_past_units(const Walk::Member& me, int s) const {
    const Walk::Panels own = w.panels_of(me, s);
    const int64_t vectors = ceil_div(w.inputs[s].units, w.m.lanes), vector_bytes = tile_row(w.m, w.inputs[s], 1) * w.number_bytes;
    const int64_t made = ceil_div(vectors, w.plan_.input_blocks[s]) * w.plan_.input_blocks[s];
    for (int64_t i = 0; i < own.count; ++i) {
      const int64_t past = std::max<int64_t>((own[i] + 1) * w.plan_.blocks[s] - made, 0) * vector_bytes;
      if (past <= 0) continue;
      const Region region = region_of(me, s);
      for (int64_t end = region.row_bytes; end <= region.panel_bytes; end += region.row_bytes)
        std::memset(at(region.gates, i * region.panel_bytes + end - past), 0, size_t(past));
    }
  }

  const Walk& w;
  const Forward& f;
};

}  // namespace rnnkernels::cpu

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

// The input gates of a chunk of steps, made by each member for the units and rows it owns, so that nobody waits for anybody.
class InputGates {
 public:
  InputGates(const Walk& walk, const Forward& forward) : w(walk), f(forward) {}

  // Where a chunk's rows lie and what they multiply: a member's own, kept from chunk to chunk so that it is allocated once.
  struct alignas(128) Chunk {
    std::vector<int64_t> steps;
    std::vector<int64_t> places;
    std::vector<const void*> operands;
    std::vector<int64_t> units;  // that take part, of each row; falling
  };

  void start(const Walk::Member& me) const {
    w.each_vector(me, w.p.hidden, [&](int64_t begin, int64_t n) {
      for (int i = 0, h = 0; i < w.cell.slots; ++i) {
        const bool u = w.cell.biased(i), x = w.cell.slot[i].feeds & X;
        void* const to = at(bias(), (i * w.p.hidden + begin) * w.number_bytes);
        if (x) w.load_or_zero(at(f.bias_ih, (i * w.p.hidden + begin) * w.storage_bytes), 0, n, to);
        if (x && u && f.bias_hh) w.storage.add(at(f.bias_hh, (h * w.p.hidden + begin) * w.storage_bytes), n, to);
        h += u;
      }
    });
  }
  void pack(const Packer& packer) const {
    for (int s = 0; s < w.cell.stages; ++s) {
      const void* weights = at(f.weight_ih, w.first_input_slot(s) * w.p.hidden * w.p.input * w.storage_bytes);
      void* const packed = at(packed_in(f), w.memory.packed_input[s]);
      packer.pack(w.inputs[s], w.plan_.input_blocks[s], weights, packed, kept_in(f, w.memory.input_prints[s]));
    }
  }

  // Where stage s finds the gates of the walk's n-th step: `gates` is row 0, slot 0, unit 0. For inference each member has a region of its
  // own, a chunk of its rows and units: what one core writes next to another's memory, prefetchers carry back and forth.
  struct Place {
    void* gates;
    int64_t row, slot;  // elements from a row, from a slot to the next
  };
  Place of(const Walk::Member& me, int64_t n, int s) const {
    if (w.p.training || w.p.complete)
      return {at(f.gates, w.offsets[size_t(w.step(n, true))] * f.gates_row * w.storage_bytes), f.gates_row, w.p.hidden};
    Place place = region(me, s);
    place.gates = at(place.gates, row_in_chunk(me, n % w.plan_.chunk) * place.row * w.storage_bytes);
    return place;
  }

  void make(const Walk::Member& me, int64_t n0, Chunk& chunk) const {
    chunk.places.clear();
    chunk.operands.clear();
    chunk.units.clear();
    chunk.steps.resize(size_t(std::min(w.plan_.chunk, w.p.steps - n0)));
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
      for (int64_t i = 0; i < mine.count; ++i) {
        const int64_t b = mine[i];
        chunk.places.push_back(w.p.training ? token + b : row_in_chunk(me, n - n0) + b);
        const void* x = at(f.input, (token + b) * input_bytes);
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
      const Place to = w.p.training ? Place{f.gates, f.gates_row, w.p.hidden} : region(me, s);
      make_stage(me, s, chunk, to);
    }
  }

 private:
  // A chunk's rows lie row group by row group, except that a ragged batch's groups take turns.
  int64_t row_in_chunk(const Walk::Member& me, int64_t k) const {
    if (w.p.rows) return k * w.p.batch;
    const auto [first, last] = w.range_of(me);
    return (w.plan_.chunk - 1) * first + k * (last - first);
  }

  // Rows count from the chunk's first.
  Place region(const Walk::Member& me, int s) const {
    const Walk::Units own = w.units_of(me, s);
    const int64_t first = w.first_input_slot(s), slots = w.cell.input_slots(s), width = own.end - own.begin;
    int64_t begin = w.plan_.chunk * w.p.batch * (first * w.p.hidden + slots * own.begin);
    if (w.p.units) begin += me.unit_group * w.plan_.chunk * w.p.batch * slots * width;
    return {at(f.workspace, w.memory.gates + (begin - first * width - own.begin) * w.storage_bytes), slots * width, width};
  }

  void make_stage(const Walk::Member& me, int s, const Chunk& chunk, const Place& to) const {
    const Product& product = w.inputs[s];
    if (!product.columns) return;
    const int blocks = w.plan_.input_blocks[s], finer = w.plan_.blocks[s] / blocks;
    const int64_t all = panel_count(w.m, product, blocks), rows = int64_t(chunk.places.size());
    const Walk::Panels own = w.panels_of(me, s);
    const int64_t first_slot = w.first_input_slot(s);
    const int64_t row_bytes = w.p.input * (w.m.pairs && !converts_input(w.m, w.p) ? w.storage_bytes : w.number_bytes);
    const Pieces inputs(row_bytes, row_bytes), gates(blocks * w.m.lanes * w.storage_bytes, to.slot * w.storage_bytes);
    const auto panels = [&](int64_t begin, int64_t end, int64_t count) {
      w.multiply(
          product, blocks, at(packed_in(f), w.memory.packed_input[s]), begin, std::min(end, all), 0, count,
          [&](int64_t row) { return chunk.operands[size_t(row)]; },
          [&](int64_t first, int n, int64_t unit, const void* sums) {
            w.storage.put(sums, &chunk.places[size_t(first)], n, unit, blocks, product.columns, w.p.hidden,
                          at(bias(), first_slot * w.p.hidden * w.number_bytes), at(to.gates, first_slot * to.slot * w.storage_bytes),
                          to.row, to.slot);
          },
          [&](int64_t) { return product.depth; },
          // Inputs come from far away once, for the first panel; the gates of inference stay in the cache.
          [&](int64_t first, int n, int64_t unit) {
            Soon soon{};
            if (unit == begin * blocks * w.m.lanes) {
              const auto place = [&](int r) { return int64_t(reinterpret_cast<intptr_t>(chunk.operands[size_t(first + r)])); };
              soon.reads[0] = inputs.at(chunk.operands[size_t(first)], run_of(n, row_bytes, place));
            }
            if (!w.p.training) return soon;
            const auto place = [&](int r) { return chunk.places[size_t(first + r)]; };
            soon.writes = gates.at(at(to.gates, (place(0) * to.row + first_slot * to.slot + unit) * w.storage_bytes),
                                   run_of(n, 1, place) * w.cell.room() - first_slot);
            return soon;
          });
    };
    if (!w.p.units) return panels(own.first * finer, (own.first + own.count) * finer, rows);
    for (int64_t i = 0; i < own.count; ++i)
      for (int64_t panel = own[i] * finer; panel < (own[i] + 1) * finer; ++panel) {
        const int64_t unit = panel * blocks * w.m.lanes;
        panels(panel, panel + 1, std::partition_point(chunk.units.begin(), chunk.units.end(), [&](int64_t units) {
                                   return units > unit;
                                 }) - chunk.units.begin());
      }
  }

  void* bias() const { return at(f.workspace, w.memory.bias); }

  const Walk& w;
  const Forward& f;
};

}  // namespace rnnkernels::cpu

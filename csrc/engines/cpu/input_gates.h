// What the forward walk feeds on: the input's product, made where it is used.
#pragma once

#include "engines/cpu/walk.h"

namespace rnnkernels::cpu {

// The input gates of a chunk of steps, made by each member for the units and rows it owns, so that nobody waits for anybody.
class InputGates {
 public:
  InputGates(const Walk& walk, const Forward& forward)
      : row(walk.p.training || walk.p.complete ? forward.gates_row : walk.cell.input_slots() * walk.p.hidden),
        w(walk),
        f(forward),
        bias(at(f.workspace, w.memory.bias)) {}

  const int64_t row;  // elements from a token's gates to the next one's

  void start(const Walk::Member& me) const {
    w.each_vector(me, w.p.hidden, [&](int64_t begin, int64_t n) {
      for (int i = 0, h = 0; i < w.cell.slots; ++i) {
        const bool u = w.cell.in_stage(0, i) && (w.cell.slot[i].feeds & H), x = w.cell.slot[i].feeds & X;
        void* const to = at(bias, (i * w.p.hidden + begin) * w.number_bytes);
        if (x) load_bias(f.bias_ih, i * w.p.hidden + begin, n, to);
        if (x && u && f.bias_hh) w.storage.add(at(f.bias_hh, (h * w.p.hidden + begin) * w.storage_bytes), n, to);
        h += u;
      }
    });
    int64_t slots = 0;
    for (int s = 0; s < w.cell.stages; ++s) {
      const void* weights = at(f.weight_ih, slots * w.p.hidden * w.p.input * w.storage_bytes);
      w.pack(me, w.inputs[s], w.plan_.input_blocks[s], weights, at(f.workspace, w.memory.packed_input[s]));
      slots += w.cell.input_slots(s);
    }
  }

  // Where the gates of the walk's n-th step lie. For inference a chunk's steps are B rows apart, ragged or not: members may be in different
  // chunks.
  void* of(int64_t n) const {
    if (w.p.training || w.p.complete) return at(f.gates, w.offsets[size_t(w.step(n, true))] * row * w.storage_bytes);
    return at(f.workspace, w.memory.gates + n % w.plan_.chunk * w.p.batch * row * w.storage_bytes);
  }

  void make(const Walk::Member& me, int64_t n0, std::vector<int64_t>& places, std::vector<const void*>& operands) const {
    places.clear();
    operands.clear();
    const int64_t input_bytes = w.p.input * w.storage_bytes;
    const bool convert = w.storage_bytes != w.number_bytes;
    char* numbers = static_cast<char*>(f.workspace) + w.memory.numbers + me.id * w.plan_.chunk * w.p.batch * w.p.input * w.number_bytes;
    for (int64_t n = n0; n < std::min(n0 + w.plan_.chunk, w.p.steps); ++n) {
      const int64_t t = w.step(n, true), token = w.offsets[size_t(t)];
      for (int64_t b = me.row_group; b < w.rows(t); b += me.row_groups) {
        places.push_back(w.p.training ? token + b : (n - n0) * w.p.batch + b);
        const void* x = at(f.input, (token + b) * input_bytes);
        if (convert) {
          w.storage.load(x, w.p.input, numbers);
          x = numbers;
          numbers += w.p.input * w.number_bytes;
        }
        operands.push_back(x);
      }
    }
    void* const gates = w.p.training ? f.gates : at(f.workspace, w.memory.gates);
    int64_t first_slot = 0;
    for (int s = 0; s < w.cell.stages; ++s) {
      make_stage(me, s, first_slot, places, operands, gates);
      first_slot += w.cell.input_slots(s);
    }
  }

 private:
  void load_bias(const void* from, int64_t begin, int64_t n, void* to) const {
    if (from)
      w.storage.load(at(from, begin * w.storage_bytes), n, to);
    else
      std::memset(to, 0, size_t(n * w.number_bytes));
  }

  void make_stage(const Walk::Member& me, int s, int64_t first_slot, const std::vector<int64_t>& places,
                  const std::vector<const void*>& operands, void* gates) const {
    const Product& product = w.inputs[s];
    if (!product.columns) return;
    const int blocks = w.plan_.input_blocks[s], finer = w.plan_.blocks[s] / blocks;
    const int64_t owned = panel_count(w.m, w.products[s], w.plan_.blocks[s]), all = panel_count(w.m, product, blocks);
    const int64_t begin = split(owned, me.unit_groups, me.unit_group) * finer;
    const int64_t end = std::min(split(owned, me.unit_groups, me.unit_group + 1) * finer, all);
    const int64_t slot_bytes = first_slot * w.p.hidden * w.storage_bytes;
    w.multiply(
        product, blocks, at(f.workspace, w.memory.packed_input[s]), begin, end, 0, int64_t(places.size()),
        [&](int64_t row) { return operands[size_t(row)]; },
        [&](int64_t first, int n, int64_t unit, const void* sums) {
          w.storage.put(sums, &places[size_t(first)], n, unit, blocks, product.columns, w.p.hidden,
                        at(bias, first_slot * w.p.hidden * w.number_bytes), at(gates, slot_bytes), row);
        });
  }

  const Walk& w;
  const Forward& f;
  void* const bias;
};

}  // namespace rnnkernels::cpu

// The forward pass in the pieces that a sequence and a stream share: packing, states in and out, one step.
#pragma once

#include "engines/cpu/input_gates.h"

namespace rnnkernels::cpu {

// The walk, and what the pieces below leave in the workspace of `forward`, which outlives this; its pointers may change between steps.
class Prepared {
 public:
  Prepared(const Forward& forward, const Page& page)
      : w(forward.problem, page, false), f(forward), input(w, f), hidden_bytes(w.row_bytes(w.width(0))) {}
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

  void pack(const Walk::Member& me) const {
    if (!w.p.keeps_packed || f.pack != Pack::Never) {
      const Packer packer(w, me);
      for (int s = 0; s < w.cell.stages; ++s) {
        const Packer::Kept kept = kept_in(f, w.memory.prints[s]);
        packer.pack_matrix(s, f.weights[s], at(packed_in(f), w.memory.packed[s]), f.workspace, kept);
      }
      input.pack(packer);
    }
    if (!w.p.complete) input.start(me);
  }

  // Row b's states, from [B, width] each, null for zero.
  void load(const void* const* states, int64_t b) const {
    for (int side = 0; side < 2; ++side) w.load_or_zero(states[0], b, w.width(0), at(hidden(side), b * hidden_bytes));
    for (int i = 1; i < w.cell.states; ++i) w.load_or_zero(states[i], b, w.width(i), at(carried(i), b * w.row_bytes(w.width(i))));
  }
  // `side`: on which the row's last step has left state 0. Where there is no place for a state it is not stored.
  void store(void* const* states, int64_t b, int64_t side) const {
    for (int i = 0; i < w.cell.states; ++i)
      if (states[i])
        w.storage.store(i ? at(carried(i), b * w.row_bytes(w.width(i))) : at(hidden(side), b * hidden_bytes), w.width(i),
                        at(states[i], b * w.width(i) * w.storage_bytes));
  }

  // The walk's n-th step, which reads state 0 on one side and leaves it on the other. Nobody may go on to what reads it before all of the
  // row group are here.
  void step(Walk::Member& me, int64_t n, int64_t side, InputGates::Chunk& chunk) const {
    const Problem& p = w.p;
    if (n % w.plan_.chunk == 0 && !p.complete) input.make(me, n, chunk);
    const int64_t t = w.step(n, true), token = w.offsets[size_t(t)], active = w.rows(t);
    ForwardStep step{};
    step.hidden = p.hidden;
    step.output = p.output;
    step.complete = p.complete;
    step.gates = p.complete ? at(f.gates, token * f.gates_row * w.storage_bytes) : nullptr;
    step.gates_row = f.gates_row;
    step.gates_slot = p.hidden;
    step.kept = p.training ? at(f.gates, token * f.gates_row * w.storage_bytes) : nullptr;
    step.between = at(f.workspace, w.memory.between);
    step.between_row = w.row_bytes(w.cell.kept * p.hidden) / w.number_bytes;
    step.between_slot = p.hidden;
    for (int i = 0; i < w.cell.vectors; ++i) step.vectors[i] = f.vectors[i];
    for (int i = 0; i < w.cell.given_slots(); ++i) {
      step.given[i] = at(f.given[i].data, token * f.given[i].token * w.storage_bytes);
      step.given_row[i] = f.given[i].row;
    }
    for (int i = 0; i < w.cell.states; ++i) step.state_row[i] = w.row_bytes(w.width(i)) / w.number_bytes;
    step.previous[0] = hidden(side);
    step.next[0] = hidden(1 - side);
    step.history[0] = at(f.output, token * w.width(0) * w.storage_bytes);
    for (int i = 1; i < w.cell.states; ++i) {
      step.previous[i] = step.next[i] = carried(i);
      step.history[i] = at(f.history[i], token * w.width(i) * w.storage_bytes);
    }
    if (n + 1 < p.steps) w.set_resets(step, w.marks_after(t), f.reset);
    const int width = w.cell.moments();
    void* const moments = at(f.workspace, w.memory.totals + me.id * p.batch * width * w.number_bytes);
    step.moments = moments;
    step.partial_row = partial_row(w.m, w.cell, p);
    for (int s = 0; s < w.cell.stages; ++s) {
      if (s > 0) w.wait(me);
      if (s > 0 && w.cell.stage[s - 1].sums)
        w.add_sums(me, s - 1, w.cell.stage[s - 1].sums, true, active, f.workspace, moments, width, w.cell.moments(s - 1));
      step.partial = width ? w.partial(f.workspace, s) : nullptr;
      const InputGates::Region made = input.made(me, n, s, chunk);
      const int operand = w.cell.stage[s].operand;
      const int64_t between_bytes = w.row_bytes(w.cell.kept * p.hidden), units = w.units(t, s);
      w.tiles(
          me, s, active, units, !p.complete, side, packed_in(f), f.workspace,
          [&](int64_t row) -> const void* {
            if (operand == kPreviousState) return at(step.previous[0], row * hidden_bytes);
            return at(step.between, row * between_bytes + operand * p.hidden * w.number_bytes);
          },
          [&](int64_t unit) { return p.units ? Walk::Depth{unit / p.module * p.module, w.products[s].depth} : w.whole(s); }, made,
          [&](const RowSet& rows, int64_t unit, const void* given, const void* sums) {
            w.page.forward[s](step, rows, unit, units, w.plan_.blocks[s], given, sums);
          },
          [&](const RowSet& rows, int64_t unit) {
            Soon soon{};
            if (p.training && rows.stride == 1 && !rows.order)
              soon.writes = Pieces(w.plan_.blocks[s] * w.m.lanes * w.storage_bytes, p.hidden * w.storage_bytes)
                                .at(at(step.kept, (rows[0] * f.gates_row + unit) * w.storage_bytes), rows.count * w.cell.room());
            return soon;
          });
      if (units < w.width_of_stage(s)) hold(me, step, active, units);
    }
    if (width && f.moments && me.unit_group == 0) {
      const Walk::Rows mine = w.rows_of(me, active);
      const int64_t bytes = width * w.number_bytes;
      for (int64_t i = 0; i < mine.count; ++i)
        std::memcpy(at(f.moments, (token + mine[i]) * bytes), at(moments, mine[i] * bytes), size_t(bytes));
    }
  }

  Walk w;

 private:
  // This member's share of the units from `first` on, which take no part in the step: their state goes on as it is.
  void hold(const Walk::Member& me, const ForwardStep& step, int64_t active, int64_t first) const {
    const Walk::Rows mine = w.rows_of(me, active);
    const int64_t count = w.width(0) - first, begin = first + split(count, me.unit_groups, me.unit_group),
                  units = first + split(count, me.unit_groups, me.unit_group + 1) - begin;
    for (int64_t i = 0; i < mine.count; ++i) {
      const int64_t row = mine[i], number = row * hidden_bytes + begin * w.number_bytes;
      const void* const before = at(step.previous[0], number);
      void* const next = at(step.next[0], number);
      w.storage.store(before, units, at(step.history[0], (row * w.width(0) + begin) * w.storage_bytes));
      if (step.resets && step.resets[row] >= 0)
        w.load_or_zero(at(step.reset[0], (row * step.reset_row[0] + begin) * w.storage_bytes), 0, units, next);
      else
        std::memcpy(next, before, size_t(units * w.number_bytes));
    }
  }

  void* hidden(int64_t side) const { return at(f.workspace, w.memory.state[0] + side * w.p.batch * hidden_bytes); }
  void* carried(int i) const { return at(f.workspace, w.memory.state[i]); }

  const Forward& f;
  const InputGates input;
  const int64_t hidden_bytes;
};

}  // namespace rnnkernels::cpu

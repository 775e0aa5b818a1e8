// The walk over time, forward and backward, for any page.
#include "engines/cpu/engine.h"

#include "core/apart.h"

#include "engines/cpu/gradients.h"
#include "engines/cpu/prepared.h"

namespace rnnkernels::cpu {

std::string fits(const Problem& p, const Page& page) {
  if (p.complete && (p.steps != 1 || page.cell.stages != 1)) return "complete gates are for one step of a cell of one stage";
  if (p.rows && (p.lengths || p.resets || p.units)) return "lengths, resets and units are for padded batches";
  if (p.complete && (p.lengths || p.resets || p.units)) return "complete gates are for one whole step";
  if (p.resets && p.steps * p.batch >= INT32_MAX) return "resets are for up to 2^31 tokens";
  if (p.units && (page.cell.slots != 1 || !page.cell.has_matrix() || p.module < 1))
    return "units that take no part are for cells of one slot with a matrix";
  if (p.weight_type != WeightType::Numbers && (p.training || p.storage == Storage::F64 || p.units))
    return "narrower weights are for inference in float32 and half types where all units take part";
  if (p.keeps_packed && p.complete) return "packed weights are kept where the engine multiplies";
  return "";
}

int lanes(const Problem& p) { return machine(current(), p).lanes; }

Schedule schedule(const Problem& p, const Page& page, bool backward) { return plan(machine(current(), p), page.cell, p, backward); }

std::vector<Team> teams(const Problem& p, const Page& page, bool training) {
  Team found[kTeams];
  const int count = rnnkernels::teams(machine(current(), p), page.cell, p, training, found);
  return {found, found + count};
}

Packing packing(const Problem& p, const Page& page) {
  const Machine m = machine(current(), p);
  const Schedule s = plan(m, page.cell, p, false);
  Packing found{layout(m, page.cell, p, s, false).packed_bytes,
                {p.cell, int(p.storage), int(p.weight_type), p.input, p.hidden, p.output, m.lanes, m.pairs}};
  for (int stage = 0; stage < page.cell.stages; ++stage) {
    found.shape.push_back(s.blocks[stage]);
    found.shape.push_back(s.input_blocks[stage]);
  }
  return found;
}

int64_t workspace_bytes(const Problem& p, const Page& page, bool backward) {
  const Machine m = machine(current(), p);
  return layout(m, page.cell, p, plan(m, page.cell, p, backward), backward).bytes;
}

namespace {

// `below`: how far the call has come that makes the input; `own`: how far this one has. Of one thread each; or null.
void forward(const Forward& f, const Page& page, const Progress* below, Progress* own) {
  Prepared run(f, page);
  Walk& w = run.w;
  run_team(w.plan_.threads(), [&](int id, int members) {
    const Registers registers(w.m.pairs ? w.isa.pairs : nullptr);
    Walk::Member me = w.member(id, members);
    w.start(me);
    run.pack(me);
    w.each_row(me, [&](int64_t b) { run.load(f.initial, b); });
    w.clear_past_ends(me, w.width(0), f.output);
    for (int i = 1; i < w.cell.states; ++i) w.clear_past_ends(me, w.width(i), f.history[i]);
    meet(members);
    InputGates::Chunk chunk;
    for (int64_t n = 0; n < w.p.steps; ++n) {
      const int64_t end = std::min(n / w.plan_.chunk * w.plan_.chunk + w.plan_.chunk, w.p.steps);
      if (below && n % w.plan_.chunk == 0) below->wait_for(end);
      run.step(me, n, n & 1, chunk);
      if (w.products[0].depth || w.cell.stages > 1) w.wait(me);
      if (own && n + 1 == end) own->reach(end);
    }
    meet(members);
    // A row's last state is on the side that its last step wrote: with rows that end early, each on its own.
    w.each_row(me, [&](int64_t b) { run.store(f.final, b, (w.p.reverse ? w.p.steps : w.steps_of(b)) & 1); });
  });
}

}  // namespace

void forward(const Forward& f, const Page& page) { forward(f, page, nullptr, nullptr); }

namespace {

// The units of a tile from `first` on that take no part in the step: their state's gradient goes on as it is, and they have no gates.
void hold_back(const Walk& w, const BackwardStep& step, const RowSet& rows, int64_t unit, int64_t first, const void* sums) {
  const int64_t panel_units = w.plan_.blocks[0] * w.m.lanes, begin = std::max(unit, first);
  const int64_t units = std::min(unit + panel_units, w.width(0)) - begin;
  if (units <= 0) return;
  for (int r = 0; r < rows.count; ++r) {
    const int64_t row = rows[r], place = row * w.width(0) + begin;
    void* const total = at(step.carried[0], (row * step.carried_row[0] + begin) * w.number_bytes);
    if (sums) w.ops.add(at(sums, (r * panel_units + begin - unit) * w.number_bytes), units, total);
    if (step.resets_after && step.resets_after[row] >= 0) {
      const int64_t mark = step.resets_after[row] * w.width(0) + begin;
      if (step.grad_reset[0]) w.storage.store(total, units, at(step.grad_reset[0], mark * w.storage_bytes));
      std::memset(total, 0, size_t(units * w.number_bytes));
    }
    if (step.grad_states[0]) w.storage.add(at(step.grad_states[0], place * w.storage_bytes), units, total);
    std::memset(at(step.grad_gates, place * w.storage_bytes), 0, size_t(units * w.storage_bytes));
    std::memset(at(step.operand[0], (row * step.operand_row[0] + begin) * w.number_bytes), 0, size_t(units * w.number_bytes));
  }
}

// This member's share of kept values to where gradients go. Past a row's end nothing was kept, and gradients are zero.
void hand_on(const Walk& w, const Walk::Member& me, const void* kept, int64_t token_bytes, void* to) {
  const auto copy = [&](int64_t begin, int64_t end) {
    std::memcpy(at(to, begin * token_bytes), at(kept, begin * token_bytes), size_t((end - begin) * token_bytes));
  };
  if (!w.p.lengths) return copy(split(w.offsets.back(), me.members, me.id), split(w.offsets.back(), me.members, me.id + 1));
  w.each_row(me, [&](int64_t b) {
    for (int64_t t = 0; t < w.p.lengths[b]; ++t) copy(t * w.p.batch + b, t * w.p.batch + b + 1);
  });
}

}  // namespace

void backward(const Backward& g, const Page& page) {
  Walk w(g.problem, page, true);
  const Problem& p = w.p;
  const int last = w.cell.stages - 1, newest = w.cell.states - 1;
  const int64_t gates_bytes = w.row_bytes(w.cell.hidden_slots(0) * p.hidden);  // stage 0's operand, as the step before it in time reads it
  void* const gates[2] = {at(g.workspace, w.memory.operand[0]), at(g.workspace, w.memory.operand[0] + p.batch * gates_bytes)};
  auto carried = [&](int i) { return at(g.workspace, w.memory.state[i]); };
  const auto nothing = [](int64_t, int64_t) -> const void* { return nullptr; };  // to add a tile's sums to

  // The stages hand a token's kept values on to each other where the gradients go; a cell of one stage reads them once.
  const int64_t token_bytes = w.cell.room() * p.hidden * w.storage_bytes;
  const bool copy = w.cell.stages > 1 && g.kept != g.grad_gates;
  const void* const kept = copy ? g.grad_gates : g.kept;

  Gradients products(w, g);
  run_team(w.plan_.threads(), [&](int id, int members) {
    const Registers registers(w.m.pairs ? w.isa.pairs : nullptr);
    Walk::Member me = w.member(id, members);
    w.start(me);
    const Packer packer(w, me);
    for (int s = 0; s < w.cell.stages; ++s) {
      void* const packed = at(g.workspace, w.memory.packed[s]);
      packer.pack_transposed(w.products[s], w.plan_.blocks[s], g.weights[s < last ? s + 1 : 0], packed);
      packer.clear_below_blocks(s, packed);
    }
    products.start(me);
    w.clear_past_ends(me, p.input, g.grad_input);
    if (w.cell.given_slots()) w.clear_past_ends(me, w.cell.room() * p.hidden, g.grad_gates);
    if (copy) hand_on(w, me, g.kept, token_bytes, g.grad_gates);
    w.each_row(me, [&](int64_t b) {
      for (int i = 0; i < w.cell.states; ++i) w.load_or_zero(g.grad_final[i], b, w.width(i), at(carried(i), b * w.row_bytes(w.width(i))));
      for (int side = 0; side < 2; ++side) std::memset(at(gates[side], b * gates_bytes), 0, size_t(gates_bytes));
    });
    meet(members);
    for (int64_t n = 0; n < p.steps; ++n) {
      const int64_t t = w.step(n, false), token = w.offsets[size_t(t)], active = w.rows(t);
      const int64_t before = p.reverse ? t + 1 : t - 1;
      const bool has_before = before >= 0 && before < p.steps;
      BackwardStep step{};
      step.hidden = p.hidden;
      step.output = p.output;
      step.kept = at(kept, token * token_bytes);
      step.grad_gates = at(g.grad_gates, token * token_bytes);
      for (int i = 0; i < w.cell.vectors; ++i) step.vectors[i] = g.vectors[i];
      const bool asked = w.asks_for_pages(me, last, active);
      step.ahead = n + 1 < p.steps && !asked ? w.offsets[size_t(w.step(n + 1, false))] - token : 0;
      step.previous_rows = !has_before ? 0 : p.rows ? std::min(active, w.rows(before)) : p.batch;
      step.lengths = p.lengths;
      step.before = before;
      w.set_resets(step, w.marks_before(t), g.reset);
      step.resets_after = w.marks_after(t);
      for (int i = 0; i < w.cell.states; ++i) step.grad_reset[i] = g.grad_reset[i];
      for (int i = 0; i < w.cell.states; ++i) step.grad_states[i] = at(g.grad_states[i], token * w.width(i) * w.storage_bytes);
      for (int i = 0; i < w.cell.states; ++i) {
        const void* states = i == 0 ? g.output : g.history[i];
        step.states[i] = at(states, token * w.width(i) * w.storage_bytes);
        step.previous[i] = has_before ? at(states, w.offsets[size_t(before)] * w.width(i) * w.storage_bytes) : nullptr;
        step.initial[i] = g.initial[i];
        step.carried[i] = carried(i);
        step.carried_row[i] = w.row_bytes(w.width(i)) / w.number_bytes;
      }
      step.operand[0] = gates[n & 1];
      for (int s = 1; s < w.cell.stages; ++s) step.operand[s] = at(g.workspace, w.memory.operand[s]);
      for (int s = 0; s < w.cell.stages; ++s) {
        step.operand_slot[s] = w.width_of_stage(s);
        step.operand_row[s] = w.row_bytes(w.cell.hidden_slots(s) * w.width_of_stage(s)) / w.number_bytes;
      }
      const int width = w.cell.moments();
      step.moments = at(g.moments, token * width * w.number_bytes);
      void* const means = at(g.workspace, w.memory.totals + me.id * p.batch * kMaxSums * w.number_bytes);
      step.means = means;
      step.partial_row = partial_row(w.m, w.cell, p);
      for (int s = last; s >= 0; --s) {
        if (s < last && w.cell.stage[s + 1].back_sums)
          w.add_sums(me, s + 1, w.cell.stage[s + 1].back_sums, false, active, g.workspace, means, kMaxSums, 0);
        step.partial = width ? w.partial(g.workspace, s) : nullptr;
        const void* read = s < last ? step.operand[s + 1] : gates[~n & 1];
        const int64_t row_bytes = w.row_bytes(w.products[s].depth), units = w.units(t, s);
        w.tiles(
            me, s, active, w.width_of_stage(s), !p.complete && (n > 0 || s < last), n & 1, g.workspace, g.workspace,
            [&](int64_t row) { return at(read, row * row_bytes); },
            [&](int64_t unit) {
              Walk::Depth depth = w.readers(s, unit);
              if (p.units) depth.end = std::min(depth.end, p.units[w.step(n - 1, false)]);
              return depth;
            },
            nothing,
            [&](const RowSet& rows, int64_t unit, const void*, const void* sums) {
              if (unit < units) w.page.backward[s](step, rows, unit, units, w.plan_.blocks[s], sums);
              if (p.units && unit + w.plan_.blocks[s] * w.m.lanes > units) hold_back(w, step, rows, unit, units, sums);
            },
            [&](const RowSet& rows, int64_t unit) {
              Soon soon{};
              if (!asked || s < last) return soon;
              const auto panel_of = [&](const void* memory, int64_t width, int slots) {
                return Pieces(w.plan_.blocks[s] * w.m.lanes * w.storage_bytes, width * w.storage_bytes)
                    .at(at(memory, (rows[0] * slots * width + unit) * w.storage_bytes), rows.count * slots);
              };
              soon.reads[0] = panel_of(step.previous[newest], w.width(newest), 1);
              soon.reads[1] = panel_of(step.grad_states[0], w.width(0), 1);
              soon.reads[2] = panel_of(step.kept, p.hidden, w.cell.room());
              return soon;
            });
        if (w.products[s].depth || w.cell.stages > 1) w.wait(me);
      }
      products.add(me, n);
    }
    meet(members);
    products.finish(me);
    if (g.grad_initial[0]) {
      const int64_t units = w.width(0);
      auto finish = [&](int64_t row, int64_t unit, int64_t n, const void* sums) {
        void* total = at(carried(0), row * w.row_bytes(units) + unit * w.number_bytes);
        if (sums) w.ops.add(sums, n, total);
        w.storage.store(total, n, at(g.grad_initial[0], (row * units + unit) * w.storage_bytes));
      };
      // Each row's first step was the walk's last visit to it, and left its gate gradients on that visit's side.
      auto side = [&](int64_t row) -> const void* {
        const int64_t visits = p.reverse ? w.steps_of(row) : p.steps;
        return at(gates[~visits & 1], row * gates_bytes);
      };
      const int64_t panel_units = w.plan_.blocks[last] * w.m.lanes;
      w.tiles(
          me, last, p.batch, units, !p.complete, false, g.workspace, g.workspace, side, [&](int64_t unit) { return w.readers(last, unit); },
          nothing,
          [&](const RowSet& rows, int64_t unit, const void*, const void* sums) {
            for (int r = 0; r < rows.count; ++r)
              finish(rows[r], unit, std::min(panel_units, units - unit), at(sums, r * panel_units * w.number_bytes));
          },
          [](const RowSet&, int64_t) {});
    }
    w.each_row(me, [&](int64_t b) {
      for (int i = 1; i < w.cell.states; ++i)
        if (g.grad_initial[i])
          w.storage.store(at(carried(i), b * w.row_bytes(w.width(i))), w.width(i), at(g.grad_initial[i], b * w.width(i) * w.storage_bytes));
    });
  });
}

namespace {

template <class Call, class Run>
void each_apart(const std::vector<const Call*>& calls, int threads, const Run& run) {
  std::vector<const Page*> pages;  // whoever has none says so before there are threads
  for (const Call* call : calls) pages.push_back(&page_of(call->problem));
  run_apart(int(calls.size()), threads, [&](int i) { run(size_t(i), *calls[size_t(i)], *pages[size_t(i)]); });
}

}  // namespace

bool gains_apart(const Problem& p, bool training) { return rnnkernels::gains_apart(machine(current(), p), page_of(p).cell, p, training); }

void forward(const std::vector<const Forward*>& calls) {
  each_apart(calls, int(calls.size()), [](size_t, const Forward& f, const Page& page) { forward(f, page); });
}
void backward(const std::vector<const Backward*>& calls) {
  each_apart(calls, int(calls.size()), [](size_t, const Backward& g, const Page& page) { backward(g, page); });
}

bool gains_chained(const Problem& p, int64_t first_input, int layers) {
  return rnnkernels::gains_chained(machine(current(), p), page_of(p).cell, p, first_input, layers);
}
void forward_chain(const std::vector<const Forward*>& calls, int threads) {
  std::vector<Progress> progress(calls.size());
  each_apart(calls, threads,
             [&](size_t i, const Forward& f, const Page& page) { forward(f, page, i ? &progress[i - 1] : nullptr, &progress[i]); });
}

}  // namespace rnnkernels::cpu

// The persistent kernels: a whole sequence in one launch, for any page. One thread's code, as in block.h.
#pragma once

#include "core/step.h"
#include "engines/cuda/block.h"
#include "num/scalar.h"

namespace rnnkernels::cuda {

using Number = scalar::F32;

// Sequences that do not depend on each other: the problem is that of all, but for its direction. Problem::rows is a host pointer; blocks
// read where each step's tokens start.
struct PersistentForward {
  Forward call[kSequences];
  Tiling tiling;
  const int64_t* offsets;       // [T + 1]
  void* workspace[kSequences];  // packets: zeros; the weights as pack() leaves them
};

struct PersistentBackward {
  Backward
      call[kSequences];  // for a cell of several stages kept and grad_gates are the same memory, which the stages hand on to each other
  Tiling tiling;
  const int64_t* offsets;
  void* workspace[kSequences];
};

template <class T>
RNN_FN T* plus(T* base, int64_t elements) {
  return base ? base + elements : nullptr;
}
template <class S>
RNN_FN float number_at(const void* base, int64_t element) {
  return base ? widen(static_cast<const S*>(base)[element]) : 0.0f;
}
template <class S>
RNN_FN S storage_at(const void* base, int64_t element) {
  return base ? static_cast<const S*>(base)[element] : narrow<S>(0.0f);
}

// The input gates of a thread's first unit of a group, in registers: asked for before the wait for the others' state.
template <class Cell, int s, class S>
struct Fetched {
  static constexpr int slots = InfoOf<Cell>::value.slots;
  S gate[slots]{};
  template <int i>
  RNN_FN Number get(Index<i>) const {
    return Number(widen(gate[i]));
  }
  RNN_FN void fetch(const S* gates, int64_t slot) {
    each<slots>([&](auto index) {
      constexpr int i = decltype(index)::value;
      if constexpr (InfoOf<Cell>::value.in_stage(s, i) && (InfoOf<Cell>::value.slot[i].feeds & X)) gate[i] = gates[i * slot];
    });
  }
};

// Stage s of the forward walk's visit n, and the stages after it.
template <int s, class Cell, class S, class Arithmetic, class Cta>
RNN_FN void forward_stages(const Block<Cell, S, Arithmetic, Cta>& b, const typename Block<Cell, S, Arithmetic, Cta>::Held& held,
                           const Forward& f, int64_t n, int64_t step, int count) {
  using Info = InfoOf<Cell>;
  constexpr int stages = Info::value.stages, states = Info::value.states, vectors = Info::value.vectors, kept = Info::value.kept;
  if constexpr (s < stages) {
    const Problem& p = b.p;
    const Tiling& t = b.t;
    const StageTiling& g = t.stage[s];
    const int64_t before = b.reverse ? step + 1 : step - 1;
    const int known = n == 0 ? 0 : b.active(before) < count ? b.active(before) : count;  // rows that had a visit before
    const int64_t token = b.offsets[step] + b.first_row, u0 = b.unit0[s];
    constexpr int columns = Info::value.hidden_slots(s), operand = Info::value.stage[s].operand, group = Arithmetic::shape.group;
    constexpr bool last = s == stages - 1;
    constexpr int reader = last ? 0 : s + 1, read = Info::value.stage[reader].operand;  // who reads what this stage gives
    constexpr int places = vectors ? vectors : 1, sums = columns ? columns : 1;
    constexpr bool sends = Info::value.hidden_slots(reader) > 0;

    ForwardStep x{};
    x.hidden = p.hidden;
    x.output = p.output;
    x.gates_row = f.gates_row;
    x.gates_slot = p.hidden;
    x.gates = static_cast<const S*>(f.gates) + token * f.gates_row;
    x.kept = p.training ? static_cast<S*>(f.gates) + token * f.gates_row : nullptr;
    if (stages > 1) {
      x.between = b.numbers(t.between) - u0;
      x.between_slot = g.block_units;
      x.between_row = kept * g.block_units;
    }
    each<states>([&](auto index) {
      constexpr int i = decltype(index)::value;
      if constexpr (Info::value.sees(s, i)) {
        x.previous[i] = x.next[i] = b.numbers(t.state[i]) - u0;
        x.state_row[i] = g.block_units;
        x.history[i] = plus(static_cast<S*>(i == 0 ? f.output : f.history[i]), token * g.units);
      }
    });
    Fetched<Cell, s, S> fetched;
    const auto fetch = [&](int row) {
      if (b.units[s] == 0) return;
      row += b.cta.thread() / b.units[s];
      if (row < count) fetched.fetch(static_cast<const S*>(x.gates) + row * x.gates_row + u0 + b.cta.thread() % b.units[s], x.gates_slot);
    };
    fetch(0);
    for (int first = 0; first < count; first += t.rows_at_once) {
      const int some = count - first < t.rows_at_once ? count - first : t.rows_at_once;
      if (columns)
        b.receive(
            s, first, some, [&](int row) { return operand != kPreviousState ? n
                                                  : row < known             ? n - 1
                                                                            : kNoVisit; },
            [&](int row, int64_t k) { return storage_at<S>(f.initial[0], (b.first_row + row) * t.stage[stages - 1].units + k); });
      for (int ahead = 0; ahead < some; ahead += group) {
        const int rows = some - ahead < group ? some - ahead : group;
        if (columns) b.template multiply<s>(held, ahead, rows);
        b.each_unit(s, rows, [&](int row, int u) {
          const int64_t unit = u0 + u;
          Number w[places];
          load_vectors<Cell, Number, S>(f.vectors, unit, 1, w);
          float sum[sums];
          RNN_UNROLL
          for (int c = 0; c < columns; ++c) sum[c] = b.total(s, row, c, u);
          const float* const given = columns ? sum : nullptr;
          const int64_t at = first + ahead + row;
          Fetched<Cell, s, S> gates = fetched;
          if (row * b.units[s] + u >= kThreads) gates.fetch(static_cast<const S*>(x.gates) + at * x.gates_row + unit, x.gates_slot);
          forward_units<Cell, s, Number, S>(x, w, at, unit, 1, given, 1, gates, static_cast<Number*>(nullptr));
        });
        if (columns || sends) b.cta.sync();
        if (sends)
          b.send(s, n, first + ahead, rows, [&](int row, int, int u) {
            return last ? b.numbers(t.state[0])[row * g.block_units + u] : b.numbers(t.between)[(row * kept + read) * g.block_units + u];
          });
        fetch(first + ahead + rows);
      }
    }
    forward_stages<s + 1>(b, held, f, n, step, count);
  }
}

template <class Cell, class S, class Arithmetic, class Cta>
RNN_FN void persistent_forward(Cta& cta, const PersistentForward& r) {
  constexpr int stages = InfoOf<Cell>::value.stages, states = InfoOf<Cell>::value.states;
  using Block = cuda::Block<Cell, S, Arithmetic, Cta>;
  const int sequence = cta.block() / r.tiling.sequence_blocks();
  const Forward& f = r.call[sequence];
  void* const workspace = r.workspace[sequence];
  const Block b(cta, r.call[0].problem, f.problem.reverse, r.tiling, r.offsets, static_cast<Packet*>(workspace));
  typename Block::Held held;
  each<stages>([&](auto index) {
    constexpr int s = decltype(index)::value;
    if constexpr (InfoOf<Cell>::value.hidden_slots(s) > 0) b.template load_weights<s>(held, workspace);
  });
  const auto each_state = [&](const auto& each) {
    RNN_UNROLL
    for (int i = 0; i < states; ++i) {
      const int s = i == 0 ? stages - 1 : 0;
      float* const state = b.numbers(b.t.state[i]);
      b.each_unit(s, b.rows, [&](int row, int u) {
        each(i, (b.first_row + row) * b.t.stage[s].units + b.unit0[s] + u, state[row * b.t.stage[s].block_units + u]);
      });
    }
  };
  each_state([&](int i, int64_t at, float& state) { state = number_at<S>(f.initial[i], at); });
  b.open();
  for (int64_t n = 0; n < b.p.steps; ++n) {
    const int64_t step = b.step(n, true);
    const int count = b.active(step);
    if (count > 0)
      forward_stages<0>(b, held, f, n, step, count);
    else if (!b.reverse)
      break;  // rows only leave
  }
  b.close();
  each_state([&](int i, int64_t at, float& state) { static_cast<S*>(f.final[i])[at] = narrow<S>(state); });
}

// Stage s of the backward walk's visit n, and the stages before it.
template <int s, class Cell, class S, class Arithmetic, class Cta>
RNN_FN void backward_stages(const Block<Cell, S, Arithmetic, Cta>& b, const typename Block<Cell, S, Arithmetic, Cta>::Held& held,
                            const Backward& g, int64_t n, int64_t step, int count) {
  using Info = InfoOf<Cell>;
  if constexpr (s >= 0) {
    constexpr int stages = Info::value.stages, states = Info::value.states, vectors = Info::value.vectors;
    constexpr bool last = s == stages - 1;
    constexpr int reader = last ? 0 : s + 1, columns = Info::value.hidden_slots(s), group = Arithmetic::shape.group;
    constexpr bool reads = Info::value.hidden_slots(reader) > 0;
    constexpr int places = vectors ? vectors : 1;
    const Problem& p = b.p;
    const Tiling& t = b.t;
    const int64_t u0 = b.unit0[s], width = t.stage[s].units;
    const int units = t.stage[s].block_units;
    const int64_t begin = b.offsets[step], token = begin + b.first_row;
    const int64_t after = b.reverse ? step - 1 : step + 1;  // the step that the walk visited before
    const int known = !last ? count : n == 0 ? 0 : b.active(after) < count ? b.active(after) : count;
    const int64_t before = b.reverse ? step + 1 : step - 1;
    const bool has_before = before >= 0 && before < p.steps;

    BackwardStep x{};
    x.hidden = p.hidden;
    x.output = p.output;
    const int64_t room = Info::value.room() * p.hidden;
    x.kept = static_cast<const S*>(g.kept) + token * room;
    x.grad_gates = static_cast<S*>(g.grad_gates) + token * room;
    x.ahead = has_before ? b.offsets[before] - begin : 0;
    x.previous_rows = has_before ? b.active(before) : 0;
    each<states>([&](auto index) {
      constexpr int i = decltype(index)::value;
      if constexpr (Info::value.sees(s, i)) {
        const S* after_steps = static_cast<const S*>(i == 0 ? g.output : g.history[i]);
        x.states[i] = after_steps + token * width;
        x.grad_states[i] = plus(static_cast<const S*>(g.grad_states[i]), token * width);
        x.previous[i] = has_before ? after_steps + (b.offsets[before] + b.first_row) * width : nullptr;
        x.initial[i] = plus(static_cast<const S*>(g.initial[i]), b.first_row * width);
        x.carried[i] = b.numbers(t.state[i]) - u0;
        x.carried_row[i] = units;
      }
    });
    x.operand_slot[s] = units;
    x.operand_row[s] = columns * units;
    float* const staged = b.numbers(t.staged[s]);
    for (int first = 0; first < count; first += t.rows_at_once) {
      const int some = count - first < t.rows_at_once ? count - first : t.rows_at_once;
      const bool multiply = reads && first < known;
      if (multiply)
        b.receive(
            s, first, some, [&](int row) { return row < known ? last ? n - 1 : n : kNoVisit; },
            [](int, int64_t) { return narrow<S>(0.0f); });
      for (int ahead = 0; ahead < some; ahead += group) {
        const int rows = some - ahead < group ? some - ahead : group, from = first + ahead;
        if (multiply) b.template multiply<s>(held, ahead, rows);
        x.operand[s] = staged - u0 - from * columns * units;
        b.each_unit(s, rows, [&](int row, int u) {
          const int64_t unit = u0 + u;
          Number w[places];
          load_vectors<Cell, Number, S>(g.vectors, unit, 1, w);
          const float sum = multiply ? b.total(s, row, 0, u) : 0.0f;
          backward_units<Cell, s, Number, S>(x, w, from + row, unit, 1, &sum, static_cast<Number*>(nullptr));
        });
        if (columns || reads) b.cta.sync();
        if (columns) {
          b.send(s, n, from, rows, [&](int row, int c, int u) { return staged[((row - from) * columns + c) * units + u]; });
          if (from + rows < count) b.cta.sync();  // the next rows are staged in the same place
        }
      }
    }
    backward_stages<s - 1>(b, held, g, n, step, count);
  }
}

template <class Cell, class S, class Arithmetic, class Cta>
RNN_FN void persistent_backward(Cta& cta, const PersistentBackward& r) {
  constexpr int stages = InfoOf<Cell>::value.stages, states = InfoOf<Cell>::value.states, last = stages - 1;
  constexpr bool returns = InfoOf<Cell>::value.hidden_slots(0) > 0;
  using Block = cuda::Block<Cell, S, Arithmetic, Cta>;
  const int sequence = cta.block() / r.tiling.sequence_blocks();
  const Backward& g = r.call[sequence];
  void* const workspace = r.workspace[sequence];
  const Problem& p = r.call[0].problem;
  const Block b(cta, p, g.problem.reverse, r.tiling, r.offsets, static_cast<Packet*>(workspace));
  typename Block::Held held;
  each<stages>([&](auto index) {
    constexpr int s = decltype(index)::value, reader = s < last ? s + 1 : 0;
    if constexpr (InfoOf<Cell>::value.hidden_slots(reader) > 0) b.template load_weights<s>(held, workspace);
  });
  const auto each_state = [&](int i, const auto& each) {
    const int s = i == 0 ? last : 0;
    float* const state = b.numbers(b.t.state[i]);
    b.each_unit(s, b.rows, [&](int row, int u) {
      each((b.first_row + row) * b.t.stage[s].units + b.unit0[s] + u, state[row * b.t.stage[s].block_units + u]);
    });
  };
  RNN_UNROLL
  for (int i = 0; i < states; ++i) each_state(i, [&](int64_t at, float& state) { state = number_at<S>(g.grad_final[i], at); });
  b.open();
  for (int64_t n = 0; n < p.steps; ++n) {
    const int64_t step = b.step(n, false);
    const int count = b.active(step);
    if (count > 0)
      backward_stages<last>(b, held, g, n, step, count);
    else if (b.reverse)
      break;
  }
  cta.sync();
  RNN_UNROLL
  for (int i = 1; i < states; ++i)
    if (g.grad_initial[i]) each_state(i, [&](int64_t at, float& state) { static_cast<S*>(g.grad_initial[i])[at] = narrow<S>(state); });
  if (g.grad_initial[0]) {
    // Each row's first step was the walk's last visit to it.
    constexpr int group = Arithmetic::shape.group;
    const StageTiling& s = b.t.stage[last];
    for (int first = 0; first < b.rows; first += b.t.rows_at_once) {
      const int some = b.rows - first < b.t.rows_at_once ? b.rows - first : b.t.rows_at_once;
      if (returns)
        b.receive(
            last, first, some, [&](int row) { return (b.reverse ? b.steps_of(row) : p.steps) - 1; },
            [](int, int64_t) { return narrow<S>(0.0f); });
      for (int ahead = 0; ahead < some; ahead += group) {
        const int rows = some - ahead < group ? some - ahead : group;
        if (returns) b.template multiply<last>(held, ahead, rows);
        b.each_unit(last, rows, [&](int row, int u) {
          const int64_t at = first + ahead + row;
          const float carried = b.numbers(b.t.state[0])[at * s.block_units + u], sum = returns ? b.total(last, row, 0, u) : 0.0f;
          static_cast<S*>(g.grad_initial[0])[(b.first_row + at) * s.units + b.unit0[last] + u] = narrow<S>(carried + sum);
        });
        cta.sync();
      }
    }
  }
  b.close();
}

}  // namespace rnnkernels::cuda

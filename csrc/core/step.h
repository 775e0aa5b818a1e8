// A page between memory and registers: one vector of units of one row of one step, loaded, run and stored. Every engine comes through here;
// they differ in where the memory is and how many lanes a number has.
#pragma once

#include <stdint.h>

#include "core/run.h"

namespace rnnkernels {

// Each pointer is at row 0 and unit 0, null for zero in what is read and for "nobody asks" in what is written. Storage and numbers as in
// run.h; strides count elements.
struct ForwardStep {
  int64_t hidden, output;
  const void* gates;  // storage
  int64_t gates_row, gates_slot;
  bool complete;  // the gates hold every slot, with U's part
  void* kept;     // storage, rows of room()·H
  void* between;  // numbers: kept values that a later stage of this step reads; null for cells of one stage
  int64_t between_row, between_slot;
  const void* vectors[kMaxVectors];  // storage
  const void* given[kMaxGiven];      // storage
  int64_t given_row[kMaxGiven];
  const void* previous[kMaxStates];  // numbers
  void* next[kMaxStates];            // numbers
  int64_t state_row[kMaxStates];     // of previous and next
  void* history[kMaxStates];         // storage; [0] is the output
  const void* moments;               // numbers, rows of moments(): those of the stages before are there
  double* partial;                   // what goes into the sums over a row's units, each value and its square; see the engines
  int64_t partial_row;
  const int32_t* resets;          // by row: -1, or the state after this step is replaced on its way to the next one; null: nowhere
  const void* reset[kMaxStates];  // storage: by what
  int64_t reset_row[kMaxStates];
};

struct BackwardStep {
  int64_t hidden, output;
  const void* kept;                     // storage, rows of room()·H
  void* grad_gates;                     // storage, likewise
  const void* vectors[kMaxVectors];     // storage
  int64_t ahead;                        // tokens from this step's row 0 to that of the step to come, to fetch it early; 0: not to
  int64_t previous_rows;                // rows below it have a step before this one; for the others that is the initial state
  const void* previous[kMaxStates];     // storage
  const void* initial[kMaxStates];      // storage
  const void* states[kMaxStates];       // storage: after the step
  const void* grad_states[kMaxStates];  // storage: of the states after the step, as far as others ask
  void* carried[kMaxStates];            // numbers: gradients of the states, on their way back
  int64_t carried_row[kMaxStates];
  void* operand[kMaxStages];  // numbers: gate gradients for the product of the step to come, or of the stage before
  int64_t operand_row[kMaxStages], operand_slot[kMaxStages];
  const void* moments;  // numbers, rows of moments()
  const void* means;    // numbers, rows of kMaxSums: of what the stage after this put in
  double* partial;
  int64_t partial_row;
  const int64_t* lengths;  // by row; null: all have the step `before`, as far as previous_rows says
  int64_t before;
  const int32_t* resets;  // as in forward, of the state before this step
  const void* reset[kMaxStates];
  int64_t reset_row[kMaxStates];
  const int32_t* resets_after;   // of the state after it: the number of the mark, where the gradient goes that comes back
  void* grad_reset[kMaxStates];  // storage, by that number

  RNN_FN bool has_before(int64_t row) const { return row < previous_rows && (!lengths || before < lengths[row]); }
};

template <class Cell, int stage>
RNN_FN int64_t stage_width(int64_t hidden, int64_t output) {
  return InfoOf<Cell>::value.stage[stage].width == Width::Output ? output : hidden;
}

template <class Cell, class V, class S>
RNN_FN void load_vectors(const void* const* vectors, int64_t unit, int n, V* w) {
  each<InfoOf<Cell>::value.vectors>([&](auto index) {
    constexpr int i = decltype(index)::value;
    w[i] = vectors[i] ? V::load(static_cast<const S*>(vectors[i]) + unit, n) : V(0);
  });
}

// What replaces state i of a row, n lanes of it.
template <class V, class S, class Step>
RNN_FN V replaced(const Step& step, int i, int64_t row, int64_t unit, int n) {
  return step.reset[i] ? V::load(static_cast<const S*>(step.reset[i]) + row * step.reset_row[i] + unit, n) : V(0);
}

// Slot i's input gates, from memory.
template <class V, class S>
struct GatesInMemory {
  const S* gates;  // of the row and the unit
  int64_t slot;
  int n;
  template <int i>
  RNN_FN V get(Index<i>) const {
    return V::load(gates + i * slot, n);
  }
};

// So many numbers, each for all lanes.
template <int n, class V>
RNN_FN void broadcast(const void* numbers, int64_t at, V* to) {
  each<n>([&](auto i) { to[i.value] = V(static_cast<const typename V::element*>(numbers)[at + i.value]); });
}

// n lanes of units from `unit` on; e: what goes into the sums over the row. sum: the product's part of the stage's slots, one after the
// other by sum_slot numbers; null for zero.
template <class Cell, int stage, class V, class S, class Gates>
RNN_FN void forward_units(const ForwardStep& step, const V* w, int64_t row, int64_t unit, int n, const typename V::element* sum,
                          int64_t sum_slot, const Gates& gates, [[maybe_unused]] V* e) {
  using T = typename V::element;
  using Info = InfoOf<Cell>;
  constexpr int slots = Info::value.slots, states = Info::value.states, kept = Info::value.kept;
  constexpr bool hands_on = Info::value.stages > 1;
  V a[slots], s[states], s1[states], k[kept];
  each<slots>([&](auto index) {
    constexpr int i = decltype(index)::value;
    constexpr unsigned feeds = Info::value.slot[i].feeds;
    constexpr int column = Info::value.hidden_slots(stage, i);
    if constexpr (Info::value.in_stage(stage, i)) {
      constexpr int j = Info::value.given_slots(i);
      a[i] = (feeds & X) || (step.complete && (feeds & H)) ? gates.get(index) : V(0);
      if constexpr (feeds & G)
        if (step.given[j]) a[i] = a[i] + V::load(static_cast<const S*>(step.given[j]) + row * step.given_row[j] + unit, n);
      if ((feeds & H) && sum) a[i] = a[i] + V::load(sum + column * sum_slot);
    }
  });
  each<states>([&](auto index) {
    constexpr int i = decltype(index)::value;
    if constexpr (Info::value.sees(stage, i)) s[i] = V::load(static_cast<const T*>(step.previous[i]) + row * step.state_row[i] + unit, n);
  });
  T* between = hands_on ? static_cast<T*>(step.between) + row * step.between_row + unit : nullptr;
  each<(stage > 0 ? kept : 0)>([&](auto index) {
    constexpr int i = decltype(index)::value;
    k[i] = V::load(between + i * step.between_slot, n);
  });

  if constexpr (Info::value.moments() > 0) {
    V r[Info::value.moments()];
    broadcast<Info::value.moments(stage)>(step.moments, row * Info::value.moments(), r);
    Cell::template forward<stage>(a, w, s, s1, k, r, e);
  } else {
    Cell::template forward<stage>(a, w, s, s1, k);
  }

  const int64_t width = stage_width<Cell, stage>(step.hidden, step.output);
  each<states>([&](auto index) {
    constexpr int i = decltype(index)::value;
    if constexpr (Info::value.writes(stage, i)) {
      s1[i].store(static_cast<T*>(step.next[i]) + row * step.state_row[i] + unit, n);
      if (step.history[i]) s1[i].store(static_cast<S*>(step.history[i]) + row * width + unit, n);
    }
    // By the last stage that reads what this step made of it.
    if constexpr (Info::value.last_to_see(i) == stage)
      if (step.resets && step.resets[row] >= 0)
        replaced<V, S>(step, i, row, unit, n).store(static_cast<T*>(step.next[i]) + row * step.state_row[i] + unit, n);
  });
  each<kept>([&](auto index) {
    constexpr int i = decltype(index)::value;
    if constexpr (Info::value.keeps(stage, i)) {
      if (hands_on) k[i].store(between + i * step.between_slot, n);
      if (step.kept) k[i].store(static_cast<S*>(step.kept) + (row * Info::value.room() + i) * step.hidden + unit, n);
    }
  });
}

template <class Cell, int stage, class V, class S>
RNN_FN void forward_units(const ForwardStep& step, const V* w, int64_t row, int64_t unit, int n, const typename V::element* sum,
                          int64_t sum_slot, V* e) {
  const S* gates = static_cast<const S*>(step.gates) + row * step.gates_row + unit;
  forward_units<Cell, stage, V, S>(step, w, row, unit, n, sum, sum_slot, GatesInMemory<V, S>{gates, step.gates_slot, n}, e);
}

// sum: the gradient of what the stage gave, as far as a matrix has read it; null for zero.
template <class Cell, int stage, class V, class S>
RNN_FN void backward_units(const BackwardStep& step, const V* w, int64_t row, int64_t unit, int n, const typename V::element* sum,
                           [[maybe_unused]] V* e) {
  using T = typename V::element;
  using Info = InfoOf<Cell>;
  constexpr int slots = Info::value.slots, states = Info::value.states, kept = Info::value.kept, room = Info::value.room();
  const int64_t width = stage_width<Cell, stage>(step.hidden, step.output);
  const int64_t token = row * room * step.hidden + unit, at = row * width + unit;
  V s[states], s1[states], k[room], d[states];
  each<states>([&](auto index) {
    constexpr int i = decltype(index)::value;
    if constexpr (Info::value.sees(stage, i)) {
      const void* before = step.has_before(row) ? step.previous[i] : step.initial[i];
      if (step.resets && step.resets[row] >= 0)
        s[i] = replaced<V, S>(step, i, row, unit, n);
      else
        s[i] = before ? V::load(static_cast<const S*>(before) + at, n) : V(0);
      s1[i] = V::load(static_cast<const S*>(step.states[i]) + at, n);
      d[i] = V::load(static_cast<const T*>(step.carried[i]) + row * step.carried_row[i] + unit, n);
    }
  });
  each<room>([&](auto index) {
    constexpr int i = decltype(index)::value;
    if constexpr (Info::value.arrives(stage, i)) k[i] = V::load(static_cast<const S*>(step.kept) + token + i * step.hidden, n);
  });
  V d1 = sum ? V::load(sum) : V(0);
  if (stage == 0 && step.ahead && step.has_before(row)) {
    each<kept>(
        [&](auto i) { prefetch(static_cast<const S*>(step.kept) + token + step.ahead * room * step.hidden + i.value * step.hidden); });
    if (step.grad_states[0] && stage_width<Cell, Info::value.stages - 1>(step.hidden, step.output) == width)
      prefetch(static_cast<const S*>(step.grad_states[0]) + at + step.ahead * width);
  }
  // Where the state after the step was replaced, what comes back is the gradient of what replaced it.
  const int32_t mark = step.resets_after ? step.resets_after[row] : -1;
  const auto hand_over = [&](int i, V& gradient) {
    if (mark < 0) return;
    if (step.grad_reset[i]) gradient.store(static_cast<S*>(step.grad_reset[i]) + int64_t(mark) * width + unit, n);
    gradient = V(0);
  };
  if constexpr (stage == Info::value.stages - 1) {
    d1 = d1 + d[0];
    hand_over(0, d1);
    if (step.grad_states[0]) d1 = d1 + V::load(static_cast<const S*>(step.grad_states[0]) + at, n);
    d[0] = V(0);
  }

  each<states>([&](auto index) {
    constexpr int i = decltype(index)::value;
    // Once a step: at the first stage to come that sees the state.
    if constexpr (i > 0 && Info::value.last_to_see(i) == stage) {
      hand_over(i, d[i]);
      if (step.grad_states[i]) d[i] = d[i] + V::load(static_cast<const S*>(step.grad_states[i]) + at, n);
    }
  });

  if constexpr (Info::value.moments() > 0) {
    constexpr int means = stage + 1 < Info::value.stages ? Info::value.stage[stage + 1 < Info::value.stages ? stage + 1 : 0].back_sums : 0;
    V r[Info::value.moments()], q[means ? means : 1];
    broadcast<Info::value.moments()>(step.moments, row * Info::value.moments(), r);
    broadcast<means>(step.means, row * kMaxSums, q);
    Cell::template backward<stage>(d1, w, s, s1, k, d, r, q, e);
  } else {
    Cell::template backward<stage>(d1, w, s, s1, k, d);
  }

  each<slots>([&](auto index) {
    constexpr int i = decltype(index)::value;
    constexpr int column = Info::value.hidden_slots(stage, i);
    // A stage may also have changed the slots of others of its width.
    if constexpr ((Info::value.changes[stage] >> i & 1) &&
                  Info::value.stage[Info::value.stage_of(i)].width == Info::value.stage[stage].width)
      k[i].store(static_cast<S*>(step.grad_gates) + token + i * step.hidden, n);
    if constexpr (Info::value.in_stage(stage, i) && (Info::value.slot[i].feeds & H))
      k[i].store(static_cast<T*>(step.operand[stage]) + row * step.operand_row[stage] + column * step.operand_slot[stage] + unit, n);
  });
  each<states>([&](auto index) {
    constexpr int i = decltype(index)::value;
    if constexpr (Info::value.sees(stage, i)) d[i].store(static_cast<T*>(step.carried[i]) + row * step.carried_row[i] + unit, n);
  });
}

}  // namespace rnnkernels

// A page as the list of its operations, stage by stage.
#pragma once

#include "cells/list.h"
#include "num/traced.h"

namespace rnnkernels::traced {

// What a stage leaves behind, by its place on the tape, -1 for what it does not: kept values, states, what goes into the sums over a row.
struct StageTrace {
  int end;  // of its operations
  int kept[2 * kMaxSlots], states[kMaxStates], sums[kMaxSums];
};

struct Trace {
  Tape tape;
  StageTrace stage[kMaxStages];
};

// A page ready to be traced; a loaded library has one of its own.
struct Tracer {
  void (*run)(Trace&);
};

template <class Cell, int S = 0>
void trace_stages(Trace& t, const Traced* w, Traced* k) {
  constexpr CellInfo cell = InfoOf<Cell>::value;
  if constexpr (S < cell.stages) {
    Traced a[cell.slots], s[cell.states], s1[cell.states], e[kMaxSums];
    for (int i = 0; i < cell.slots; ++i)
      if (cell.in_stage(S, i)) a[i] = Traced::made(Op::Slot, i);
    for (int i = 0; i < cell.states; ++i)
      if (cell.sees(S, i)) s[i] = Traced::made(Op::State, i, S);
    if constexpr (cell.moments() > 0) {
      Traced r[cell.moments()];
      for (int i = 0; i < cell.moments(S); ++i) r[i] = Traced::made(Op::Moment, i);
      Cell::template forward<S>(a, w, s, s1, k, r, e);
    } else {
      Cell::template forward<S>(a, w, s, s1, k);
    }
    StageTrace& stage = t.stage[S];
    stage.end = t.tape.count;
    for (int i = 0; i < 2 * kMaxSlots; ++i) stage.kept[i] = i < cell.kept ? k[i].at : -1;
    for (int i = 0; i < kMaxStates; ++i) stage.states[i] = i < cell.states && cell.writes(S, i) ? s1[i].at : -1;
    for (int i = 0; i < kMaxSums; ++i) stage.sums[i] = e[i].at;
    trace_stages<Cell, S + 1>(t, w, k);
  }
}

template <class Cell>
void trace(Trace& t) {
  constexpr CellInfo cell = InfoOf<Cell>::value;
  Traced::tape = &t.tape;
  Traced w[cell.vectors ? cell.vectors : 1], k[cell.room()];
  for (int i = 0; i < cell.vectors; ++i) w[i] = Traced::made(Op::Vector, i);
  trace_stages<Cell>(t, w, k);
}

// Of the list's cells, in its order.
extern const Tracer tracers[kCellCount];

}  // namespace rnnkernels::traced

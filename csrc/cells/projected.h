// A cell whose output is projected (Sak, Senior & Beaufays 2014; torch.nn.LSTM's proj_size).
//   q = the cell's h'        h' = W_hr q
// The cell itself may not read its own state 0: that is as wide as the projection, not as the cell.
#pragma once

#include "cells/contract.h"

namespace rnnkernels {

template <class Cell>
struct Projected {
  static constexpr CellInfo inner = InfoOf<Cell>::value;
  static constexpr int p = inner.slots, q = inner.slots + 1;
  static_assert(inner.stages == 1 && inner.kept == inner.slots, "one stage, a kept value a slot");

  static constexpr Slot slots[] = {inner.slot[0], inner.slot[1], inner.slot[2], inner.slot[3], {"p", H}};
  static_assert(inner.slots == 4, "the slots above are listed one by one");
  static constexpr Stage stages[] = {{0, inner.slots}, {p, 1, q, Width::Output}};
  static constexpr const char* states[] = {"h", inner.state[1]};
  static constexpr int kept = inner.kept + 2;

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k) {
    if constexpr (S == 0) {
      Cell::template forward<0>(a, w, s, s1, k);
      k[q] = s1[0];
    } else {
      s1[0] = k[p] = a[p];
    }
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V* w, const V* s, const V* s1, V* k, V* d) {
    if constexpr (S == 0) {
      Cell::template backward<0>(d1, w, s, s1, k, d);
    } else {
      k[p] = d1;
    }
  }
};

}  // namespace rnnkernels

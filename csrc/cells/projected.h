// A cell whose output is projected (Sak, Senior & Beaufays 2014; torch.nn.LSTM's proj_size), of any page.
//   q = the page's h'        h' = W_hr q
// The page itself may not read its own state 0: that is as wide as the projection, not as the page.
#pragma once

#include "cells/contract.h"

namespace rnnkernels {

template <class Cell>
struct Projected {
  static constexpr CellInfo inner = InfoOf<Cell>::value;
  static_assert(!inner.projected() && inner.stages < kMaxStages, "there is no room for another stage");
  static constexpr int p = inner.slots;
  RNN_FN static constexpr int place(int kept) { return kept < p ? kept : kept + 1; }

  static constexpr CellInfo make() {
    CellInfo info = inner;
    const int last = info.stages++;
    info.stage[last] = {p, 0};
    info.changes[last] = 0;
    info = with_slot(info, last, {"p", H});
    info.stage[last].width = Width::Output;
    info.stage[last].operand = info.kept;
    info.keeper[info.kept++] = last - 1;
    return info;
  }
  static constexpr CellInfo info = make();
  static constexpr int q = info.kept - 1;

  static constexpr bool reads_its_output() {
    for (int i = 0; i < inner.vectors; ++i)
      if ((inner.vector[i].factor == Factor::OldState || inner.vector[i].factor == Factor::NewState) && inner.vector[i].state == 0)
        return true;
    return false;
  }
  static_assert(!reads_its_output(), "the page multiplies its own state 0, which is as wide as the projection");

  template <int S, class V, class... Sums>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k, Sums... sums_of_rows) {
    if constexpr (S == inner.stages) {
      s1[0] = k[p] = a[p];
    } else {
      V own[inner.room()] = {};
      each<(S > 0 ? inner.kept : 0)>([&](auto i) { own[i.value] = k[place(i.value)]; });
      Cell::template forward<S>(a, w, s, s1, own, sums_of_rows...);
      each<inner.kept>([&](auto i) {
        if constexpr (inner.keeps(S, i.value)) k[place(i.value)] = own[i.value];
      });
      if constexpr (S == inner.stages - 1) k[q] = s1[0];
    }
  }

  template <int S, class V, class... Sums>
  RNN_FN static void backward(V d1, const V* w, const V* s, const V* s1, V* k, V* d, Sums... sums_of_rows) {
    if constexpr (S == inner.stages) {
      k[p] = d1;
    } else {
      V own[inner.room()];
      each<inner.room()>([&](auto i) { own[i.value] = k[place(i.value)]; });
      Cell::template backward<S>(d1, w, s, s1, own, d, sums_of_rows...);
      each<inner.slots>([&](auto i) { k[i.value] = own[i.value]; });
    }
  }
};

}  // namespace rnnkernels

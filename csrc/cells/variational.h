// Variational recurrent dropout (Gal & Ghahramani 2016) of any page: its matrices read m h, not h; m is one mask for all steps of a row.
// A stage of its own makes m h, so that nothing else changes.
#pragma once

#include "cells/contract.h"

namespace rnnkernels {

template <class Cell>
struct Variational {
  static constexpr CellInfo inner = InfoOf<Cell>::value;
  static_assert(!inner.projected(), "a page with a projection has no variational dropout");
  static_assert(inner.has_matrix(), "there is no matrix to read what is dropped");
  static constexpr int mask = inner.slots, slots = inner.slots + 1, dropped = slots;
  static constexpr int extra = inner.kept > inner.slots ? inner.kept - inner.slots : 0;
  RNN_FN static constexpr int place(int kept) { return kept < inner.slots ? kept : kept + 2; }

  static constexpr CellInfo make() {
    CellInfo info = inner;
    info.slots = slots;
    info.slot[mask] = {"dropout", G | M};
    info.kept = slots + 1 + extra;
    info.stages = inner.stages + 1;
    info.stage[0] = {mask, 1};
    for (int s = 0; s < inner.stages; ++s) {
      info.stage[s + 1] = inner.stage[s];
      info.stage[s + 1].operand = inner.stage[s].operand == kPreviousState ? dropped : place(inner.stage[s].operand);
    }
    for (int i = 0; i < extra; ++i) info.keeper[place(inner.slots + i)] = inner.keeper[inner.slots + i] + 1;
    for (int i = 0; i < inner.vectors; ++i)
      if (inner.vector[i].factor == Factor::Kept) info.vector[i].state = place(inner.vector[i].state);
    info.keeper[dropped] = 0;
    info.writer = inner.writer + 1;
    info.changes[0] = 0;
    for (int s = 0; s < inner.stages; ++s) info.changes[s + 1] = inner.changes[s];
    return info;
  }
  static_assert(inner.slots < kMaxSlots && inner.stages < kMaxStages, "the page has too many slots or stages");
  static constexpr CellInfo info = make();

  // Whether a later stage's matrix reads the page's kept value.
  RNN_FN static constexpr bool operand(int kept) {
    for (int s = 0; s < inner.stages; ++s)
      if (inner.stage[s].operand == kept) return true;
    return false;
  }

  template <int S, class V, class... Sums>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k, Sums... sums_of_rows) {
    if constexpr (S == 0) {
      k[mask] = a[mask];
      k[dropped] = k[mask] * s[0];
    } else {
      V own[inner.room()];
      each<inner.kept>([&](auto i) { own[i.value] = k[place(i.value)]; });
      Cell::template forward<S - 1>(a, w, s, s1, own, sums_of_rows...);
      each<inner.kept>([&](auto i) {
        if constexpr (inner.keeps(S - 1, i.value)) k[place(i.value)] = operand(i.value) ? own[i.value] * k[mask] : own[i.value];
      });
    }
  }

  template <int S, class V, class... Sums>
  RNN_FN static void backward(V d1, const V* w, const V* s, const V* s1, V* k, V* d, Sums... sums_of_rows) {
    if constexpr (S == 0) {
      d[0] = fma(d1, k[mask], d[0]);
    } else {
      V own[inner.room()];
      each<inner.room()>([&](auto i) { own[i.value] = k[place(i.value)]; });
      Cell::template backward<S - 1>(S < inner.stages ? d1 * k[mask] : d1, w, s, s1, own, d, sums_of_rows...);
      each<inner.slots>([&](auto i) { k[i.value] = own[i.value]; });
    }
  }
};

}  // namespace rnnkernels

// Zoneout (Krueger et al. 2017) of any page: each unit of each state keeps its old value where a mask says so.
//   s' = z s + (1 − z) s̃, s̃ what the page makes of it; z is 0 or 1 in training and its expectation, a constant, in use.
// As published, the page itself goes on with s̃: an LSTM's h is made of the c that was not kept.
#pragma once

#include "cells/contract.h"

namespace rnnkernels {

template <class Cell>
struct Zoneout {
  static constexpr CellInfo inner = InfoOf<Cell>::value;

  // The masks of the states that a stage writes are the last slots of that stage.
  RNN_FN static constexpr int masks_before(int stage) {
    int n = 0;
    for (int s = 0; s < stage; ++s)
      for (int i = 0; i < inner.states; ++i) n += inner.writes(s, i);
    return n;
  }
  RNN_FN static constexpr int place(int slot) { return slot + masks_before(inner.stage_of(slot)); }
  RNN_FN static constexpr int mask(int stage, int state) {
    int n = inner.stage[stage].first + inner.stage[stage].count + masks_before(stage);
    for (int i = 0; i < state; ++i) n += inner.writes(stage, i);
    return n;
  }
  // Beyond the slots: the page's own values, then what it made of the states beyond the first.
  static constexpr int extra = inner.kept > inner.slots ? inner.kept - inner.slots : 0, slots = inner.slots + inner.states;
  static constexpr int made = slots + extra - 1;  // of state i at made + i

  static constexpr const char* names[] = {"zoneout_0", "zoneout_1", "zoneout_2", "zoneout_3"};  // by the state
  static_assert(kMaxStates == 4, "a name for each state");

  static constexpr CellInfo make() {
    CellInfo info = inner;
    info.slots = slots;
    info.kept = slots + extra + inner.states - 1;
    for (int i = 0; i < inner.slots; ++i) info.slot[place(i)] = inner.slot[i];
    for (int s = 0; s < inner.stages; ++s) {
      info.stage[s].first += masks_before(s);
      info.stage[s].count += masks_before(s + 1) - masks_before(s);
      if (info.stage[s].operand != kPreviousState) info.stage[s].operand += slots - inner.slots;
      for (int i = 0; i < inner.states; ++i)
        if (inner.writes(s, i)) info.slot[mask(s, i)] = {names[i], G | M};
    }
    info.unkept = 0;
    for (int i = 1; i < inner.states; ++i) info.keeper[made + i] = inner.writer;
    for (int i = inner.slots; i < inner.kept; ++i) info.keeper[i + slots - inner.slots] = inner.keeper[i];
    for (int s = 0; s < inner.stages; ++s) {
      info.changes[s] = 0;
      for (int i = 0; i < inner.slots; ++i) info.changes[s] |= (inner.changes[s] >> i & 1) << place(i);
      for (int i = 0; i < inner.states; ++i)
        if (inner.writes(s, i)) info.changes[s] |= 1u << mask(s, i);
    }
    for (int i = 0; i < inner.slots; ++i) info.unkept |= (inner.unkept >> i & 1) << place(i);
    for (int i = 0; i < inner.vectors; ++i) {
      info.vector[i].slot = place(inner.vector[i].slot);
      if (info.vector[i].factor == Factor::NewState)
        info.vector[i] = {inner.vector[i].name, place(inner.vector[i].slot), Factor::Kept, made + inner.vector[i].state};
    }
    return info;
  }
  static_assert(inner.slots + inner.states <= kMaxSlots, "the page has too many slots");
  static constexpr CellInfo info = make();

  template <class V>
  RNN_FN static void take(const V* k, V* own) {
    each<inner.slots>([&](auto i) { own[i.value] = k[place(i.value)]; });
    each<extra>([&](auto i) { own[inner.slots + i.value] = k[slots + i.value]; });
  }
  template <class V>
  RNN_FN static void give(const V* own, V* k) {
    each<inner.slots>([&](auto i) { k[place(i.value)] = own[i.value]; });
    each<extra>([&](auto i) { k[slots + i.value] = own[inner.slots + i.value]; });
  }

  template <int S, class V, class... Sums>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k, Sums... sums_of_rows) {
    V sums[inner.slots], own[inner.room()] = {};
    each<inner.slots>([&](auto i) {
      if constexpr (inner.in_stage(S, i.value)) sums[i.value] = a[place(i.value)];
    });
    if constexpr (S > 0) take(k, own);
    // Stages after the writer go on with what the page made, not with what was kept of it.
    V seen[inner.states];
    each<inner.states>([&](auto i) {
      if constexpr (i.value > 0 && S > inner.writer)
        seen[i.value] = k[made + i.value];
      else if constexpr (inner.sees(S, i.value))
        seen[i.value] = s[i.value];
    });
    Cell::template forward<S>(sums, w, seen, s1, own, sums_of_rows...);
    give(own, k);
    each<inner.states>([&](auto i) {
      if constexpr (inner.writes(S, i.value)) {
        const V z = k[mask(S, i.value)] = a[mask(S, i.value)];
        if constexpr (i.value > 0) k[made + i.value] = s1[i.value];
        s1[i.value] = fma(z, s[i.value], (V(1) - z) * s1[i.value]);  // exact where z is 0 or 1
      }
    });
  }

  template <int S, class V, class... Sums>
  RNN_FN static void backward(V d1, const V* w, const V* s, const V* s1, V* k, V* d, Sums... sums_of_rows) {
    V own[inner.room()], was[inner.states], kept_back[inner.states];
    take(k, own);
    was[0] = s1[0];
    each<inner.states>([&](auto i) {
      if constexpr (i.value > 0) was[i.value] = k[made + i.value];
      if constexpr (inner.writes(S, i.value)) {
        V& total = i.value == 0 ? d1 : d[i.value];
        const V z = k[mask(S, i.value)];
        kept_back[i.value] = total * z;
        k[mask(S, i.value)] = V(0);
        total = total - kept_back[i.value];
      }
    });
    Cell::template backward<S>(d1, w, s, was, own, d, sums_of_rows...);
    give(own, k);
    each<inner.states>([&](auto i) {
      if constexpr (inner.writes(S, i.value)) d[i.value] = d[i.value] + kept_back[i.value];
    });
  }
};

}  // namespace rnnkernels

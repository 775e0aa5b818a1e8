// Layer normalisation (Ba, Kiros & Hinton 2016): N(v) = (v − mean) / √(variance + ε) over the units of a row.
#pragma once

#include "cells/contract.h"

namespace rnnkernels {

// N of one value of a unit, from the moments of its group.
template <class V>
struct Normal {
  V mean, rate;
  RNN_FN Normal(V mean, V variance, double epsilon = 1e-5) : mean(mean), rate(V(1) / sqrt(variance + V(typename V::element(epsilon)))) {}
  RNN_FN V of(V v) const { return (v - mean) * rate; }
  // The gradient of v from that of N(v), g, whose means over the group, alone and times N(v), are given.
  RNN_FN V back(V v, V g, V mean_g, V mean_gn) const { return rate * (g - mean_g - of(v) * mean_gn); }
};

// The moments of n equal groups (mean, variance, mean, …) as those of one.
template <int n, class V>
RNN_FN Normal<V> together(const V* r, double epsilon = 1e-5) {
  const V part(typename V::element(1.0 / n));
  V mean(0), variance(0);
  each<n>([&](auto j) { mean = fma(part, r[2 * j.value], mean); });
  each<n>([&](auto j) {
    const V off = r[2 * j.value] - mean;
    variance = fma(part, fma(off, off, r[2 * j.value + 1]), variance);
  });
  return {mean, variance, epsilon};
}

// Any page with U's part normalised, by gate or all gates at once: â = x + γ N(U h), where x, the input's part, is made and normalised by
// the caller.
template <class Cell, bool by_gate>
struct LayerNorm {
  static constexpr CellInfo inner = InfoOf<Cell>::value;
  static constexpr int n = inner.hidden_slots(0), gains = n + inner.slots, moments = 2 * n;
  static_assert(n > 0 && inner.hidden_slots(1) == 0 && inner.hidden_slots(2) == 0, "layer norm is for pages with one matrix");
  static_assert(inner.stages < kMaxStages && inner.writer == 0, "layer norm goes on a page before all that adds stages");
  // The page's slot that U's j-th block feeds.
  RNN_FN static constexpr int fed(int j) {
    int i = 0;
    while (!(inner.slot[i].feeds & H) || inner.hidden_slots(0, i) < j) ++i;
    return i;
  }
  RNN_FN static constexpr int place(int kept) { return kept < inner.slots ? n + kept : 2 * n + kept; }

  // Slots: U's raw sums; the page's own, which the caller feeds in the input's stead; the gains'.
  static constexpr CellInfo make() {
    CellInfo info = inner;
    info.slots = gains + n;
    info.kept = inner.kept > inner.slots ? 2 * n + inner.kept : n + inner.kept;
    info.stages = inner.stages + 1;
    info.vectors = inner.vectors + n;
    for (int j = 0; j < n; ++j) {
      info.slot[j] = {inner.slot[fed(j)].name, H};
      info.slot[gains + j] = {"", 0};
      info.vector[j] = {"gain", gains + j, Factor::Itself};
    }
    for (int i = 0; i < inner.slots; ++i)
      info.slot[n + i] = {inner.slot[i].name, inner.slot[i].feeds & X ? unsigned(G) : inner.slot[i].feeds & (G | M)};
    for (int i = 0; i < inner.vectors; ++i) {
      PerUnit vector = inner.vector[i];
      vector.slot = place(vector.slot);
      if (vector.factor == Factor::One) vector.factor = Factor::Itself;
      info.vector[n + i] = vector;
    }
    info.stage[0] = {0, n};
    info.stage[0].sums = n;
    for (int s = 0; s < inner.stages; ++s) {
      info.stage[s + 1] = inner.stage[s];
      info.stage[s + 1].first = place(inner.stage[s].first);
      info.changes[s + 1] = inner.changes[s] << n;
    }
    info.stage[inner.stages].count += n;
    info.stage[1].back_sums = by_gate ? 2 * n : 2;
    info.changes[0] = (1u << n) - 1;
    info.unkept = inner.unkept << n | ((1u << n) - 1) << gains;
    info.changes[1] |= ((1u << n) - 1) << gains;
    info.writer = 1;
    for (int i = inner.slots; i < inner.kept; ++i) info.keeper[place(i)] = inner.keeper[i] + 1;
    return info;
  }
  static_assert(gains + n <= kMaxSlots, "the page has too many slots");
  static constexpr CellInfo info = make();

  template <class V>
  RNN_FN static Normal<V> normal(const V* r, int j) {
    if constexpr (by_gate)
      return {r[2 * j], r[2 * j + 1]};
    else
      return together<n>(r);
  }

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k, const V* r, V* e) {
    if constexpr (S == 0) {
      each<n>([&](auto j) { k[j.value] = e[j.value] = a[j.value]; });
    } else {
      V sums[inner.slots], own[inner.room()] = {};
      each<inner.slots>([&](auto i) {
        sums[i.value] = inner.in_stage(S - 1, i.value) && (inner.slot[i.value].feeds & (X | G)) ? a[place(i.value)] : V(0);
      });
      each<(S == 1 ? n : 0)>([&](auto j) { sums[fed(j.value)] = fma(w[j.value], normal(r, j.value).of(k[j.value]), sums[fed(j.value)]); });
      each<(S > 1 ? inner.kept : 0)>([&](auto i) { own[i.value] = k[place(i.value)]; });
      if constexpr (inner.moments() > 0)
        Cell::template forward<S - 1>(sums, w + n, s, s1, own, r + moments, e);
      else
        Cell::template forward<S - 1>(sums, w + n, s, s1, own);
      each<inner.kept>([&](auto i) {
        if constexpr (inner.keeps(S - 1, i.value)) k[place(i.value)] = own[i.value];
      });
    }
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V* w, const V* s, const V* s1, V* k, V* d, const V* r, const V* q, V* e) {
    if constexpr (S == 0) {
      each<n>([&](auto j) {
        const V g = w[j.value] * k[place(fed(j.value))], part(typename V::element(1.0 / (by_gate ? 1 : n)));
        constexpr int at = by_gate ? 2 * j.value : 0;
        k[j.value] = normal(r, j.value).back(k[j.value], g, part * q[at], part * q[at + 1]);
      });
    } else {
      V own[inner.room()];
      each<inner.room()>([&](auto i) { own[i.value] = k[place(i.value)]; });
      if constexpr (inner.moments() > 0)
        Cell::template backward<S - 1>(d1, w + n, s, s1, own, d, r + moments, q, e);
      else
        Cell::template backward<S - 1>(d1, w + n, s, s1, own, d);
      each<inner.slots>([&](auto i) { k[place(i.value)] = own[i.value]; });
      if constexpr (S == 1) {
        each<info.stage[1].back_sums>([&](auto j) { e[j.value] = V(0); });
        each<n>([&](auto j) {
          const V da = own[fed(j.value)], normed = normal(r, j.value).of(k[j.value]), g = w[j.value] * da;
          constexpr int at = by_gate ? 2 * j.value : 0;
          k[gains + j.value] = da * normed;
          e[at] = e[at] + g;
          e[at + 1] = fma(g, normed, e[at + 1]);
        });
      }
    }
  }
};

}  // namespace rnnkernels

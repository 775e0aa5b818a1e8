// The backward of a page that has none: each of its inputs varied alone, with dual numbers, in registers. What forward read is what is
// kept.
#pragma once

#include "cells/contract.h"
#include "num/dual.h"

namespace rnnkernels {

template <class Page>
struct Automatic {
  static constexpr CellInfo inner = InfoOf<Page>::value;
  static constexpr bool hands_on = inner.stages > 1;
  // Kept are the pre-activations and, of a page of several stages, its own kept values. Their gradients are on their way in slots of their
  // own, which nothing feeds.
  static constexpr int grad = inner.slots, value = inner.slots + (hands_on ? inner.kept : 0);

  static constexpr CellInfo make() {
    CellInfo info = inner;
    info.slots = value;
    info.kept = value + (hands_on ? inner.kept : 0);
    info.stage[info.stages - 1].count += value - grad;
    for (int s = 1; s < info.stages; ++s)
      if (info.stage[s].operand != kPreviousState) info.stage[s].operand += value;
    return info;
  }
  static_assert(inner.slots + (hands_on ? inner.kept : 0) <= kMaxSlots, "a page with so many kept values writes its own backward");
  static_assert(inner.stages <= 2, "a page of three stages writes its own backward");
  static_assert(!inner.projected(), "a page with a projection writes its own backward");
  static constexpr CellInfo info = make();

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k) {
    V own[inner.room()];
    each<(S > 0 ? inner.kept : 0)>([&](auto i) { own[i.value] = k[value + i.value]; });
    Page::template forward<S>(a, w, s, s1, own);
    each<inner.slots>([&](auto i) {
      if constexpr (inner.in_stage(S, i.value)) k[i.value] = a[i.value];
    });
    if constexpr (hands_on) {
      each<(S == 0 ? inner.kept : 0)>([&](auto i) { k[value + i.value] = inner.keeps(0, i.value) ? own[i.value] : V(0); });
      if constexpr (S == inner.stages - 1) each<inner.kept>([&](auto i) { k[grad + i.value] = V(0); });
    }
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V* w, const V* s, const V*, V* k, V* d) {
    using D = Dual<V>;
    constexpr int last = inner.stages - 1;
    constexpr int next_operand = S < last ? inner.stage[S < last ? S + 1 : S].operand : kPreviousState;
    D a[inner.slots], dw[inner.vectors ? inner.vectors : 1], ds[inner.states], own[inner.room()];
    each<inner.slots>([&](auto i) { a[i.value] = D(k[i.value]); });
    each<inner.vectors>([&](auto i) { dw[i.value] = D(w[i.value]); });
    each<inner.states>([&](auto i) { ds[i.value] = D(s[i.value]); });
    each<(hands_on ? inner.kept : 0)>([&](auto i) { own[i.value] = D(k[value + i.value]); });

    // What the stage gives, weighed with its gradients, varied along the one input whose tangent is 1.
    const auto slope = [&](D& input) {
      input.d = V(1);
      D s1[inner.states], now[inner.room()];
      each<inner.room()>([&](auto i) { now[i.value] = own[i.value]; });
      Page::template forward<S>(a, dw, ds, s1, now);
      input.d = V(0);
      V sum(0);
      each<inner.states>([&](auto i) {
        if constexpr (inner.writes(S, i.value)) sum = fma(i.value == 0 ? d1 : d[i.value], s1[i.value].d, sum);
      });
      each<(S < last ? inner.kept : 0)>([&](auto i) {
        if constexpr (inner.keeps(S, i.value)) sum = fma(k[grad + i.value], now[i.value].d, sum);
        if constexpr (i.value == next_operand) sum = fma(d1, now[i.value].d, sum);
      });
      return sum;
    };

    V grad_a[inner.slots], grad_s[inner.states], grad_own[inner.room()];
    each<inner.slots>([&](auto i) {
      if constexpr (inner.in_stage(S, i.value)) grad_a[i.value] = inner.slot[i.value].feeds ? slope(a[i.value]) : V(0);
    });
    each<inner.vectors>([&](auto i) {
      constexpr PerUnit vector = inner.vector[i.value];
      if constexpr (vector.factor == Factor::Itself && inner.in_stage(S, vector.slot)) grad_a[vector.slot] = slope(dw[i.value]);
    });
    each<inner.states>([&](auto i) {
      if constexpr (S == 0 || i.value == 0) grad_s[i.value] = slope(ds[i.value]);
    });
    each<(S > 0 ? inner.kept : 0)>([&](auto i) {
      if constexpr (!inner.keeps(S, i.value)) grad_own[i.value] = slope(own[i.value]);
    });

    each<inner.slots>([&](auto i) {
      if constexpr (inner.in_stage(S, i.value)) k[i.value] = grad_a[i.value];
    });
    each<(S > 0 ? inner.kept : 0)>([&](auto i) {
      if constexpr (!inner.keeps(S, i.value)) k[grad + i.value] = k[grad + i.value] + grad_own[i.value];
    });
    each<inner.states>([&](auto i) {
      if constexpr (i.value == 0)
        d[0] = d[0] + grad_s[0];
      else if constexpr (S == 0)
        d[i.value] = grad_s[i.value];
    });
  }
};

namespace detail {

template <class Page, class = void>
struct WithBackward {
  using type = Automatic<Page>;
};
// The probe is a declaration's: what it is called with plays no part.
template <class Page>
struct WithBackward<Page, decltype(void(&Page::template backward<0, int>))> {
  using type = Page;
};

}  // namespace detail

// The page as engines run it.
template <class Page>
using Complete = typename detail::WithBackward<Page>::type;

}  // namespace rnnkernels

// The derivative of any page of one stage along a direction, as a page of its own: states and products are tangents, and what they are the
// tangents of is given: pre-activations (with the biases of vectors in them) and the states before the step.
//   ṡ' = J (ȧ, ṡ), J the page's derivative at (a, s)
// Backward is the page's backward on dual numbers. It makes Jᵀ v, the gradients of the tangents; and its derivative along (ȧ, ṡ) is the
// gradient of a and s, since ∂⟨v, J u⟩ / ∂a is the derivative of Jᵀ v along u: the order of second derivatives does not matter.
#pragma once

#include "cells/contract.h"
#include "num/dual.h"

namespace rnnkernels {

template <class Page>
struct Tangent {
  static constexpr CellInfo inner = InfoOf<Page>::value;
  static constexpr int value = inner.slots, old = 2 * inner.slots;  // the slots of the pre-activations and of the states before the step

  static constexpr bool of_biases_alone() {
    for (int i = 0; i < inner.vectors; ++i)
      if (inner.vector[i].factor != Factor::One) return false;
    return true;
  }
  static_assert(inner.stages == 1 && inner.moments() == 0 && inner.given_slots() == 0 && of_biases_alone(),
                "tangents are made of pages of one stage, without sums over a row, given numbers or vectors other than biases");

  static constexpr CellInfo make() {
    CellInfo info = inner;
    info.slots = info.kept = info.stage[0].count = old + inner.states;
    info.vectors = 0;
    for (int i = 0; i < inner.slots; ++i) {
      info.slot[i].feeds = (inner.slot[i].feeds & H) | G;
      info.slot[value + i] = {"value", G};
    }
    for (int i = 0; i < inner.states; ++i) info.slot[old + i] = {inner.state[i], G};
    return info;
  }
  static constexpr CellInfo info = make();

  template <class V>
  RNN_FN static void step(const V* a, const V* s, const Dual<V>* w, Dual<V>* before, Dual<V>* after, Dual<V>* k) {
    Dual<V> both[inner.slots];
    each<inner.slots>([&](auto i) { both[i.value] = Dual<V>(a[value + i.value], a[i.value]); });
    each<inner.states>([&](auto i) { before[i.value] = Dual<V>(a[old + i.value], s[i.value]); });
    Page::template forward<0>(both, w, before, after, k);
  }
  template <class V>
  RNN_FN static void no_vectors(Dual<V>* w) {
    each<inner.vectors>([&](auto i) { w[i.value] = Dual<V>(V(0)); });
  }

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V*, const V* s, V* s1, V* k) {
    Dual<V> w[inner.vectors ? inner.vectors : 1], before[inner.states], after[inner.states], own[inner.room()];
    no_vectors(w);
    step(a, s, w, before, after, own);
    each<inner.states>([&](auto i) { s1[i.value] = after[i.value].d; });
    each<info.slots>([&](auto i) { k[i.value] = a[i.value]; });
  }

  template <int S, class V>
  RNN_FN static void backward(V d1, const V*, const V* s, const V*, V* k, V* d) {
    Dual<V> w[inner.vectors ? inner.vectors : 1], before[inner.states], after[inner.states], own[inner.room()], grad[inner.states];
    no_vectors(w);
    step(k, s, w, before, after, own);
    each<inner.states>([&](auto i) { grad[i.value] = Dual<V>(d[i.value]); });
    Page::template backward<0>(Dual<V>(d1), w, before, after, own, grad);
    each<inner.slots>([&](auto i) {
      k[i.value] = own[i.value].v;
      k[value + i.value] = own[i.value].d;
    });
    each<inner.states>([&](auto i) {
      d[i.value] = grad[i.value].v;
      k[old + i.value] = grad[i.value].d;
    });
  }
};

}  // namespace rnnkernels

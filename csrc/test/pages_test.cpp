// Each page's backward against its forward: ⟨v, J u⟩ = ⟨Jᵀ v, u⟩, with J u from dual numbers. One unit, its matrices one number a slot, so
// that what an engine adds around a page (products, sums of gradients) is a line each.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "num/scalar.h"
//
#include "cells/list.h"
#include "num/dual.h"
#include "test/check.h"
#include "test/reset_before.h"

namespace rnnkernels {
namespace {

using F = scalar::F64;
using D = Dual<F>;

double value(F x) { return x.v; }

// The numbers a step depends on.
template <class V>
struct Inputs {
  V x[kMaxSlots], m[kMaxSlots], w[kMaxVectors], s[kMaxStates];
};

template <class Cell, class V, int stage = 0>
void step(const Inputs<V>& in, V* a, V* s1, V* k) {
  constexpr CellInfo cell = InfoOf<Cell>::value;
  for (int i = 0; i < cell.slots; ++i) {
    if (!cell.in_stage(stage, i)) continue;
    const V operand =
        cell.stage[stage].operand == kPreviousState ? in.s[0] : k[cell.stage[stage].operand < 0 ? 0 : cell.stage[stage].operand];
    a[i] = cell.slot[i].feeds & (X | G) ? in.x[i] : V(0);
    if (cell.slot[i].feeds & H) a[i] = a[i] + in.m[i] * operand;
  }
  Cell::template forward<stage>(a, in.w, in.s, s1, k);
  if constexpr (stage + 1 < cell.stages) step<Cell, V, stage + 1>(in, a, s1, k);
}

template <class Cell, int stage>
void back(const Inputs<F>& in, const F* s1, F d1, F* k, F* d) {
  constexpr CellInfo cell = InfoOf<Cell>::value;
  F unseen[kMaxStates];
  for (int i = 0; i < cell.states; ++i) unseen[i] = d[i];
  Cell::template backward<stage>(d1, in.w, in.s, s1, k, d);
  for (int i = 0; i < cell.states; ++i)
    if (!cell.sees(stage, i)) d[i] = unseen[i];
  if constexpr (stage > 0) {
    F through(0);
    for (int i = 0; i < cell.slots; ++i)
      if (cell.in_stage(stage, i) && (cell.slot[i].feeds & H)) through = through + in.m[i] * k[i];
    back<Cell, stage - 1>(in, s1, through, k, d);
  }
}

template <class Cell>
void test(const char* name) {
  constexpr CellInfo cell = InfoOf<Cell>::value;
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal;
  double worst = 0;
  for (int trial = 0; trial < 200; ++trial) {
    Inputs<F> in{};
    Inputs<D> dual{};
    std::vector<F*> inputs;
    std::vector<double> u;
    auto vary = [&](F* plain, D* both, int n) {
      for (int i = 0; i < n; ++i) {
        plain[i] = F(normal(random));
        const double tangent = normal(random);
        both[i] = D(plain[i], F(tangent));
        inputs.push_back(&plain[i]);
        u.push_back(tangent);
      }
    };
    vary(in.x, dual.x, cell.slots);
    for (int i = 0; i < cell.slots; ++i)
      if (cell.slot[i].feeds & M) dual.x[i].d = F(0);
    vary(in.w, dual.w, cell.vectors);
    for (int i = 0; i < cell.vectors; ++i)
      if (cell.vector[i].factor == Factor::Fixed) dual.w[i].d = F(0);
    vary(in.s, dual.s, cell.states);
    for (int i = 0; i < cell.slots; ++i) in.m[i] = F(normal(random)), dual.m[i] = D(in.m[i], F(0));

    D da[kMaxSlots], ds1[kMaxStates], dk[2 * kMaxSlots];
    step<Cell, D>(dual, da, ds1, dk);
    F a[kMaxSlots], s1[kMaxStates], k[2 * kMaxSlots];
    step<Cell, F>(in, a, s1, k);

    double forward_sum = 0;
    F d[kMaxStates], v[kMaxStates];
    for (int i = 0; i < cell.states; ++i) {
      v[i] = F(normal(random));
      forward_sum += value(v[i]) * value(ds1[i].d);
      d[i] = i == 0 ? F(0) : v[i];
    }
    F was[2 * kMaxSlots];
    for (int i = 0; i < cell.kept; ++i) was[i] = k[i];
    back<Cell, cell.stages - 1>(in, s1, v[0], k, d);
    double backward_sum = 0;
    for (int i = 0; i < cell.slots; ++i)
      if ((cell.slot[i].feeds & (X | G)) && !(cell.slot[i].feeds & M)) backward_sum += value(k[i]) * u[size_t(i)];
    for (int i = 0; i < cell.vectors; ++i) {
      const PerUnit& vector = cell.vector[i];
      const double factor = !cell.has_factor(i)                 ? vector.factor != Factor::Fixed
                            : vector.factor == Factor::Kept     ? value(was[vector.state])
                            : vector.factor == Factor::OldState ? value(in.s[vector.state])
                                                                : value(s1[vector.state]);
      backward_sum += value(k[vector.slot]) * factor * u[size_t(cell.slots + i)];
    }
    for (int i = 0; i < cell.states; ++i) {
      double total = value(d[i]);
      if (i == 0)
        for (int j = 0; j < cell.slots; ++j)
          if (cell.in_stage(0, j) && (cell.slot[j].feeds & H)) total += value(in.m[j]) * value(k[j]);
      backward_sum += total * u[size_t(cell.slots + cell.vectors + i)];
    }
    worst = std::fmax(worst, std::fabs(forward_sum - backward_sum) / (1 + std::fabs(forward_sum)));
  }
  std::printf("%-34s <v,Ju> - <J'v,u> %.1e\n", name, worst);
  check(worst < 1e-12, "%s: backward is not the transpose of forward, off by %g", name, worst);
}

// A page without a backward and with a number a unit that no state multiplies.
struct Leaky {
  static constexpr Slot slots[] = {{"z", X | H}, {"rate", 0}};
  static constexpr const char* states[] = {"h"};
  static constexpr int kept = 2;
  static constexpr PerUnit vectors[] = {{"rate", 1, Factor::Itself}};

  template <int S, class V>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V*) {
    s1[0] = fma(sigmoid(w[0]), tanh(a[0]) - s[0], s[0]);
  }
};

// With its own backward and with the automatic one, which both must be forward's transpose.
template <class Page>
void test_both(const char* name) {
  test<Complete<Page>>(name);
  constexpr CellInfo page = InfoOf<Page>::value;
  if constexpr (!page.projected() && page.stages + page.given_slots() <= 2 && page.writer == 0)
    test<Automatic<Page>>((std::string(name) + ", automatic").c_str());
}

}  // namespace
}  // namespace rnnkernels

int main() {
  using namespace rnnkernels;
#define RNN_CELL(name, heat, ...) test_both<__VA_ARGS__>(#name);
#include "cells/cells.def"
#undef RNN_CELL
  test_both<ResetBefore>("reset_before");
  test<Complete<Leaky>>("leaky");
  test<Zoneout<Complete<Leaky>>>("leaky, zoneout");
  test<Zoneout<PeepholeLstm>>("lstm_peephole, zoneout");
  test<Zoneout<Projected<Lstm>>>("lstm_projected, zoneout");
  test<Variational<PeepholeLstm>>("lstm_peephole, variational");
  test<Variational<GruResetBefore>>("gru_reset_before, variational");
  return check_failures != 0;
}

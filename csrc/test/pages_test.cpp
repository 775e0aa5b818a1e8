// Each page's backward against its forward: ⟨v, J u⟩ = ⟨Jᵀ v, u⟩, with J u from dual numbers. A row of three units, so that what an engine
// adds around a page (products, sums over the units, sums of gradients) is some lines each.
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

constexpr int kUnits = 3;

// What a step depends on, and what it makes of it; one row.
template <class V>
struct Unit {
  V x[kMaxSlots], w[kMaxVectors], s[kMaxStates];     // given
  V a[kMaxSlots], s1[kMaxStates], k[2 * kMaxSlots];  // made
  V grad[kMaxStates], e[kMaxSums];
};
template <class V>
struct Row {
  Unit<V> unit[kUnits];
  V matrix[kMaxSlots][kUnits][kUnits];  // of each slot that one feeds
  V moments[2 * kMaxSums * kMaxStages];
};

template <class V>
V mean_of(const Row<V>& row, int j) {
  V sum(0);
  for (const Unit<V>& u : row.unit) sum = sum + u.e[j];
  return sum / V(kUnits);
}

template <class Cell, int stage = 0, class V>
void step(Row<V>& row) {
  constexpr CellInfo cell = InfoOf<Cell>::value;
  constexpr int operand = cell.stage[stage].operand;
  for (int i = 0; i < cell.slots; ++i) {
    if (!cell.in_stage(stage, i)) continue;
    for (int n = 0; n < kUnits; ++n) {
      Unit<V>& u = row.unit[n];
      u.a[i] = cell.slot[i].feeds & (X | G) ? u.x[i] : V(0);
      if (cell.slot[i].feeds & H)
        for (int m = 0; m < kUnits; ++m)
          u.a[i] = u.a[i] + row.matrix[i][n][m] * (operand == kPreviousState ? row.unit[m].s[0] : row.unit[m].k[operand < 0 ? 0 : operand]);
    }
  }
  for (Unit<V>& u : row.unit) {
    V seen[kMaxStates];
    for (int i = 0; i < cell.states; ++i) seen[i] = i > 0 && stage > cell.writer ? u.s1[i] : u.s[i];
    if constexpr (cell.moments() > 0)
      Cell::template forward<stage>(u.a, u.w, seen, u.s1, u.k, row.moments, u.e);
    else
      Cell::template forward<stage>(u.a, u.w, seen, u.s1, u.k);
  }
  for (int j = 0; j < cell.stage[stage].sums; ++j) {
    const V mean = mean_of(row, j);
    V variance(0);
    for (const Unit<V>& u : row.unit) variance = variance + (u.e[j] - mean) * (u.e[j] - mean) / V(kUnits);
    row.moments[cell.moments(stage) + 2 * j] = mean;
    row.moments[cell.moments(stage) + 2 * j + 1] = variance;
  }
  if constexpr (stage + 1 < cell.stages) step<Cell, stage + 1>(row);
}

// What the stage's matrices hand back to the units that they read.
template <class Cell, int stage>
F through(const Row<F>& row, int m) {
  constexpr CellInfo cell = InfoOf<Cell>::value;
  F sum(0);
  for (int i = 0; i < cell.slots; ++i)
    for (int n = 0; n < kUnits; ++n)
      if (cell.in_stage(stage, i) && (cell.slot[i].feeds & H)) sum = sum + row.matrix[i][n][m] * row.unit[n].k[i];
  return sum;
}

template <class Cell, int stage>
void back(Row<F>& row, const F* d1) {
  constexpr CellInfo cell = InfoOf<Cell>::value;
  F q[kMaxSums], next[kUnits];
  for (int j = 0; stage + 1 < cell.stages && j < cell.stage[stage + 1 < cell.stages ? stage + 1 : 0].back_sums; ++j) q[j] = mean_of(row, j);
  for (int n = 0; n < kUnits; ++n) {
    Unit<F>& u = row.unit[n];
    F unseen[kMaxStates];
    for (int i = 0; i < cell.states; ++i) unseen[i] = u.grad[i];
    if constexpr (cell.moments() > 0)
      Cell::template backward<stage>(d1[n], u.w, u.s, u.s1, u.k, u.grad, row.moments, q, u.e);
    else
      Cell::template backward<stage>(d1[n], u.w, u.s, u.s1, u.k, u.grad);
    for (int i = 0; i < cell.states; ++i)
      if (!cell.sees(stage, i)) u.grad[i] = unseen[i];
  }
  if constexpr (stage > 0) {
    for (int n = 0; n < kUnits; ++n) next[n] = through<Cell, stage>(row, n);
    back<Cell, stage - 1>(row, next);
  }
}

template <class Cell>
void test(const char* name) {
  constexpr CellInfo cell = InfoOf<Cell>::value;
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal;
  double worst = 0;
  for (int trial = 0; trial < 200; ++trial) {
    Row<F> row{};
    Row<D> dual{};
    std::vector<double> tangents;  // unit by unit: x, w, s
    for (int n = 0; n < kUnits; ++n) {
      auto vary = [&](F* plain, D* both, int count, auto fixed) {
        for (int i = 0; i < count; ++i) {
          plain[i] = F(normal(random));
          tangents.push_back(fixed(i) ? 0 : normal(random));
          both[i] = D(plain[i], F(tangents.back()));
        }
      };
      vary(row.unit[n].x, dual.unit[n].x, cell.slots, [&](int i) { return (cell.slot[i].feeds & M) || !(cell.slot[i].feeds & (X | G)); });
      vary(row.unit[n].w, dual.unit[n].w, cell.vectors, [&](int i) { return cell.vector[i].factor == Factor::Fixed; });
      // Thresholds that some values reach; a clipped gradient is not forward's, and has a test of its own.
      for (int i = 0; i < cell.vectors; ++i)
        if (cell.vector[i].factor == Factor::Fixed) {
          const bool of_gradient = std::string(cell.vector[i].name) == "grad_clip";
          dual.unit[n].w[i] = D(row.unit[n].w[i] = F(of_gradient ? 1e9 : std::fabs(value(row.unit[n].w[i]))));
        }
      vary(row.unit[n].s, dual.unit[n].s, cell.states, [](int) { return false; });
    }
    for (int i = 0; i < cell.slots; ++i)
      for (int n = 0; n < kUnits; ++n)
        for (int m = 0; m < kUnits; ++m) dual.matrix[i][n][m] = D(row.matrix[i][n][m] = F(normal(random)));
    step<Cell>(dual);
    step<Cell>(row);

    double forward_sum = 0, backward_sum = 0;
    F d1[kUnits];
    Row<F> before = row;
    for (int n = 0; n < kUnits; ++n)
      for (int i = 0; i < cell.states; ++i) {
        const F v(normal(random));
        forward_sum += value(v) * value(dual.unit[n].s1[i].d);
        row.unit[n].grad[i] = i == 0 ? F(0) : v;
        if (i == 0) d1[n] = v;
      }
    back<Cell, cell.stages - 1>(row, d1);
    const double* tangent = tangents.data();
    for (int n = 0; n < kUnits; ++n) {
      const Unit<F>& u = row.unit[n];
      for (int i = 0; i < cell.slots; ++i) backward_sum += value(u.k[i]) * *tangent++;
      for (int i = 0; i < cell.vectors; ++i) {
        const PerUnit& vector = cell.vector[i];
        const double factor = vector.factor == Factor::Fixed      ? 0
                              : !cell.has_factor(i)               ? 1
                              : vector.factor == Factor::Kept     ? value(before.unit[n].k[vector.state])
                              : vector.factor == Factor::OldState ? value(u.s[vector.state])
                                                                  : value(u.s1[vector.state]);
        backward_sum += value(u.k[vector.slot]) * factor * *tangent++;
      }
      for (int i = 0; i < cell.states; ++i) backward_sum += value(i == 0 ? u.grad[0] + through<Cell, 0>(row, n) : u.grad[i]) * *tangent++;
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

// A clipped gradient goes through the page as any other does.
void test_grad_clip() {
  const F a[] = {F(0.3)}, k[] = {F(0.5)}, w[] = {F(2)}, s[] = {F(0)}, s1[] = {F(0.5)};
  for (const double given : {-5.0, -2.0, 0.7, 3.0}) {
    F clipped[1], plain[1], d[1] = {F(0)};
    clipped[0] = plain[0] = k[0];
    GradClip<Srn<Tanh>>::backward<0>(F(given), w, s, s1, clipped, d);
    Srn<Tanh>::backward<0>(F(std::fmin(std::fmax(given, -2.0), 2.0)), w, s, s1, plain, d);
    check(value(clipped[0]) == value(plain[0]), "a gradient of %g is clipped to %g", given, value(clipped[0]));
    F made[2];
    GradClip<Srn<Tanh>>::forward<0>(a, w, s, made, made + 1);
    check(value(made[0]) == std::tanh(0.3) || std::fabs(value(made[0]) - std::tanh(0.3)) < 1e-15, "forward is the page's");
  }
}

// With its own backward and with the automatic one, which both must be forward's transpose.
template <class Page>
void test_both(const char* name) {
  test<Complete<Page>>(name);
  constexpr CellInfo page = InfoOf<Page>::value;
  if constexpr (!page.projected() && page.stages + page.given_slots() <= 2 && page.writer == 0 && page.moments() == 0)
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
  test<Zoneout<LayerNorm<CellNormLstm, true>>>("lstm, both norms, zoneout");
  test<Variational<Zoneout<LayerNorm<CellNormLstm, false>>>>("lstm, all modifiers");
  test<Variational<LayerNorm<PeepholeLstm, true>>>("lstm_peephole, norm, variational");
  test_grad_clip();
  test<CellClip<PeepholeLstm>>("lstm_peephole, cell clip");
  test<Zoneout<CellClip<CoupledLstm>>>("lstm_coupled, cell clip, zoneout");
  test<CellClip<CandidateDropout<NoForgetLstm>>>("lstm_no_forget, candidate, cell clip");
  test<CandidateDropout<GruResetBefore>>("gru_reset_before, candidate");
  test<CandidateDropout<DreamerGru>>("gru_dreamer, candidate");
  test<CandidateDropout<CellNormLstm>>("lstm_cell_norm, candidate");
  test<Projected<CoupledLstm>>("lstm_coupled, projected");
  test<Zoneout<ProjClip<Projected<NoForgetLstm>>>>("lstm_no_forget, projected and clipped, zoneout");
  test<Projected<CellNormLstm>>("lstm_cell_norm, projected");
  test<Projected<LayerNorm<CellNormLstm, true>>>("lstm, both norms, projected");
  test<GradClip<Zoneout<ProjClip<Projected<LayerNorm<CellClip<CandidateDropout<PeepholeLstm>>, false>>>>>>("all that goes together");
  test<Variational<GradClip<Zoneout<LayerNorm<CandidateDropout<CellNormLstm>, true>>>>>("and the rest");
  return check_failures != 0;
}

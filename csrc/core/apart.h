// Whether two sequences of the same sizes, a layer's two directions, run one after the other, each by all threads, or side by side.
#pragma once

#include "core/plan.h"

namespace rnnkernels {

inline bool gains_apart(const Machine& m, const CellInfo& cell, Problem p, bool training) {
  if (p.threads < 2 || p.steps < 2 || p.batch < 1 || p.complete) return false;
  const auto cost = [&](int threads) {
    p.threads = threads;
    return plan(m, cell, p, false).ns + (training ? plan(m, cell, p, true).ns : 0);
  };
  int64_t matrices = 0;
  for (int s = 0; s < cell.stages; ++s) {
    const Product product = forward_product(cell, p, s);
    matrices += panel_count(m, product, 1) * panel_bytes(m, product, 1);
  }
  const double in_turn = 2 * cost(p.threads), together = cost(1);
  // Where a batch is split the model finds no difference. What it does not see are one start of the team instead of two and taller tiles,
  // which tell for small batches, as long as a core's L2 holds a whole matrix and the input's besides.
  return together < 0.97 * in_turn || (together < 1.01 * in_turn && p.batch <= 16 && matrices <= m.l2_bytes / 2);
}

}  // namespace rnnkernels

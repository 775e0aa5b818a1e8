// Sequences of the same sizes on a thread each instead of one after the other by all threads: a layer's two directions, or the layers of a
// stack, each a few steps behind the one below.
#pragma once

#include "core/plan.h"

namespace rnnkernels {

// What the model knows of a sequence's time, forward and, training, backward.
inline double sequence_ns(const Machine& m, const CellInfo& cell, Problem p, bool training, int threads) {
  p.threads = threads;
  return plan(m, cell, p, false).ns + (training ? plan(m, cell, p, true).ns : 0);
}

// What it does not see are one start of the team instead of several and taller tiles, which tell for small batches, as long as a core's L2
// holds a whole matrix and the input's besides.
inline bool is_sooner(const Machine& m, const CellInfo& cell, const Problem& p, double together, double in_turn) {
  return together < 0.97 * in_turn || (together < 1.01 * in_turn && p.batch <= 16 && matrix_bytes(m, cell, p).recurrent <= m.l2_bytes / 2);
}

inline bool gains_apart(const Machine& m, const CellInfo& cell, const Problem& p, bool training) {
  if (p.threads < 2 || p.steps < 2 || p.batch < 1 || p.complete) return false;
  return is_sooner(m, cell, p, sequence_ns(m, cell, p, training, 1), 2 * sequence_ns(m, cell, p, training, p.threads));
}

constexpr double kChainSaves = 10e3;  // nanoseconds

// p: any layer but the first, whose input is `first_input` wide.
inline bool gains_chained(const Machine& m, const CellInfo& cell, const Problem& p, int64_t first_input, int layers) {
  if (p.threads < 2 || layers < 2 || p.steps < 2 * chain_steps(p) || p.batch < 1) return false;
  Problem first = p;
  first.input = first_input;
  const double own = sequence_ns(m, cell, p, false, 1), own_first = sequence_ns(m, cell, first, false, 1);
  const double in_turn = sequence_ns(m, cell, first, false, p.threads) + (layers - 1) * sequence_ns(m, cell, p, false, p.threads);
  const double rounds = double(ceil_div(layers, p.threads));
  const double behind = double(chain_steps(p) * ((layers < p.threads ? layers : p.threads) - 1)) / double(p.steps);
  const double together = (own > own_first ? own : own_first) + own * (rounds - 1 + behind);
  // Threads that wait for each other lose much on cores that others use too: not for a few microseconds.
  return together + kChainSaves < in_turn && is_sooner(m, cell, p, together, in_turn);
}

}  // namespace rnnkernels

// The instruction set that runs, and what plans know of it.
#pragma once

#include "engines/cpu/engine.h"
#include "engines/cpu/table.h"

namespace rnnkernels::cpu {

const Isa& current();

inline int number_of(Storage s) { return s == Storage::F64; }

inline Machine machine(const Isa& isa, const Problem& p) {
  Machine m{};
  m.lanes = isa.number[number_of(p.storage)].lanes;
  m.registers = isa.number[number_of(p.storage)].registers;
  m.number_bytes = kNumberBytes[int(p.storage)];
  static const int64_t l1 = level1_bytes();
  if (l1 > 0) m.l1_bytes = weights_in_l1(l1);
  m.pairs = isa.pairs && p.storage == Storage::BF16 && !p.units;  // where a unit's block begins may be between two
  m.matrices = m.pairs && isa.pairs->start;
  return m;
}

// What products need of the thread that takes them.
class Registers {
 public:
  explicit Registers(const PairOps* pairs) : pairs_(pairs && pairs->start ? pairs : nullptr) {
    if (pairs_) pairs_->start();
  }
  ~Registers() {
    if (pairs_) pairs_->finish();
  }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;

 private:
  const PairOps* pairs_;
};

}  // namespace rnnkernels::cpu

// Panels that a core's L2 does not hold come from L3 while others are multiplied.
#pragma once

#include "core/plan.h"

namespace rnnkernels {

class Ahead {
 public:
  Ahead(const Machine& m, int64_t count, int64_t panel_bytes) : wanted_(count * panel_bytes > m.l2_bytes / 2), bytes_(panel_bytes) {}

  // What a tile asks for of the next panel: as many lines as the product has k, the first tile the first ones; null for nothing.
  const void* lines(const void* next, int64_t tile, int64_t depth) const {
    const int64_t first = tile * depth * 64;
    return wanted_ && next && first < bytes_ ? static_cast<const char*>(next) + first : nullptr;
  }

 private:
  bool wanted_;
  int64_t bytes_;
};

}  // namespace rnnkernels

// What a product asks for while it multiplies, so that it is in L2 when it is wanted. Asked for all at once most of it would wait for the
// rest: a core has room for some twenty lines on their way.
#pragma once

#include "core/plan.h"

namespace rnnkernels {

// Whether a tile takes so long for a k that it can ask for a line as well.
RNN_FN constexpr bool asks_ahead(int64_t rows, int vectors, int lanes) { return rows >= 4 && rows * vectors >= 12 && lanes >= 8; }

// Pieces of memory, `stride` bytes apart, of 2^shift lines each. Any address will do.
struct Ahead {
  const char* first;
  int64_t stride, count;
  int shift;

  RNN_FN int64_t lines() const { return count << shift; }
  // The k-th of them all.
  RNN_FN const char* line(int64_t k) const { return first + (k >> shift) * stride + (k & ((int64_t(1) << shift) - 1)) * 64; }
};

// Asked for one after the other. What will be written is taken from other cores, which had better not want it.
struct Soon {
  Ahead reads[3], writes;
  RNN_FN bool any() const { return reads[0].count || reads[1].count || reads[2].count || writes.count; }
};

// Pieces of so many bytes.
class Pieces {
 public:
  Pieces(int64_t bytes, int64_t stride) : stride_(stride) {
    while ((int64_t(64) << shift_) < bytes) ++shift_;
  }
  Ahead at(const void* first, int64_t count) const { return {static_cast<const char*>(first), stride_, first ? count : 0, shift_}; }

 private:
  int64_t stride_;
  int shift_ = 0;
};

// How many of n places, from the first on, are so far apart: those of another thread may lie between the others, and are not to be touched.
template <class Place>
int64_t run_of(int n, int64_t apart, const Place& place) {
  int run = 1;
  while (run < n && place(run) == place(0) + run * apart) ++run;
  return run;
}

// Panels that a core's L2 does not hold come from L3 while others are multiplied, each by so many tiles.
class PanelsAhead {
 public:
  PanelsAhead(const Machine& m, const Product& product, int blocks, int64_t count, int64_t tiles)
      : bytes_(panel_bytes(m, product, blocks)),
        share_(by_matrices(m, product) && tiles ? ceil_div(bytes_, tiles * 64) : 0),
        far_(count * bytes_ > m.l2_bytes / 2) {}

  bool far() const { return far_; }
  // Whether a tile asks for some of the next panel: its share of it, or as many lines as the product has k, the first tile the first ones.
  bool wanted(const void* next, int64_t tile, int64_t depth) const { return far_ && next && tile * lines_of(depth) * 64 < bytes_; }
  Ahead lines(const void* next, int64_t tile, int64_t depth) const {
    return {static_cast<const char*>(next) + tile * lines_of(depth) * 64, 64, lines_of(depth), 0};
  }

 private:
  int64_t lines_of(int64_t depth) const { return share_ ? share_ : depth; }

  int64_t bytes_, share_;
  bool far_;
};

}  // namespace rnnkernels

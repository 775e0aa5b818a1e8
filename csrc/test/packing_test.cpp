// Weights on their way into the kernels: every number of every matrix, told by its own bits, comes to lie in exactly one place of one
// thread, at the row and the depth that this thread multiplies; everything else is zero.
#include <cstdio>
#include <vector>

#include "cells/list.h"
#include "engines/cuda/packing.h"
#include "test/check.h"
#include "test/reset_before.h"

namespace rnnkernels {
namespace {

template <class Arithmetic, class S>
void test(const CellInfo& cell, const Problem& p, bool backward, Exchange exchange, int unit_ctas) {
  const Tiling t = tile(cell, p, backward, exchange, unit_ctas, 1);
  if (!check(t.fits, "%s H %ld does not fit", cell.name, long(p.hidden))) return;
  for (int s = 0; s < cell.stages; ++s) {
    const StageTiling& g = t.stage[s];
    const Product product = backward ? backward_product(cell, p, s) : forward_product(cell, p, s);
    if (!product.depth) continue;
    const int64_t rows = product.units * product.columns, count = rows * product.depth;
    if (!check(sizeof(S) == 4 || count < 0xffff, "more numbers than a half type tells apart")) return;
    // Number i, counted by result, unit and depth, has the bits of i + 1.
    const cuda::Matrix shape = cuda::matrix_of(cell, p, std::vector<const void*>(kMaxStages, &count).data(), backward, s);
    std::vector<S> numbers(static_cast<size_t>(count));
    const auto place = [&](int64_t c, int64_t u, int64_t k) { return size_t(c * shape.column + u * shape.unit + k * shape.depth); };
    const auto bits = [&](int64_t c, int64_t u, int64_t k) { return uint32_t((c * product.units + u) * product.depth + k + 1); };
    const auto set = [](S& to, uint32_t x) {
      if constexpr (sizeof(S) == 4)
        to = float_of_bits(x);
      else
        to = S{uint16_t(x)};
    };
    for (int64_t c = 0; c < product.columns; ++c)
      for (int64_t u = 0; u < product.units; ++u)
        for (int64_t k = 0; k < product.depth; ++k) set(numbers[place(c, u, k)], bits(c, u, k));
    cuda::Matrix matrix = shape;
    matrix.weights = numbers.data();

    std::vector<int> seen(static_cast<size_t>(count), 0);
    int64_t wrong = 0;
    for (int block = 0; block < unit_ctas; ++block)
      for (int i = 0; i < g.items(); ++i)
        for (int w = 0; w < Arithmetic::shape.item_words; ++w)
          for (int thread = 0; thread < kThreads; ++thread) {
            const cuda::Word word = cuda::pack<Arithmetic, S>(t, s, matrix, block, i, w, thread);
            const cuda::Lane<Arithmetic> lane(g, thread);
            for (int e = 0; e < 4; ++e)
              for (int v = 0; v < Arithmetic::shape.word_values; ++v) {
                const uint32_t found = sizeof(S) == 4 ? word.x[e] : (word.x[e] >> (16 * v)) & 0xffff;
                const cuda::Place at = Arithmetic::place(thread % 32, g.panel_rows, w, e);
                // What the kernel takes this number for: a row of the block's matrix, and a number of the operand as the blocks send it.
                const int row = lane.panel(g, i / g.per_slice) * g.panel_rows + at.row;
                const int wire = lane.depth(g, i % g.per_slice) + at.word;
                const StageTiling& from = t.stage[g.source];
                const int words = from.send_columns * from.column_words, sender = wire / words;
                const int c_sent = wire % words / from.column_words, u_sent = wire % from.column_words * Arithmetic::shape.word_values + v;
                const int64_t unit = int64_t(block) * g.block_units + row % g.block_units, c = row / g.block_units;
                const int64_t sent = int64_t(sender) * from.block_units + u_sent;
                const bool real = c < g.columns && unit < g.units && sender < unit_ctas && u_sent < from.block_units && sent < from.units;
                if (found != (real ? bits(c, unit, c_sent * from.units + sent) : 0)) ++wrong;
                if (found) ++seen[size_t(found - 1)];
              }
          }
    for (int n : seen) wrong += n != 1;
    check(wrong == 0, "%s %s stage %d H %ld, %d blocks, %s: %ld numbers in the wrong place", cell.name, backward ? "backward" : "forward",
          s, long(p.hidden), unit_ctas,
          sizeof(S) == 2             ? "half"
          : Arithmetic::shape.tensor ? "tf32"
                                     : "float32",
          long(wrong));
  }
}

}  // namespace
}  // namespace rnnkernels

int main() {
  using namespace rnnkernels;
  std::vector<CellInfo> cells(kCells, kCells + kCellCount);
  cells.push_back(describe<ResetBefore>("reset_before"));
  int count = 0;
  for (const CellInfo& cell : cells)
    for (int64_t hidden : {1, 2, 7, 33, 64, 100})
      for (int unit_ctas : {1, 3, 7})
        for (bool backward : {false, true}) {
          if (unit_ctas > hidden) continue;
          const int64_t output = cell.projected() ? (hidden + 1) / 2 : hidden;
          const Problem p{0, Storage::F32, 1, 1, 1, hidden, output, nullptr, false, true, false, 1, Products::Exact};
          Problem tf32 = p, half = p;
          tf32.products = Products::ThreeTf32;
          half.storage = Storage::BF16;
          test<cuda::Exact, float>(cell, p, backward, Exchange::Grid, unit_ctas);
          test<cuda::Tensor<cuda::Fragment::Tf32>, float>(cell, tf32, backward, Exchange::Grid, unit_ctas);
          if (4 * hidden * hidden < 0xffff) test<cuda::Tensor<cuda::Fragment::Bf16>, bf16>(cell, half, backward, Exchange::Near, unit_ctas);
          ++count;
        }
  std::printf("%d matrices packed three ways\n", count);
  return check_failures != 0;
}

// Matrices and rows of bfloat16 as products take them, of any size and in memory of no more: packed, spread and turned, then multiplied,
// they give the sums of the numbers that went in, on every instruction set.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engines/cpu/engine.h"
#include "engines/cpu/machine.h"
#include "test/check.h"

namespace rnnkernels::cpu {
namespace {

std::mt19937 random_bits(1);

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

std::unique_ptr<bf16[]> numbers(int64_t n) {
  std::unique_ptr<bf16[]> made(new bf16[size_t(n)]);
  for (int64_t i = 0; i < n; ++i) made[size_t(i)] = narrow<bf16>(float(between(-1000, 1000)) / 500);
  return made;
}

// Memory of so many bytes and not one more, full of NaN.
std::unique_ptr<char[]> memory(int64_t bytes) {
  std::unique_ptr<char[]> made(new char[size_t(bytes)]);
  std::memset(made.get(), 0xff, size_t(bytes));
  return made;
}

struct Kernels {
  explicit Kernels(const Isa& isa)
      : isa(isa),
        pairs(isa.pairs != nullptr),
        tiles(pairs ? isa.pairs->products : isa.number[0].products[0]),
        panels(pairs ? isa.pairs->panels : isa.storage[int(Storage::BF16)].panels),
        m(machine(isa, {0, Storage::BF16, 1, 1, 1, 1, 1, nullptr, false, false, false, 1})) {}

  // Whether a row times all panels of a product is what `exact` says of each unit and column.
  template <class Exact>
  void multiply(const Product& p, int blocks, const void* row, const char* packed, const char* what, const Exact& exact) const {
    const int vectors = blocks * p.columns;
    const Registers registers(isa.pairs);
    alignas(64) float sums[kMaxVectorsPerPanel * 16];
    for (int64_t panel = 0; panel < panel_count(m, p, blocks); ++panel) {
      tiles.tile[vectors - 1][0](&row, packed + panel * panel_bytes(m, p, blocks), words(m, p, p.depth),
                                 {nullptr, 0, sums, vectors * m.lanes}, nullptr);
      for (int v = 0; v < vectors; ++v)
        for (int lane = 0; lane < m.lanes; ++lane) {
          const int64_t unit = (panel * blocks + v / p.columns) * m.lanes + lane;
          const double expected = unit < p.units ? exact(unit, v % p.columns) : 0, found = sums[v * m.lanes + lane];
          check(std::fabs(found - expected) < 1e-3, "%s %s: depth %ld, %ld units, unit %ld: %g, not %g", isa.name, what, long(p.depth),
                long(p.units), long(unit), found, expected);
        }
    }
  }

  const Isa& isa;
  const bool pairs;
  const Tiles& tiles;
  const PanelOps& panels;
  const Machine m;
};

void packed(const Kernels& k) {
  const int columns = int(between(1, 4)), blocks = int(between(1, kMaxVectorsPerPanel / columns));
  const Product p{between(1, 50), between(1, 70), columns};
  const auto weights = numbers(p.columns * p.units * p.depth), x = numbers(p.depth);
  const auto panels = memory(panel_count(k.m, p, blocks) * panel_bytes(k.m, p, blocks)), row = memory(words(k.m, p, p.depth) * 4);
  for (int64_t panel = 0; panel < panel_count(k.m, p, blocks); ++panel)
    k.panels.pack(weights.get(), p, blocks, panel, panel + 1, 0, panels.get());
  std::vector<float> wide(static_cast<size_t>(p.depth));
  for (int64_t i = 0; i < p.depth; ++i) wide[size_t(i)] = widen(x[size_t(i)]);
  if (k.pairs)
    k.isa.pairs->narrow(wide.data(), p.depth, row.get());
  else
    std::memcpy(row.get(), wide.data(), size_t(p.depth) * 4);
  k.multiply(p, blocks, row.get(), panels.get(), "packed", [&](int64_t unit, int column) {
    double sum = 0;
    for (int64_t i = 0; i < p.depth; ++i) sum += double(wide[size_t(i)]) * widen(weights[size_t((column * p.units + unit) * p.depth + i)]);
    return sum;
  });
}

// Rows, some of them null, once as a matrix and once as columns.
void spread_and_turned(const Kernels& k) {
  const int blocks = int(between(1, kMaxVectorsPerPanel));
  const Product p{between(1, 50), between(1, 70), 1};
  std::vector<std::unique_ptr<bf16[]>> rows;
  std::vector<const void*> spread_rows, turned_rows;
  for (int64_t i = 0; i < p.depth; ++i) {
    rows.push_back(numbers(p.units));
    turned_rows.push_back(rows.back().get());
    spread_rows.push_back(between(0, 6) ? rows.back().get() : nullptr);
  }
  const int64_t panels = panel_count(k.m, p, blocks), cut = std::min<int64_t>(p.depth, k.m.lanes * 2 * between(0, 3));
  const auto matrix = memory(panels * panel_bytes(k.m, p, blocks));
  k.panels.spread(spread_rows.data(), p, blocks, 0, panels, 0, cut, matrix.get());
  k.panels.spread(spread_rows.data(), p, blocks, 0, panels, cut, p.depth, matrix.get());
  const int64_t first = between(0, p.units - 1), width = p.units - first, row = words(k.m, p, p.depth);
  const auto turned = memory(width * row * 4);
  k.panels.turn(turned_rows.data(), first, width, p.depth, turned.get(), row);
  for (int64_t c = 0; c < width; ++c)
    k.multiply(p, blocks, turned.get() + c * row * 4, matrix.get(), "spread and turned", [&](int64_t unit, int) {
      double sum = 0;
      for (int64_t i = 0; i < p.depth; ++i)
        if (spread_rows[size_t(i)]) sum += double(widen(rows[size_t(i)][size_t(first + c)])) * widen(rows[size_t(i)][size_t(unit)]);
      return sum;
    });
}

// Several rows at once, side by side or anywhere, with or without something to add: the same for each or one for all.
void tiles(const Kernels& k) {
  const int vectors = int(between(1, kMaxVectorsPerPanel)), row_of_tile = vectors * k.m.lanes;
  const Product p{k.m.lanes, between(1, 1200), vectors};
  const int count = int(between(1, tile_rows(k.m, p, vectors)));
  const int64_t depth = words(k.m, p, p.depth), row = (depth + between(0, 40)) * 4;
  const auto weights = numbers(vectors * k.m.lanes * p.depth);
  const auto panel = memory(panel_bytes(k.m, p, 1)), rows = memory(2 * count * row);
  k.panels.pack(weights.get(), p, 1, 0, 1, 0, panel.get());
  std::vector<std::vector<float>> wide;
  std::vector<const void*> operands;
  const bool apart = between(0, 1);
  for (int r = 0; r < count; ++r) {
    const auto x = numbers(p.depth);
    wide.emplace_back();
    for (int64_t i = 0; i < p.depth; ++i) wide.back().push_back(widen(x[size_t(i)]));
    char* const to = rows.get() + (r + (apart ? between(0, 1) * count : 0)) * row;
    operands.push_back(to);
    if (k.pairs)
      k.isa.pairs->narrow(wide.back().data(), p.depth, to);
    else
      std::memcpy(to, wide.back().data(), size_t(p.depth) * 4);
  }
  const int64_t to_row = row_of_tile + 16 * between(0, 2), also_row = between(0, 1) * (row_of_tile + 16);
  const bool adds = between(0, 1);
  const auto to = memory(count * to_row * 4), also = memory((count * also_row + row_of_tile) * 4);
  const auto number_of = [](const auto& memory, int64_t i) {
    float x;
    std::memcpy(&x, memory.get() + i * 4, 4);
    return x;
  };
  for (int64_t i = 0; i < count * also_row + row_of_tile; ++i) {
    const float x = float(between(-8, 8));
    std::memcpy(also.get() + i * 4, &x, 4);
  }
  Soon soon{};
  soon.reads[1] = {panel.get(), 64, between(0, 20), 1};
  soon.writes = {to.get(), 64, between(0, 3), 0};
  const Registers registers(k.isa.pairs);
  k.tiles.tile[vectors - 1][count - 1](operands.data(), panel.get(), depth, {adds ? also.get() : nullptr, also_row, to.get(), to_row},
                                       between(0, 1) ? &soon : nullptr);
  for (int r = 0; r < count; ++r)
    for (int column = 0; column < vectors; ++column)
      for (int lane = 0; lane < k.m.lanes; ++lane) {
        const int64_t at = column * k.m.lanes + lane;
        double expected = adds ? number_of(also, r * also_row + at) : 0;
        for (int64_t i = 0; i < p.depth; ++i) expected += double(wide[size_t(r)][size_t(i)]) * widen(weights[size_t(at * p.depth + i)]);
        const double found = number_of(to, r * to_row + at);
        check(std::fabs(found - expected) < 4e-3, "%s: %d rows by %d vectors, depth %ld, row %d, number %ld: %g, not %g", k.isa.name, count,
              vectors, long(p.depth), r, long(at), found, expected);
      }
}

}  // namespace
}  // namespace rnnkernels::cpu

int main() {
  using namespace rnnkernels;
  for (const std::string& name : cpu::supported_isas()) {
    cpu::set_isa(name);
    const cpu::Kernels kernels(cpu::current());
    for (int i = 0; i < 1000; ++i) {
      cpu::packed(kernels);
      cpu::spread_and_turned(kernels);
      cpu::tiles(kernels);
    }
    std::printf("%s: 1000 matrices\n", name.c_str());
  }
  return check_failures != 0;
}

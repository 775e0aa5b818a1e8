// The roofs of the benchmarks, measured with the engine's own product and barrier.
#include <chrono>

#include "engines/cpu/engine.h"
#include "engines/cpu/walk.h"

namespace rnnkernels::cpu {

namespace {

// How long a team takes whose members each multiply rows by a panel of their own, so many words deep, over and over; how many came.
struct Timed {
  double seconds;
  int members;
};
Timed multiply(const Tiles& tiles, int lanes, int64_t word_bytes, int vectors, int rows, int64_t depth, int64_t repeats, int threads) {
  Timed timed{0, 1};
  run_team(threads, [&](int id, int members) {
    const size_t panel_bytes = size_t(depth * vectors * lanes * word_bytes), row_bytes = size_t(depth * word_bytes);
    // Some bits set: pages that nobody has written are all the same one.
    std::vector<char> panel(panel_bytes + 64, 0x3c), row(row_bytes * size_t(rows), 0x3c);
    const void* operands[kMaxTileRows];
    for (int r = 0; r < rows; ++r) operands[r] = row.data() + size_t(r) * row_bytes;
    alignas(64) char sums[kTileBytes];
    const auto aligned = reinterpret_cast<const char*>((reinterpret_cast<uintptr_t>(panel.data()) + 63) / 64 * 64);
    auto pass = [&] { tiles.tile[vectors - 1][rows - 1](operands, aligned, depth, {nullptr, 0, sums, vectors * lanes}, nullptr); };
    pass();
    meet(members);
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < repeats; ++i) pass();
    meet(members);
    if (id == 0) timed = {std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), members};
  });
  return timed;
}

}  // namespace

double measure_bandwidth(int64_t bytes, int threads) {
  const NumberOps& ops = current().number[0];
  const int64_t line = kMaxVectorsPerPanel * ops.lanes * 4, depth = std::max<int64_t>(1, bytes / line);
  const int64_t repeats = std::max<int64_t>(4, (int64_t(1) << 28) / std::max<int64_t>(bytes, 1));
  const Timed timed = multiply(ops.products[0], ops.lanes, 4, kMaxVectorsPerPanel, 1, depth, repeats, threads);
  return double(depth * line) * double(repeats) * timed.members / timed.seconds * 1e-9;
}

double measure_product(Storage storage, int threads) {
  const Isa& isa = current();
  const NumberOps& ops = isa.number[number_of(storage)];
  const bool pairs = isa.pairs && storage == Storage::BF16;
  const Tiles& tiles = pairs ? isa.pairs->products : ops.products[0];
  const int64_t bytes = kNumberBytes[int(storage)];
  double best = 0;
  for (int vectors = 1; vectors <= kMaxVectorsPerPanel; ++vectors)
    for (int rows = 1; rows <= kMaxTileRows; ++rows) {
      if (2 * vectors * rows <= ops.registers || vectors * rows > ops.registers) continue;
      const int64_t depth = (8 << 10) / (vectors * ops.lanes * bytes), adds = depth * vectors * ops.lanes * rows;
      const int64_t repeats = (int64_t(1) << 26) / adds + 1;
      const Timed timed = multiply(tiles, ops.lanes, bytes, vectors, rows, depth, repeats, threads);
      best = std::max(best, (pairs ? 4 : 2) * double(adds) * double(repeats) * timed.members / timed.seconds * 1e-9);
    }
  return best;
}

double measure_barrier(int threads) {
  constexpr int64_t repeats = 20000;
  Barrier barrier;
  double seconds = 0;
  run_team(threads, [&](int id, int members) {
    if (id == 0) barrier.start(members);
    meet(members);
    uint32_t round = 0;
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < repeats; ++i) barrier.wait(round);
    if (id == 0) seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  });
  return seconds / repeats * 1e6;
}

}  // namespace rnnkernels::cpu

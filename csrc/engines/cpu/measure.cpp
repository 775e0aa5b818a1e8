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
Timed multiply(const Tiles& tiles, const PairOps* pairs, int lanes, int64_t word_bytes, int vectors, int rows, int64_t depth,
               int64_t repeats, int threads) {
  Timed timed{0, 1};
  run_team(threads, [&](int id, int members) {
    const Registers registers(pairs);
    const size_t panel_bytes = size_t(depth * vectors * lanes * word_bytes), row_bytes = size_t(padded(depth, word_bytes) * word_bytes);
    // Some bits set: pages that nobody has written are all the same one.
    std::vector<char> panel(panel_bytes + 64, 0x3c), row(row_bytes * size_t(rows) + 64, 0x3c);
    const void* operands[kMaxTileRows];
    const auto on_a_line = [](const std::vector<char>& memory) {
      return reinterpret_cast<const char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    };
    for (int r = 0; r < rows; ++r) operands[r] = on_a_line(row) + size_t(r) * row_bytes;
    alignas(64) char sums[kTileBytes];
    const char* const aligned = on_a_line(panel);
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
  const Timed timed = multiply(ops.products[0], nullptr, ops.lanes, 4, kMaxVectorsPerPanel, 1, depth, repeats, threads);
  return double(depth * line) * double(repeats) * timed.members / timed.seconds * 1e-9;
}

double measure_product(Storage storage, int threads) {
  const Isa& isa = current();
  const NumberOps& ops = isa.number[number_of(storage)];
  const PairOps* const pairs = storage == Storage::BF16 ? isa.pairs : nullptr;
  const Tiles& tiles = pairs ? pairs->products : ops.products[0];
  const bool matrices = pairs && pairs->start;
  const int64_t bytes = kNumberBytes[int(storage)];
  double best = 0;
  for (int vectors = 1; vectors <= kMaxVectorsPerPanel; ++vectors)
    for (int rows = matrices ? kMaxTileRows : 1; rows <= (matrices ? kMaxTileRows : kMaxFmaRows); ++rows) {
      if (!matrices && (2 * vectors * rows <= ops.registers || vectors * rows > ops.registers)) continue;
      const int64_t depth = ((matrices ? 16 : 8) << 10) / (vectors * ops.lanes * bytes), adds = depth * vectors * ops.lanes * rows;
      const int64_t repeats = (int64_t(1) << 26) / adds + 1;
      const Timed timed = multiply(tiles, pairs, ops.lanes, bytes, vectors, rows, depth, repeats, threads);
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

namespace {

// Zeroed memory, piece by piece, each on lines of its own.
class Zeros {
 public:
  void* take(int64_t bytes) {
    pieces_.emplace_back(size_t(bytes) + 64);
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(pieces_.back().data()) + 63) / 64 * 64);
  }

 private:
  std::vector<std::vector<char>> pieces_;
};

constexpr int kPageRows = 6;

// A tile's rows of one vector of units, of which nothing is asked but the time they take.
struct OnePage {
  OnePage(const Page& page, const Isa& isa, Storage storage)
      : cell(page.cell),
        ops(page.ops[int(storage)]),
        units(isa.number[number_of(storage)].lanes),
        number(kPageRows * units * kNumberBytes[int(storage)]),
        stored(kPageRows * units * kStorageBytes[int(storage)]) {}

  double forward(bool training) {
    ForwardStep step{};
    step.hidden = step.output = units;
    if (training) step.kept = zeros.take(cell.room() * stored);
    step.between = zeros.take(cell.kept * number);
    step.between_row = cell.kept * units;
    step.between_slot = units;
    for (int i = 0; i < cell.states; ++i) {
      step.previous[i] = step.next[i] = zeros.take(number);
      step.state_row[i] = units;
      if (training || i == 0) step.history[i] = zeros.take(stored);
    }
    step.moments = zeros.take(cell.moments() * number);
    step.partial = static_cast<double*>(zeros.take(kPageRows * 2 * kMaxSums * int64_t(sizeof(double))));
    step.partial_row = 2 * kMaxSums;
    void* const sums = zeros.take(kMaxSlots * number);
    return time([&] {
      for (int s = 0; s < cell.stages; ++s) ops.forward[s](step, {0, kPageRows, 1}, 0, units, 1, sums, sums);
    });
  }
  double backward() {
    BackwardStep step{};
    step.hidden = step.output = units;
    step.kept = step.grad_gates = zeros.take(cell.room() * stored);
    step.grad_states[0] = zeros.take(stored);
    step.previous_rows = kPageRows;
    for (int i = 0; i < cell.states; ++i) {
      step.previous[i] = step.states[i] = zeros.take(stored);
      step.carried[i] = zeros.take(number);
      step.carried_row[i] = units;
    }
    for (int s = 0; s < cell.stages; ++s) {
      step.operand[s] = zeros.take(cell.hidden_slots(s) * number);
      step.operand_row[s] = cell.hidden_slots(s) * units;
      step.operand_slot[s] = units;
    }
    step.moments = zeros.take(cell.moments() * number);
    step.means = zeros.take(kMaxSums * number);
    step.partial = static_cast<double*>(zeros.take(kPageRows * 2 * kMaxSums * int64_t(sizeof(double))));
    step.partial_row = 2 * kMaxSums;
    void* const sums = zeros.take(number);
    return time([&] {
      for (int s = cell.stages - 1; s >= 0; --s) ops.backward[s](step, {0, kPageRows, 1}, 0, units, 1, sums);
    });
  }

 private:
  // Nanoseconds a unit of a row.
  template <class Tile>
  double time(const Tile& tile) const {
    constexpr int64_t repeats = 10000;
    for (int64_t i = 0; i < repeats / 10; ++i) tile();
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < repeats; ++i) tile();
    const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
    return taken.count() / double(repeats * kPageRows * units);
  }

  const CellInfo& cell;
  const PageOps& ops;
  const int64_t units, number, stored;  // bytes of a vector of each row
  Zeros zeros;
};

}  // namespace

double measure_page(int cell, Storage storage, bool training, bool backward) {
  OnePage page(page_of(cell, current()), current(), storage);
  return backward ? page.backward() : page.forward(training);
}

}  // namespace rnnkernels::cpu

// What this machine can do, measured: the benchmarks' roofs, and what plans depend on.
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>

#include "core/apart.h"
#include "engines/cpu/engine.h"
#include "engines/cpu/walk.h"

namespace rnnkernels::cpu {

double measure_bandwidth(int64_t bytes, int threads) {
  const Isa& isa = current();
  const NumberOps& ops = isa.number[0];
  const int vectors = kMaxVectorsPerPanel;
  const int64_t depth = std::max<int64_t>(1, bytes / (vectors * ops.lanes * 4));
  const int64_t repeats = std::max<int64_t>(4, (int64_t(1) << 28) / std::max<int64_t>(bytes, 1));
  std::vector<std::vector<float>> panels(static_cast<size_t>(std::max(threads, 1)));
  double seconds = 0;
  int team = 1;
  run_team(threads, [&](int id, int members) {
    std::vector<float>& panel = panels[size_t(id)];
    panel.assign(size_t(depth * vectors * ops.lanes) + 16, 1.0f);
    std::vector<float> row(size_t(depth), 1.0f);
    const void* rows[] = {row.data()};
    alignas(64) float sums[kMaxVectorsPerPanel * 16];
    const auto aligned = reinterpret_cast<const float*>((reinterpret_cast<uintptr_t>(panel.data()) + 63) / 64 * 64);
    auto pass = [&] { ops.product[0][vectors - 1][0](rows, aligned, depth, sums, nullptr); };
    pass();
    meet(members);
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < repeats; ++i) pass();
    meet(members);
    if (id == 0) seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), team = members;
  });
  return double(depth * vectors * ops.lanes * 4) * double(repeats) * team / seconds * 1e-9;
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

using Clock = std::chrono::steady_clock;

constexpr int kWaits = 8, kRounds = 8;
constexpr auto kPatience = std::chrono::microseconds(100);

// The shortest of a few rounds of as many waits, since whatever disturbs one only makes it longer. Nobody sleeps or waits long: where
// threads have no core each there is no answer.
Clock::duration shortest_waits(int threads, int& team) {
  std::atomic<int> arrived{0};
  std::atomic<bool> stop{false};
  Clock::duration shortest = Clock::duration::max();
  run_team(threads, [&](int id, int members) {
    if (id == 0) team = members;
    const auto deadline = Clock::now() + kPatience;
    for (int round = 0; round < kRounds; ++round) {
      const auto start = Clock::now();
      for (int n = 1; n <= kWaits; ++n) {
        arrived.fetch_add(1);
        for (int spins = 1; arrived.load(std::memory_order_acquire) < (round * kWaits + n) * members; ++spins) {
          pause_thread();
          if (stop.load(std::memory_order_relaxed)) return;
          if (spins % 64 == 0 && Clock::now() > deadline) return stop.store(true);
        }
      }
      if (id == 0) shortest = std::min(shortest, Clock::now() - start);
    }
  });
  return shortest;
}

struct Looked {
  Clock::time_point again;
  bool far = false;
};

}  // namespace

bool far_apart(int threads) {
  static std::mutex mutex;
  static std::map<int, Looked> known;
  if (threads < 2) return false;
  const std::lock_guard<std::mutex> lock(mutex);
  Looked& looked = known[threads];
  const auto now = Clock::now();
  if (now < looked.again) return looked.far;
  int team = 1;
  const auto waits = shortest_waits(threads, team);
  if (waits != Clock::duration::max()) looked.far = are_far(std::chrono::duration<double, std::nano>(waits).count() / kWaits, team);
  // On a busy machine a look takes as long as a team takes to come together: a hundredth of the time at most.
  const auto after = Clock::now();
  looked.again = after + std::max<Clock::duration>(std::chrono::milliseconds(100), 100 * (after - now));
  return looked.far;
}

}  // namespace rnnkernels::cpu

// The roofs of the benchmarks, measured with the engine's own product and barrier.
#include <chrono>
#include <mutex>

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

}  // namespace rnnkernels::cpu

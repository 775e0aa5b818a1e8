// The persistent CUDA kernels on the host, thread by thread: every thread of every block is a fiber, and which one runs next is drawn at
// random, at each barrier and at each look at another block's memory. Held against the CPU engine, for every cell and storage type, sizes
// odd and even, ragged and reversed, on devices that bring many blocks.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "cells/list.h"
#include "engines/cpu/engine.h"
#include "engines/cpu/kernels.h"
#include "engines/cuda/persistent.h"
#include "test/check.h"
#include "test/reset_before.h"

namespace rnnkernels {
namespace {

// ---- a grid on the host

class Grid {
 public:
  Grid(int blocks, int threads, int64_t shared_bytes, unsigned seed) : threads_(threads), random_(seed) {
    for (int b = 0; b < blocks; ++b) {
      shared_.emplace_back(static_cast<size_t>(shared_bytes) + 16, char(0xff));  // NaN wherever nobody wrote
      waiting_.push_back(0);
    }
  }

  struct Cta {
    Grid* grid;
    int block_, thread_;
    int block() const { return block_; }
    int thread() const { return thread_; }
    char* shared() const {
      char* p = grid->shared_[size_t(block_)].data();
      return p + (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16;
    }
    void sync() const { grid->sync(block_, thread_); }
    uint64_t load(const uint64_t* p) const {
      if (grid->random_() % 8 == 0) grid->yield(block_, thread_);
      return *p;
    }
    void store(uint64_t* p, uint64_t x) const {
      *p = x;
      ++grid->progress_;
      if (grid->random_() % 8 == 0) grid->yield(block_, thread_);
    }
    void waiting(uint32_t) const { grid->yield(block_, thread_); }
  };

  // False when the threads wait for each other for ever.
  bool run(const std::function<void(Cta&)>& kernel) {
    const size_t count = shared_.size() * size_t(threads_);
    fibers_ = std::vector<Fiber>(count);
    for (size_t i = 0; i < count; ++i) {
      Fiber& f = fibers_[i];
      f.stack.reset(new char[kStack]);
      f.body = [this, i, &kernel] {
        Cta cta{this, int(i) / threads_, int(i) % threads_};
        kernel(cta);
      };
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = &main_;
      const auto address = reinterpret_cast<uintptr_t>(&f);
      makecontext(&f.context, reinterpret_cast<void (*)()>(&Grid::enter), 2, unsigned(address >> 32), unsigned(address));
    }
    std::vector<size_t> ready(count);
    for (size_t i = 0; i < count; ++i) ready[i] = i;
    uint64_t seen = progress_, idle = 0;
    while (!ready.empty()) {
      // Blocks run in bursts, so that some lag far behind others.
      const size_t start = random_() % ready.size(), burst = 1 + random_() % 64;
      bool ran = false;
      for (size_t j = 0; j < burst && !ready.empty(); ++j) {
        const size_t at = (start + j) % ready.size();
        Fiber& f = fibers_[ready[at]];
        if (f.blocked) continue;
        ran = true;
        swapcontext(&main_, &f.context);
        if (f.done) {
          ready[at] = ready.back();
          ready.pop_back();
          ++progress_;
        }
      }
      idle = progress_ == seen ? idle + 1 : 0;
      seen = progress_;
      if (idle > 200000 + (ran ? 0 : 1)) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kStack = 64 << 10;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    std::function<void()> body;
    bool done = false, blocked = false;
  };

  static void enter(unsigned high, unsigned low) {
    Fiber* f = reinterpret_cast<Fiber*>(uintptr_t(high) << 32 | low);
    f->body();
    f->done = true;
  }
  Fiber& fiber(int block, int thread) { return fibers_[size_t(block) * size_t(threads_) + size_t(thread)]; }
  void yield(int block, int thread) { swapcontext(&fiber(block, thread).context, &main_); }
  void sync(int block, int thread) {
    if (++waiting_[size_t(block)] == threads_) {
      waiting_[size_t(block)] = 0;
      for (int i = 0; i < threads_; ++i) fiber(block, i).blocked = false;
      ++progress_;
      return;
    }
    fiber(block, thread).blocked = true;
    yield(block, thread);
  }

  const int threads_;
  std::mt19937 random_;
  std::vector<std::vector<char>> shared_;
  std::vector<int> waiting_;
  std::vector<Fiber> fibers_;
  ucontext_t main_;
  uint64_t progress_ = 0;
};

// ---- problems

struct Case {
  int64_t T, B, H;
  bool ragged, reverse;
  int unit_ctas, row_tiles, rows_at_once;
};

template <class S>
struct Arrays {
  std::vector<S> gates, output, final[2], history, grad_gates, grad_initial[2];
};

template <class S>
std::vector<S> draw(std::mt19937& random, int64_t n, float scale) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<S> v(static_cast<size_t>(n));
  for (S& x : v) x = narrow<S>(normal(random));
  return v;
}

template <class S>
double distance(const std::vector<S>& a, const std::vector<S>& b) {
  double worst = 0, scale = 1e-30;
  for (size_t i = 0; i < a.size(); ++i) scale = std::fmax(scale, std::fabs(double(widen(b[i]))));
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = std::fabs(double(widen(a[i])) - double(widen(b[i])));
    worst = std::isnan(d) ? INFINITY : std::fmax(worst, d);
  }
  return worst / scale;
}

template <class Cell, class S>
void test(const char* name, const cpu::Page& page, Storage storage, const Case& c, unsigned seed) {
  constexpr CellInfo cell = InfoOf<Cell>::value;
  const int64_t P = cell.projected() ? (c.H + 1) / 2 : c.H, room = cell.room() * c.H, X = cell.input_slots() * c.H;
  std::vector<int64_t> rows(size_t(c.T), c.B), offsets(size_t(c.T) + 1, 0);
  if (c.ragged)
    for (int64_t t = 0; t < c.T; ++t) rows[size_t(t)] = std::max<int64_t>(1, c.B - c.B * t / c.T);
  for (int64_t t = 0; t < c.T; ++t) offsets[size_t(t) + 1] = offsets[size_t(t)] + rows[size_t(t)];
  const int64_t N = offsets.back();
  const Problem p{0, storage, c.T, c.B, X, c.H, P, c.ragged ? rows.data() : nullptr, c.reverse, true, false, 1};
  std::mt19937 random(seed);
  const float scale = 1 / std::sqrt(float(c.H));
  // With the unit matrix for W the input is the input gates.
  const std::vector<S> x = draw<S>(random, N * X, 1);
  std::vector<S> unit(size_t(X * X), narrow<S>(0.0f));
  for (int64_t i = 0; i < X; ++i) unit[size_t(i * X + i)] = narrow<S>(1.0f);
  std::vector<S> weights[kMaxStages], vectors[kMaxVectors], initial[2], grad_final[2];
  for (int s = 0; s < cell.stages; ++s) {
    const Product product = forward_product(cell, p, s);
    weights[s] = draw<S>(random, product.units * product.columns * product.depth, scale);
  }
  for (int i = 0; i < cell.vectors; ++i) vectors[i] = draw<S>(random, c.H, 1);
  for (int i = 0; i < cell.states; ++i) {
    initial[i] = draw<S>(random, c.B * (i ? c.H : P), 1);
    grad_final[i] = draw<S>(random, c.B * (i ? c.H : P), 1);
  }
  const std::vector<S> grad_output = draw<S>(random, N * P, 1);

  const S nan = narrow<S>(NAN);
  Arrays<S> ours, theirs;
  for (Arrays<S>* a : {&ours, &theirs}) {
    a->gates.assign(size_t(N * room), nan);
    a->output.assign(size_t(N * P), nan);
    a->history.assign(size_t(N * c.H), nan);
    a->grad_gates.assign(size_t(N * room), nan);
    for (int i = 0; i < cell.states; ++i) {
      a->final[i].assign(size_t(c.B * (i ? c.H : P)), nan);
      a->grad_initial[i].assign(size_t(c.B * (i ? c.H : P)), nan);
    }
  }
  auto forward_of = [&](Arrays<S>& a) {
    Forward f{};
    f.problem = p;
    f.input = x.data();
    f.weight_ih = unit.data();
    f.gates = a.gates.data();
    f.gates_row = room;
    for (int s = 0; s < cell.stages; ++s) f.weights[s] = weights[s].data();
    for (int i = 0; i < cell.vectors; ++i) f.vectors[i] = vectors[i].data();
    for (int i = 0; i < cell.states; ++i) {
      f.initial[i] = initial[i].data();
      f.final[i] = a.final[i].data();
      if (i) f.history[i] = a.history.data();
    }
    f.output = a.output.data();
    return f;
  };
  auto backward_of = [&](Arrays<S>& a) {
    Backward g{};
    g.problem = p;
    if (cell.stages > 1) a.grad_gates = a.gates;
    g.kept = cell.stages > 1 ? a.grad_gates.data() : a.gates.data();
    g.grad_gates = a.grad_gates.data();
    for (int s = 0; s < cell.stages; ++s) g.weights[s] = weights[s].data();
    for (int i = 0; i < cell.vectors; ++i) g.vectors[i] = vectors[i].data();
    for (int i = 0; i < cell.states; ++i) {
      g.initial[i] = initial[i].data();
      g.grad_final[i] = grad_final[i].data();
      g.grad_initial[i] = a.grad_initial[i].data();
      if (i) g.history[i] = a.history.data();
    }
    g.output = a.output.data();
    g.grad_output = grad_output.data();
    return g;
  };

  {
    Forward f = forward_of(theirs);
    std::vector<char> workspace(size_t(cpu::workspace_bytes(p, page, false)));
    f.workspace = workspace.data();
    cpu::forward(f, page);
    Backward g = backward_of(theirs);
    workspace.resize(size_t(cpu::workspace_bytes(p, page, true)));
    g.workspace = workspace.data();
    cpu::backward(g, page);
  }

  const auto where = [&](const char* what, const Tiling& t) {
    char text[200];
    std::snprintf(text, sizeof text, "%s: %s %s T %ld B %ld H %ld%s%s, %d x %d blocks", what, name,
                  storage == Storage::F32    ? "float32"
                  : storage == Storage::BF16 ? "bfloat16"
                                             : "float16",
                  long(c.T), long(c.B), long(c.H), c.ragged ? " ragged" : "", c.reverse ? " reverse" : "", t.unit_ctas, t.row_tiles);
    return std::string(text);
  };
  const double tolerance = storage == Storage::F32 ? 2e-5 : storage == Storage::BF16 ? 2e-2 : 3e-3;
  {
    const Tiling t = tile(cell, p, false, c.unit_ctas, c.row_tiles, c.rows_at_once);
    if (!check(t.fits, "%s", where("does not fit", t).c_str())) return;
    for (int64_t n = 0; n < N; ++n) std::copy_n(x.begin() + n * X, X, ours.gates.begin() + n * room);
    std::vector<uint64_t> packets(size_t(t.packet_count), 0);
    const cuda::PersistentForward r{forward_of(ours), t, offsets.data(), packets.data()};
    Grid grid(t.unit_ctas * t.row_tiles, t.threads, t.shared_bytes, seed);
    const bool ended = grid.run([&](Grid::Cta& cta) { cuda::persistent_forward<Cell, S>(cta, r); });
    if (!check(ended, "%s", where("forward waits for ever", t).c_str())) return;
    double worst = distance(ours.output, theirs.output);
    for (int i = 0; i < cell.states; ++i) worst = std::fmax(worst, distance(ours.final[i], theirs.final[i]));
    check(worst <= tolerance, "%s differs by %g", where("forward", t).c_str(), worst);
  }
  {
    const Tiling t = tile(cell, p, true, c.unit_ctas, c.row_tiles, c.rows_at_once);
    if (!check(t.fits, "%s", where("does not fit", t).c_str())) return;
    std::vector<uint64_t> packets(size_t(t.packet_count), 0);
    const cuda::PersistentBackward r{backward_of(ours), t, offsets.data(), packets.data()};
    Grid grid(t.unit_ctas * t.row_tiles, t.threads, t.shared_bytes, seed + 1);
    const bool ended = grid.run([&](Grid::Cta& cta) { cuda::persistent_backward<Cell, S>(cta, r); });
    if (!check(ended, "%s", where("backward waits for ever", t).c_str())) return;
    // Of a token's room only the gradients of slots over their stage's width mean something.
    double worst = 0;
    for (int i = 0; i < cell.slots; ++i) {
      const int64_t width = width_of(p, cell.stage[cell.stage_of(i)].width);
      std::vector<S> a, b;
      for (int64_t n = 0; n < N; ++n)
        for (int64_t u = 0; u < width; ++u) {
          a.push_back(ours.grad_gates[size_t(n * room + i * c.H + u)]);
          b.push_back(theirs.grad_gates[size_t(n * room + i * c.H + u)]);
        }
      worst = std::fmax(worst, distance(a, b));
    }
    for (int i = 0; i < cell.states; ++i) worst = std::fmax(worst, distance(ours.grad_initial[i], theirs.grad_initial[i]));
    check(worst <= tolerance * 4, "%s differs by %g", where("backward", t).c_str(), worst);
  }
}

template <class Cell>
void test_cell(const char* name, const cpu::Page& page) {
  const Case cases[] = {
      {6, 1, 5, false, false, 5, 1, 8},  {7, 3, 7, true, false, 3, 1, 2},   {7, 3, 7, true, true, 4, 2, 8},
      {5, 17, 9, true, true, 3, 2, 4},   {4, 10, 33, false, true, 5, 1, 8}, {5, 2, 1, false, false, 1, 1, 1},
      {1, 9, 16, false, false, 2, 2, 8},
  };
  unsigned seed = 1;
  for (const Case& c : cases) {
    test<Cell, float>(name, page, Storage::F32, c, ++seed);
    test<Cell, bf16>(name, page, Storage::BF16, c, ++seed);
    test<Cell, f16>(name, page, Storage::F16, c, ++seed);
  }
}

}  // namespace
}  // namespace rnnkernels

int main() {
  using namespace rnnkernels;
  cpu::set_isa("scalar");
#define RNN_CELL(cell, ...)                                                                         \
  {                                                                                                 \
    static constexpr cpu::Page page = cpu::make_page<__VA_ARGS__, scalar::F32, scalar::F64>(#cell); \
    test_cell<__VA_ARGS__>(#cell, page);                                                            \
  }
#include "cells/cells.def"
#undef RNN_CELL
  static constexpr cpu::Page page = cpu::make_page<ResetBefore, scalar::F32, scalar::F64>("reset_before");
  test_cell<ResetBefore>("reset_before", page);
  return check_failures != 0;
}

// The persistent CUDA kernels on the host, thread by thread: every thread of every block is a fiber, and which one runs next is drawn at
// random, at each barrier and at each look at another block's memory; tensor cores are computed lane by lane as the PTX manual lays their
// fragments out. Held against the CPU engine, for every cell, storage type and way to multiply and to exchange, sizes odd and even, ragged
// and reversed.
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
#include "test/independent.h"
#include "test/reset_before.h"

namespace rnnkernels {
namespace {

// ---- a grid on the host

class Grid {
 public:
  Grid(const Tiling& t, unsigned seed) : tiling_(t), random_(seed) {
    for (int b = 0; b < t.unit_ctas * t.row_tiles; ++b) {
      shared_.emplace_back(static_cast<size_t>(t.shared_bytes) + 16, char(0xff));  // NaN wherever nobody wrote
      block_barriers_.emplace_back();
    }
    tile_barriers_.resize(size_t(t.row_tiles));
    warps_.resize(shared_.size() * kWarps);
  }

  struct Cta {
    Grid* grid;
    int block_, thread_;
    int block() const { return block_; }
    int thread() const { return thread_; }
    char* shared() const { return grid->shared(block_); }
    void sync() const { grid->sync(grid->block_barriers_[size_t(block_)], kThreads, *this); }
    void sync_cluster() const {
      const int cluster = grid->tiling_.unit_ctas;
      grid->sync(grid->tile_barriers_[size_t(block_ / cluster)], kThreads * cluster, *this);
    }
    uint64_t load(const uint64_t* p) const {
      grid->sometimes_yield(*this);
      return *p;
    }
    void store(uint64_t* p, uint64_t x) const {
      *p = x;
      ++grid->progress_;
      grid->sometimes_yield(*this);
    }
    uint64_t load_near(const uint64_t* p) const {
      check(grid->owns(block_, p), "a load from outside the block's shared memory");
      return load(p);
    }
    void store_near(int peer, uint64_t* p, uint64_t x) const {
      check(grid->owns(block_, p), "an address outside the block's shared memory");
      const int64_t offset = reinterpret_cast<char*>(p) - shared();
      const int cluster = grid->tiling_.unit_ctas;
      store(reinterpret_cast<uint64_t*>(grid->shared(block_ / cluster * cluster + peer) + offset), x);
    }
    template <cuda::Fragment kind>
    void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) const {
      grid->mma<kind>(*this, d, a, b);
    }
    void waiting(uint32_t) const { grid->yield(*this); }
  };

  // False when the threads wait for each other for ever.
  bool run(const std::function<void(Cta&)>& kernel) {
    const size_t count = shared_.size() * kThreads;
    fibers_ = std::vector<Fiber>(count);
    for (size_t i = 0; i < count; ++i) {
      Fiber& f = fibers_[i];
      f.stack.reset(new char[kStack]);
      f.body = [this, i, &kernel] {
        Cta cta{this, int(i) / kThreads, int(i) % kThreads};
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
  struct Barrier {
    int arrived = 0;
    std::vector<Fiber*> waiting;
  };
  struct Warp {
    Barrier barrier;
    uint32_t a[32][4], b[32][2];
    float sum[32][4];
  };

  char* shared(int block) {
    char* p = shared_[size_t(block)].data();
    return p + (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16;
  }
  bool owns(int block, const uint64_t* p) {
    const int64_t offset = reinterpret_cast<const char*>(p) - shared(block);
    return offset >= 0 && offset + 8 <= tiling_.shared_bytes;
  }
  Fiber& fiber(const Cta& cta) { return fibers_[size_t(cta.block_) * kThreads + size_t(cta.thread_)]; }
  void yield(const Cta& cta) { swapcontext(&fiber(cta).context, &main_); }
  void sometimes_yield(const Cta& cta) {
    if (random_() % 8 == 0) yield(cta);
  }
  // last(): what the one that comes last does before the others go on.
  template <class Last>
  void sync(Barrier& barrier, int all, const Cta& cta, const Last& last) {
    if (++barrier.arrived < all) {
      fiber(cta).blocked = true;
      barrier.waiting.push_back(&fiber(cta));
      yield(cta);
      return;
    }
    last();
    for (Fiber* f : barrier.waiting) f->blocked = false;
    barrier = {};
    ++progress_;
  }
  void sync(Barrier& barrier, int all, const Cta& cta) {
    sync(barrier, all, cta, [] {});
  }

  // mma.m16n8k16 and mma.m16n8k8, by the manual's tables of which lane holds what.
  template <cuda::Fragment kind>
  void mma(const Cta& cta, float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    Warp& warp = warps_[size_t(cta.block_) * kWarps + size_t(cta.thread_ / 32)];
    const int lane = cta.thread_ % 32;
    std::copy_n(a, 4, warp.a[lane]);
    std::copy_n(b, 2, warp.b[lane]);
    sync(warp.barrier, 32, cta, [&warp] {
      constexpr bool half = kind != cuda::Fragment::Tf32;
      float A[16][16], B[16][8];
      const auto number = [](uint32_t word, int i) {
        if constexpr (kind == cuda::Fragment::Bf16) return widen(bf16{uint16_t(word >> (16 * i))});
        if constexpr (kind == cuda::Fragment::F16) return widen(f16{uint16_t(word >> (16 * i))});
        return float_of_bits(word & ~0x1fffu);  // the unit does not look at the last 13 bits
      };
      for (int l = 0; l < 32; ++l) {
        const int row = l / 4, in_group = l % 4;
        for (int e = 0; e < 4; ++e)
          for (int i = 0; i < (half ? 2 : 1); ++i)
            A[row + (e & 1 ? 8 : 0)][half ? in_group * 2 + i + (e & 2 ? 8 : 0) : in_group + (e & 2 ? 4 : 0)] = number(warp.a[l][e], i);
        for (int e = 0; e < 2; ++e)
          for (int i = 0; i < (half ? 2 : 1); ++i) B[half ? in_group * 2 + i + 8 * e : in_group + 4 * e][row] = number(warp.b[l][e], i);
      }
      for (int l = 0; l < 32; ++l)
        for (int e = 0; e < 4; ++e) {
          warp.sum[l][e] = 0;
          for (int k = 0; k < (half ? 16 : 8); ++k) warp.sum[l][e] += A[l / 4 + (e & 2 ? 8 : 0)][k] * B[k][l % 4 * 2 + (e & 1)];
        }
    });
    for (int e = 0; e < 4; ++e) d[e] += warp.sum[lane][e];
  }

  const Tiling tiling_;
  std::mt19937 random_;
  std::vector<std::vector<char>> shared_;
  std::vector<Barrier> block_barriers_, tile_barriers_;
  std::vector<Warp> warps_;
  std::vector<Fiber> fibers_;
  ucontext_t main_;
  uint64_t progress_ = 0;
};

// ---- problems

struct Case {
  int64_t T, B, H;
  bool ragged, reverse;
  Exchange exchange;
  int unit_ctas, row_tiles, rows_at_once, held;
};

// The workspace as the engine hands it to a kernel.
template <class Arithmetic, class S>
std::vector<uint64_t> workspace_of(const CellInfo& cell, const Problem& p, const Tiling& t, const void* const* weights, bool backward) {
  std::vector<uint64_t> workspace(size_t(t.workspace_bytes / 8 + 2), ~uint64_t(0));
  std::fill_n(workspace.begin(), t.packet_count, 0);
  for (int s = 0; s < cell.stages; ++s) {
    const cuda::Matrix matrix = cuda::matrix_of(cell, p, weights, backward, s);
    if (!matrix.weights) continue;
    for (int block = 0; block < t.unit_ctas; ++block)
      for (int i = 0; i < t.stage[s].items(); ++i)
        for (int w = 0; w < Arithmetic::shape.item_words; ++w)
          for (int thread = 0; thread < kThreads; ++thread) {
            const cuda::Word word = cuda::pack<Arithmetic, S>(t, s, matrix, block, i, w, thread);
            std::memcpy(cuda::packed_item<Arithmetic>(t, s, static_cast<void*>(workspace.data()), block, i) + w * kThreads + thread, &word,
                        sizeof word);
          }
  }
  return workspace;
}

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

template <class Cell, class S, class Arithmetic>
void test(const char* name, const cpu::Page& page, Storage storage, Products products, const Case& c, unsigned seed) {
  constexpr CellInfo cell = InfoOf<Cell>::value;
  const int64_t P = cell.projected() ? (c.H + 1) / 2 : c.H, room = cell.room() * c.H, X = cell.input_slots() * c.H;
  std::vector<int64_t> rows(size_t(c.T), c.B), offsets(size_t(c.T) + 1, 0);
  if (c.ragged)
    for (int64_t t = 0; t < c.T; ++t) rows[size_t(t)] = std::max<int64_t>(1, c.B - c.B * t / c.T);
  for (int64_t t = 0; t < c.T; ++t) offsets[size_t(t) + 1] = offsets[size_t(t)] + rows[size_t(t)];
  const int64_t N = offsets.back();
  const Problem p{0, storage, c.T, c.B, X, c.H, P, c.ragged ? rows.data() : nullptr, c.reverse, true, false, 1, products};
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
    std::snprintf(text, sizeof text, "%s: %s %s T %ld B %ld H %ld%s%s, %d x %d blocks%s, %d held", what, name,
                  storage == Storage::BF16         ? "bfloat16"
                  : storage == Storage::F16        ? "float16"
                  : products == Products::Exact    ? "float32"
                  : products == Products::Tf32     ? "tf32"
                                                   : "3xtf32",
                  long(c.T), long(c.B), long(c.H), c.ragged ? " ragged" : "", c.reverse ? " reverse" : "", t.unit_ctas, t.row_tiles,
                  t.exchange == Exchange::Near ? " near" : "", t.stage[0].held);
    return std::string(text);
  };
  const double tolerance = storage == Storage::BF16    ? 2e-2
                           : storage == Storage::F16   ? 3e-3
                           : products == Products::Tf32 ? 4e-3
                                                        : 2e-5;
  const bool matrix = cell.hidden_slots(0) > 0;
  {
    const Tiling t = tile(cell, p, false, matrix ? c.exchange : Exchange::None, c.unit_ctas, c.row_tiles, c.rows_at_once, c.held);
    if (!check(t.fits, "%s", where("does not fit", t).c_str())) return;
    for (int64_t n = 0; n < N; ++n) std::copy_n(x.begin() + n * X, X, ours.gates.begin() + n * room);
    const Forward f = forward_of(ours);
    std::vector<uint64_t> workspace = workspace_of<Arithmetic, S>(cell, p, t, f.weights, false);
    const cuda::PersistentForward r{f, t, offsets.data(), workspace.data()};
    Grid grid(t, seed);
    const bool ended = grid.run([&](Grid::Cta& cta) { cuda::persistent_forward<Cell, S, Arithmetic>(cta, r); });
    if (!check(ended, "%s", where("forward waits for ever", t).c_str())) return;
    double worst = distance(ours.output, theirs.output);
    for (int i = 0; i < cell.states; ++i) worst = std::fmax(worst, distance(ours.final[i], theirs.final[i]));
    check(worst <= tolerance, "%s differs by %g", where("forward", t).c_str(), worst);
  }
  {
    const Tiling t = tile(cell, p, true, matrix ? c.exchange : Exchange::None, c.unit_ctas, c.row_tiles, c.rows_at_once, c.held);
    if (!check(t.fits, "%s", where("does not fit", t).c_str())) return;
    const Backward g = backward_of(ours);
    std::vector<uint64_t> workspace = workspace_of<Arithmetic, S>(cell, p, t, g.weights, true);
    const cuda::PersistentBackward r{g, t, offsets.data(), workspace.data()};
    Grid grid(t, seed + 1);
    const bool ended = grid.run([&](Grid::Cta& cta) { cuda::persistent_backward<Cell, S, Arithmetic>(cta, r); });
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
  constexpr Exchange near = Exchange::Near, grid = Exchange::Grid;
  const Case cases[] = {
      {6, 1, 5, false, false, grid, 5, 1, 8, 99}, {7, 3, 7, true, false, grid, 3, 1, 2, 0},  {7, 3, 7, true, true, grid, 4, 2, 8, 99},
      {5, 17, 9, true, true, grid, 3, 2, 4, 1},   {4, 10, 33, false, true, grid, 5, 1, 8, 0}, {5, 2, 1, false, false, near, 1, 1, 1, 99},
      {1, 9, 16, false, false, near, 2, 2, 8, 99}, {6, 3, 33, true, false, near, 1, 3, 8, 99}, {4, 37, 12, true, true, near, 3, 1, 64, 99},
  };
  unsigned seed = 1;
  for (const Case& c : cases) {
    test<Cell, float, cuda::Exact>(name, page, Storage::F32, Products::Exact, c, ++seed);
    test<Cell, float, cuda::Tensor<cuda::Fragment::Tf32>>(name, page, Storage::F32, Products::ThreeTf32, c, ++seed);
    test<Cell, float, cuda::Tensor<cuda::Fragment::Tf32>>(name, page, Storage::F32, Products::Tf32, c, ++seed);
    test<Cell, bf16, cuda::Tensor<cuda::Fragment::Bf16>>(name, page, Storage::BF16, Products::Exact, c, ++seed);
    test<Cell, f16, cuda::Tensor<cuda::Fragment::F16>>(name, page, Storage::F16, Products::Exact, c, ++seed);
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
  static constexpr cpu::Page reset_before = cpu::make_page<ResetBefore, scalar::F32, scalar::F64>("reset_before");
  test_cell<ResetBefore>("reset_before", reset_before);
  static constexpr cpu::Page independent = cpu::make_page<Independent, scalar::F32, scalar::F64>("independent");
  test_cell<Independent>("independent", independent);
  return check_failures != 0;
}

// The persistent CUDA kernels on the host's grid, held against the CPU engine: every cell, storage type, way to multiply and way to
// exchange, sizes odd and even, ragged and reversed.
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cells/list.h"
#include "engines/cpu/engine.h"
#include "engines/cpu/kernels.h"
#include "test/check.h"
#include "test/grid.h"
#include "test/reset_before.h"

namespace rnnkernels {
namespace {

struct Case {
  int64_t T, B, H;
  bool ragged, reverse;
  Exchange exchange;
  int unit_ctas, row_tiles, rows_at_once, held;
  int sequences = 1;  // of one launch, the second in the other direction
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

// One sequence: what it is given, what the CPU engine makes of it, and room for what the kernels make of it.
template <class Cell, class S>
class Sequence {
 public:
  static constexpr CellInfo cell = InfoOf<Cell>::value;

  Sequence(const Problem& problem, int64_t tokens, unsigned seed) : p(problem), N(tokens), room(cell.room() * p.hidden), X(p.input) {
    std::mt19937 random(seed);
    const int64_t H = p.hidden, P = p.output;
    const float scale = 1 / std::sqrt(float(H));
    // With the unit matrix for W the input is the input gates.
    x = draw<S>(random, N * X, 1);
    unit.assign(size_t(X * X), narrow<S>(0.0f));
    for (int64_t i = 0; i < X; ++i) unit[size_t(i * X + i)] = narrow<S>(1.0f);
    for (int s = 0; s < cell.stages; ++s) {
      const Product product = forward_product(cell, p, s);
      weights[s] = draw<S>(random, product.units * product.columns * product.depth, scale);
    }
    for (int i = 0; i < cell.vectors; ++i) vectors[i] = draw<S>(random, H, 1);
    for (int i = 0; i < cell.states; ++i) {
      initial[i] = draw<S>(random, p.batch * (i ? H : P), 1);
      grad_final[i] = draw<S>(random, p.batch * (i ? H : P), 1);
    }
    grad_output = draw<S>(random, N * P, 1);
    grad_history = draw<S>(random, N * H, 1);
    const S nan = narrow<S>(NAN);
    for (Arrays<S>* a : {&ours, &theirs}) {
      a->gates.assign(size_t(N * room), nan);
      a->output.assign(size_t(N * P), nan);
      a->history.assign(size_t(N * H), nan);
      a->grad_gates.assign(size_t(N * room), nan);
      for (int i = 0; i < cell.states; ++i) {
        a->final[i].assign(size_t(p.batch * (i ? H : P)), nan);
        a->grad_initial[i].assign(size_t(p.batch * (i ? H : P)), nan);
      }
    }
    for (int64_t n = 0; n < N; ++n) std::copy_n(x.begin() + n * X, X, ours.gates.begin() + n * room);
  }

  Forward forward_of(Arrays<S>& a) const {
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
  }
  Backward backward_of(Arrays<S>& a) const {
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
    for (int i = 0; i < cell.states; ++i) g.grad_states[i] = i ? grad_history.data() : grad_output.data();
    return g;
  }

  void run_on_cpu(const cpu::Page& page) {
    Forward f = forward_of(theirs);
    std::vector<char> workspace(size_t(cpu::workspace_bytes(p, page, false)));
    f.workspace = workspace.data();
    cpu::forward(f, page);
    Backward g = backward_of(theirs);
    workspace.resize(size_t(cpu::workspace_bytes(p, page, true)));
    g.workspace = workspace.data();
    cpu::backward(g, page);
  }

  double forward_distance() const {
    double worst = distance(ours.output, theirs.output);
    for (int i = 0; i < cell.states; ++i) worst = std::fmax(worst, distance(ours.final[i], theirs.final[i]));
    return worst;
  }
  // Of a token's room only the gradients of slots over their stage's width mean something.
  double backward_distance() const {
    double worst = 0;
    for (int i = 0; i < cell.slots; ++i) {
      const int64_t width = width_of(p, cell.stage[cell.stage_of(i)].width);
      std::vector<S> a, b;
      for (int64_t n = 0; n < N; ++n)
        for (int64_t u = 0; u < width; ++u) {
          a.push_back(ours.grad_gates[size_t(n * room + i * p.hidden + u)]);
          b.push_back(theirs.grad_gates[size_t(n * room + i * p.hidden + u)]);
        }
      worst = std::fmax(worst, distance(a, b));
    }
    for (int i = 0; i < cell.states; ++i) worst = std::fmax(worst, distance(ours.grad_initial[i], theirs.grad_initial[i]));
    return worst;
  }

  const Problem p;
  Arrays<S> ours, theirs;

 private:
  const int64_t N, room, X;
  std::vector<S> x, unit, weights[kMaxStages], vectors[kMaxVectors], initial[2], grad_final[2], grad_output, grad_history;
};

template <class Cell, class S, class Arithmetic>
void test(const char* name, const cpu::Page& page, Storage storage, Products products, const Case& c, unsigned seed) {
  constexpr CellInfo cell = InfoOf<Cell>::value;
  const int64_t P = cell.projected() ? (c.H + 1) / 2 : c.H;
  std::vector<int64_t> rows(size_t(c.T), c.B), offsets(size_t(c.T) + 1, 0);
  if (c.ragged)
    for (int64_t t = 0; t < c.T; ++t) rows[size_t(t)] = std::max<int64_t>(1, c.B - c.B * t / c.T);
  for (int64_t t = 0; t < c.T; ++t) offsets[size_t(t) + 1] = offsets[size_t(t)] + rows[size_t(t)];
  const int64_t* const ragged = c.ragged ? rows.data() : nullptr;
  const Problem p{0, storage, c.T, c.B, cell.input_slots() * c.H, c.H, P, ragged, c.reverse, true, false, 1, products};
  std::vector<std::unique_ptr<Sequence<Cell, S>>> sequences;
  for (int i = 0; i < c.sequences; ++i) {
    Problem own = p;
    own.reverse = c.reverse != (i > 0);
    sequences.emplace_back(new Sequence<Cell, S>(own, offsets.back(), seed + 1000 * unsigned(i)));
    sequences.back()->run_on_cpu(page);
  }
  const auto where = [&](const char* what, const Tiling& t) {
    char text[200];
    std::snprintf(text, sizeof text, "%s: %s %s T %ld B %ld H %ld%s%s, %d x %d x %d blocks%s, %d held", what, name,
                  storage == Storage::BF16      ? "bfloat16"
                  : storage == Storage::F16     ? "float16"
                  : products == Products::Exact ? "float32"
                  : products == Products::Tf32  ? "tf32"
                                                : "3xtf32",
                  long(c.T), long(c.B), long(c.H), c.ragged ? " ragged" : "", c.reverse ? " reverse" : "", t.sequences, t.unit_ctas,
                  t.row_tiles, t.exchange == Exchange::Near ? " near" : "", t.stage[0].held);
    return std::string(text);
  };
  const double tolerance = storage == Storage::BF16 ? 2e-2 : storage == Storage::F16 ? 3e-3 : products == Products::Tf32 ? 4e-3 : 2e-5;
  const bool matrix = cell.hidden_slots(0) > 0;
  for (bool backward : {false, true}) {
    Tiling t = tile(cell, p, backward, matrix ? c.exchange : Exchange::None, c.unit_ctas, c.row_tiles, c.rows_at_once, c.held);
    t.sequences = c.sequences;
    const char* const pass = backward ? "backward" : "forward";
    if (!check(t.fits, "%s does not fit", where(pass, t).c_str())) return;
    Grid grid(t, seed + backward);
    cuda::PersistentForward f{{}, t, offsets.data(), {}};
    cuda::PersistentBackward g{{}, t, offsets.data(), {}};
    std::vector<uint64_t> workspaces[kSequences];
    for (int i = 0; i < c.sequences; ++i) {
      Sequence<Cell, S>& one = *sequences[size_t(i)];
      backward ? void(g.call[i] = one.backward_of(one.ours)) : void(f.call[i] = one.forward_of(one.ours));
      workspaces[i] = workspace_of<Arithmetic, S>(cell, p, t, backward ? g.call[i].weights : f.call[i].weights, backward);
      f.workspace[i] = g.workspace[i] = workspaces[i].data();
    }
    const bool ended = grid.run([&](Grid::Cta& cta) {
      if (backward)
        cuda::persistent_backward<Cell, S, Arithmetic>(cta, g);
      else
        cuda::persistent_forward<Cell, S, Arithmetic>(cta, f);
    });
    if (!check(ended, "%s waits for ever", where(pass, t).c_str())) return;
    for (const auto& one : sequences) {
      const double worst = backward ? one->backward_distance() : one->forward_distance();
      check(worst <= (backward ? 4 : 1) * tolerance, "%s differs by %g", where(pass, t).c_str(), worst);
    }
  }
}

template <class Cell>
void test_cell(const char* name, const cpu::Page& page) {
  constexpr Exchange near = Exchange::Near, grid = Exchange::Grid;
  const Case cases[] = {
      {6, 1, 5, false, false, grid, 5, 1, 8, 99},   {7, 3, 7, true, false, grid, 3, 1, 2, 0},
      {7, 3, 7, true, true, grid, 4, 2, 8, 99},     {5, 17, 9, true, true, grid, 3, 2, 4, 1},
      {4, 10, 33, false, true, grid, 5, 1, 8, 0},   {5, 2, 1, false, false, near, 1, 1, 1, 99},
      {1, 9, 16, false, false, near, 2, 2, 8, 99},  {6, 3, 33, true, false, near, 1, 3, 8, 99},
      {4, 37, 12, true, true, near, 3, 1, 64, 99},  {5, 3, 7, true, false, grid, 2, 2, 8, 1, 2},
      {4, 5, 9, false, true, near, 2, 2, 2, 99, 2},
  };
  unsigned seed = 1;
  for (const Case& c : cases) {
    test<Cell, float, cuda::Exact>(name, page, Storage::F32, Products::Exact, c, ++seed);
    test<Cell, float, cuda::Tensor<cuda::Fragment::Tf32>>(name, page, Storage::F32, Products::ThreeTf32, c, ++seed);
    test<Cell, float, cuda::Tensor<cuda::Fragment::Tf32>>(name, page, Storage::F32, Products::Tf32, c, ++seed);
    test<Cell, bf16, cuda::Tensor<cuda::Fragment::Bf16>>(name, page, Storage::BF16, Products::Exact, c, ++seed);
    // What differs from bfloat16 is no cell's own.
    if constexpr (std::is_same_v<Cell, Lstm> || std::is_same_v<Cell, ResetBefore>)
      test<Cell, f16, cuda::Tensor<cuda::Fragment::F16>>(name, page, Storage::F16, Products::Exact, c, ++seed);
  }
}

enum Heat { COLD, WARM, HOT };

// Pages that differ in an activation alone, which pages_test holds to its derivative: one of each is enough here, where they compile for
// long.
template <class Cell>
constexpr bool another = false;
template <class F>
constexpr bool another<Srn<F>> = !std::is_same_v<F, Tanh>;
template <class F, unsigned feeds>
constexpr bool another<Residual<F, feeds>> = !std::is_same_v<F, Tanh>;
template <class F>
constexpr bool another<Independent<F>> = !std::is_same_v<F, Relu>;

template <Heat heat, class Cell>
void test_if_hot(const char* name) {
  if constexpr (heat != COLD && !another<Cell>) {
    static constexpr cpu::Page page = cpu::make_page<Cell, scalar::F32, scalar::F64>("page");
    test_cell<Cell>(name, page);
  }
}

}  // namespace
}  // namespace rnnkernels

int main() {
  using namespace rnnkernels;
  cpu::set_isa("scalar");
#define RNN_CELL(cell, heat, ...) test_if_hot<heat, __VA_ARGS__>(#cell);
#include "cells/cells.def"
#undef RNN_CELL
  static constexpr cpu::Page reset_before = cpu::make_page<ResetBefore, scalar::F32, scalar::F64>("reset_before");
  test_cell<ResetBefore>("reset_before", reset_before);
  return check_failures != 0;
}

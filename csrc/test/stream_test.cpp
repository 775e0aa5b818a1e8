// A stream of two layers gives, step by step, the bits of the engine's walks over the whole sequence: every cell, alone and in teams, from
// memory that holds NaN and ends where the contract says.
#include "engines/cpu/stream.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "engines/cpu/engine.h"
#include "test/check.h"

namespace rnnkernels {
namespace {

constexpr int64_t T = 5, L = 2;
using Floats = std::vector<float>;

struct Weights {
  Floats ih, bias_ih, bias_hh, matrix[kMaxStages], vector[kMaxVectors];
};

void test(int index, int64_t batch, int64_t input, int64_t hidden, int threads) {
  const CellInfo& cell = kCells[index];
  const int64_t output = cell.projected() ? (hidden + 1) / 2 : hidden;
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0, 0.3f);
  auto numbers = [&](int64_t n) {
    Floats v(static_cast<size_t>(n));
    for (float& x : v) x = normal(random);
    return v;
  };

  std::vector<Problem> problems;
  Weights weights[L];
  Forward given[L] = {};
  for (int64_t l = 0; l < L; ++l) {
    Weights& w = weights[l];
    Forward& f = given[l];
    f.problem = {index, Storage::F32, T, batch, l ? output : input, hidden, output, nullptr, false, false, false, threads};
    int64_t biased = 0;
    for (int i = 0; i < cell.slots; ++i) biased += cell.biased(i);
    w.ih = numbers(cell.input_slots() * hidden * f.problem.input);
    w.bias_ih = numbers(cell.input_slots() * hidden);
    w.bias_hh = numbers(biased * hidden);
    f.weight_ih = w.ih.data();
    f.bias_ih = w.bias_ih.data();
    f.bias_hh = w.bias_hh.data();
    for (int s = 0; s < cell.stages; ++s) {
      const Product p = forward_product(cell, f.problem, s);
      w.matrix[s] = numbers(p.units * p.columns * p.depth);
      f.weights[s] = w.matrix[s].data();
    }
    for (int i = 0; i < cell.vectors; ++i) f.vectors[i] = (w.vector[i] = numbers(hidden)).data();
    problems.push_back(f.problem);
    problems.back().steps = 1;
  }

  const Floats x = numbers(T * batch * input);
  Floats initial[kMaxStates], last[kMaxStates], expected_last[kMaxStates], expected(size_t(T * batch * output), NAN), y = expected;
  for (int i = 0; i < cell.states; ++i) {
    initial[i] = numbers(L * batch * width_of(given[0].problem, cell.state_width(i)));
    last[i] = expected_last[i] = Floats(initial[i].size(), NAN);
  }
  Floats between(size_t(T * batch * output), NAN);
  for (int64_t l = 0; l < L; ++l) {
    Forward f = given[l];
    for (int i = 0; i < cell.states; ++i) {
      const int64_t at = l * batch * width_of(f.problem, cell.state_width(i));
      f.initial[i] = initial[i].data() + at;
      f.final[i] = expected_last[i].data() + at;
    }
    std::vector<char> workspace(size_t(cpu::workspace_bytes(f.problem, cpu::page_of(f.problem), false)), char(0xff));
    f.input = l ? between.data() : x.data();
    f.output = l ? expected.data() : between.data();
    f.workspace = workspace.data();
    cpu::forward(f, cpu::page_of(f.problem));
  }

  cpu::Stream stream(problems);
  std::vector<char> workspace(size_t(stream.bytes()), char(0xff));
  stream.place(workspace.data());
  for (int64_t l = 0; l < L; ++l) {
    stream.pack(size_t(l), given[l]);
    weights[l] = Weights();  // none of it is read again
  }
  std::vector<int64_t> rows;
  for (int64_t b = 0; b < batch; ++b) rows.push_back(b);
  const void* from[kMaxStates] = {};
  void* to[kMaxStates] = {};
  for (int i = 0; i < cell.states; ++i) from[i] = initial[i].data(), to[i] = last[i].data();
  stream.load(from, rows);
  for (int64_t t = 0; t < T; ++t) {
    const Floats step(x.begin() + t * batch * input, x.begin() + (t + 1) * batch * input);
    stream.step(step.data(), y.data() + t * batch * output);
  }
  stream.store(to);

  bool same = std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)) == 0;
  for (int i = 0; i < cell.states; ++i)
    same = same && std::memcmp(last[i].data(), expected_last[i].data(), last[i].size() * sizeof(float)) == 0;
  check(same && !std::isnan(y.back()), "%s, B %ld, H %ld, %d threads: steps differ from the sequence", cell.name, long(batch), long(hidden),
        threads);
}

}  // namespace
}  // namespace rnnkernels

int main() {
  using namespace rnnkernels;
  for (const std::string& isa : cpu::supported_isas()) {
    cpu::set_isa(isa);
    for (int cell = 0; cell < kCellCount; ++cell)
      for (int threads : {1, 2, 3}) {
        test(cell, 3, 7, 13, threads);
        test(cell, 2, 90, 201, threads);
        test(cell, 40, 30, 65, threads);
      }
    std::printf("%s: %d cells\n", isa.c_str(), kCellCount);
  }
  return check_failures != 0;
}

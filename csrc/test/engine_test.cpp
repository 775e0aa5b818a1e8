// The engine runs a page that no list knows: the throw-away cell of two stages and a vector, forward against a plain loop over its
// equations, backward against central differences, on every schedule that the thread counts bring, ragged, with rows that end early and
// start anew, and reversed.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "num/scalar.h"
//
#include "engines/cpu/engine.h"
#include "engines/cpu/kernels.h"
#include "engines/cpu/walk.h"
#include "test/check.h"
#include "test/reset_before.h"

namespace rnnkernels {
namespace {

constexpr int64_t T = 4, B = 3, H = 5;
const int64_t kRagged[] = {3, 3, 2, 1}, kLengths[] = {3, 0, 4};
const uint8_t kResets[] = {0, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1};  // the marks of token 2 and 4 and of that past row 0's end have no effect
constexpr int64_t kMarks = 5;

struct Numbers {
  std::vector<double> x, u0, u1, p, h0, r;  // r: what replaces the rows' states
};

struct Case {
  bool ragged, cut, reverse;
  int threads;
  int64_t rows(int64_t t) const { return ragged ? kRagged[t] : B; }
  int64_t offset(int64_t t) const {
    int64_t n = 0;
    for (int64_t i = 0; i < t; ++i) n += rows(i);
    return n;
  }
  int64_t tokens() const { return offset(T); }
  Problem problem() const {
    Problem p{0, Storage::F64, T, B, 4 * H, H, H, ragged ? kRagged : nullptr, reverse, true, false, threads};
    if (cut) p.lengths = kLengths, p.resets = kResets;
    return p;
  }
  bool has(int64_t t, int64_t b) const { return !cut || t < kLengths[b]; }
  bool resets(int64_t t, int64_t b) const {
    const int64_t mark = reverse ? t + 1 : t;
    return cut && mark > 0 && mark < kLengths[b] && kResets[mark * B + b];
  }
};

struct Result {
  std::vector<double> y, last, kept;
};

constexpr cpu::Page page = cpu::make_page<ResetBefore, scalar::F32, scalar::F64>("reset_before");

Result run(const Case& c, const Numbers& in) {
  Result r{std::vector<double>(size_t(c.tokens() * H), NAN), std::vector<double>(size_t(B * H), NAN),
           std::vector<double>(size_t(c.tokens() * page.cell.room() * H), NAN)};
  Forward f{};
  f.problem = c.problem();
  std::vector<char> workspace(size_t(cpu::workspace_bytes(f.problem, page, false)), char(0xff));
  // With the unit matrix for W the input is the input gates.
  std::vector<double> unit(size_t(16 * H * H), 0.0);
  for (int64_t i = 0; i < 4 * H; ++i) unit[size_t(i * 4 * H + i)] = 1;
  f.input = in.x.data();
  f.weight_ih = unit.data();
  f.gates = r.kept.data();
  f.gates_row = page.cell.room() * H;
  f.weights[0] = in.u0.data();
  f.weights[1] = in.u1.data();
  f.vectors[0] = in.p.data();
  f.initial[0] = in.h0.data();
  f.reset[0] = {in.r.data(), 0, H};
  f.final[0] = r.last.data();
  f.output = r.y.data();
  f.workspace = workspace.data();
  cpu::forward(f, page);
  return r;
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

Result plain(const Case& c, const Numbers& in) {
  Result r{std::vector<double>(size_t(c.tokens() * H)), in.h0, {}};
  for (int64_t n = 0; n < T; ++n) {
    const int64_t t = c.reverse ? T - 1 - n : n;
    for (int64_t b = 0; b < c.rows(t); ++b) {
      if (!c.has(t, b)) continue;
      double* h = &r.last[size_t(b * H)];
      if (c.resets(t, b)) std::copy_n(&in.r[size_t(b * H)], H, h);
      const double* x = &in.x[size_t((c.offset(t) + b) * 4 * H)];
      auto product = [&](const std::vector<double>& u, int64_t row, const double* v) {
        double sum = 0;
        for (int64_t k = 0; k < H; ++k) sum += u[size_t(row * H + k)] * v[k];
        return sum;
      };
      double gate[2][H], v[H], next[H];
      for (int64_t i = 0; i < H; ++i) {
        gate[0][i] = sigmoid(x[i] + product(in.u0, i, h) + in.p[size_t(i)] * h[i]);
        gate[1][i] = sigmoid(x[H + i] + product(in.u0, H + i, h));
      }
      for (int64_t i = 0; i < H; ++i) v[i] = gate[0][i] * h[i];
      for (int64_t i = 0; i < H; ++i) {
        const double candidate = std::tanh(x[2 * H + i] + product(in.u1, i, v));
        next[i] = (candidate + gate[1][i] * (h[i] - candidate)) * std::tanh(x[3 * H + i]);
      }
      std::memcpy(h, next, sizeof next);
      std::memcpy(&r.y[size_t((c.offset(t) + b) * H)], next, sizeof next);
    }
  }
  return r;
}

double distance(const std::vector<double>& a, const std::vector<double>& b) {
  double worst = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) worst = std::isnan(a[i]) ? INFINITY : std::fmax(worst, std::fabs(a[i] - b[i]));
  return worst;
}

void test(const Case& c) {
  std::mt19937_64 random(3);
  std::normal_distribution<double> normal;
  auto fill = [&](std::vector<double>& v, int64_t n) {
    v.resize(size_t(n));
    for (double& x : v) x = normal(random);
  };
  Numbers in;
  fill(in.x, c.tokens() * 4 * H);
  fill(in.u0, 2 * H * H);
  fill(in.u1, H * H);
  fill(in.p, H);
  fill(in.h0, B * H);
  fill(in.r, B * H);
  std::vector<double> dy, dlast;
  fill(dy, c.tokens() * H);
  fill(dlast, B * H);

  const Result r = run(c, in), expected = plain(c, in);
  const double outputs = std::fmax(distance(r.y, expected.y), distance(r.last, expected.last));

  const int64_t N = c.tokens(), G = 4 * H;
  auto unknown = [](int64_t n) { return std::vector<double>(size_t(n), NAN); };
  std::vector<double> gates(r.kept.size(), NAN), dh0 = unknown(B * H), dx = unknown(N * G), dw = unknown(G * G), du0 = unknown(2 * H * H),
                                                 du1 = unknown(H * H), db = unknown(G), db_hh = unknown(3 * H), dp = unknown(H),
                                                 dmarks(size_t(kMarks * H), 0.0), dr(size_t(B * H), 0.0);
  std::vector<double> unit(size_t(G * G), 0.0);
  for (int64_t i = 0; i < G; ++i) unit[size_t(i * G + i)] = 1;
  Backward g{};
  g.problem = c.problem();
  std::vector<char> workspace(size_t(cpu::workspace_bytes(g.problem, page, true)), char(0xff));
  g.kept = r.kept.data();
  g.grad_gates = gates.data();
  g.weights[0] = in.u0.data();
  g.weights[1] = in.u1.data();
  g.vectors[0] = in.p.data();
  g.initial[0] = in.h0.data();
  g.reset[0] = {in.r.data(), 0, H};
  g.grad_reset[0] = dmarks.data();
  g.output = r.y.data();
  g.grad_states[0] = dy.data();
  g.grad_final[0] = dlast.data();
  g.grad_initial[0] = dh0.data();
  g.input = in.x.data();
  g.weight_ih = unit.data();
  g.grad_input = dx.data();
  g.grad_weight_ih = dw.data();
  g.grad_weights[0] = du0.data();
  g.grad_weights[1] = du1.data();
  g.grad_bias_ih = db.data();
  g.grad_bias_hh = db_hh.data();
  g.grad_vectors[0] = dp.data();
  g.workspace = workspace.data();
  cpu::backward(g, page);

  auto loss = [&] {
    const Result q = plain(c, in);
    double sum = 0;
    for (size_t i = 0; i < q.y.size(); ++i) sum += q.y[i] * dy[i];
    for (size_t i = 0; i < q.last.size(); ++i) sum += q.last[i] * dlast[i];
    return sum;
  };
  auto slope = [&](double& at) {
    const double x = at, step = 1e-5;
    at = x + step;
    const double above = loss();
    at = x - step;
    const double below = loss();
    at = x;
    return (above - below) / (2 * step);
  };
  double gradients = 0;
  auto compare = [&](std::vector<double>& of, const std::vector<double>& found) {
    for (size_t i = 0; i < of.size(); ++i) {
      const double error = std::fabs(slope(of[i]) - found[i]);
      gradients = std::isnan(error) ? INFINITY : std::fmax(gradients, error);
    }
  };
  compare(in.x, dx);
  compare(in.u0, du0);
  compare(in.u1, du1);
  compare(in.p, dp);
  compare(in.h0, dh0);
  for (int64_t i = 0, mark = 0; i < T * B; ++i)
    if (kResets[i]) {
      for (int64_t u = 0; u < H; ++u) dr[size_t(i % B * H + u)] += dmarks[size_t(mark * H + u)];
      ++mark;
    }
  compare(in.r, dr);
  // With the unit matrix for W the input's gradient is that of the gates, and W's and the biases' are plain sums of it.
  std::vector<double> sum_w(size_t(G * G), 0.0), sum_b(size_t(G), 0.0);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t i = 0; i < G; ++i) {
      sum_b[size_t(i)] += dx[size_t(n * G + i)];
      for (int64_t j = 0; j < G; ++j) sum_w[size_t(i * G + j)] += dx[size_t(n * G + i)] * in.x[size_t(n * G + j)];
    }
  const double sums =
      std::fmax(std::fmax(distance(dw, sum_w), distance(db, sum_b)), distance(db_hh, {sum_b.begin(), sum_b.begin() + 3 * H}));

  std::printf("two stages, %s, %s, %d threads: outputs %.1e, gradients %.1e, sums %.1e\n",
              c.ragged ? "ragged"
              : c.cut  ? "cut"
                       : "padded",
              c.reverse ? "reverse" : "forward", c.threads, outputs, gradients, sums);
  check(outputs < 1e-13, "outputs differ from the plain loop by %g", outputs);
  check(sums < 1e-12, "gradients of W and the biases differ from plain sums by %g", sums);
  check(gradients < 1e-8, "gradients differ from central differences by %g", gradients);
}

constexpr int64_t kWords = 300;

// Weights changed in one place, in two that could make up for each other, or moved.
void test_fingerprints(const cpu::Isa& isa) {
  std::vector<uint32_t> words(3 * kWords);
  std::mt19937 random(7);
  for (uint32_t& word : words) word = uint32_t(random());
  std::vector<Fingerprint> seen;
  const auto look = [&](int64_t bytes = kWords* 4, int count = 3) {
    const void* const stretches[] = {words.data(), words.data() + kWords, words.data() + 2 * kWords};
    seen.push_back(isa.fingerprint(stretches, count, bytes));
  };
  for (int64_t bytes = 0; bytes <= kWords * 4; ++bytes) look(bytes, 1);
  for (int count : {2, 3}) look(kWords * 4, count);
  const Fingerprint whole = seen.back();
  constexpr uint32_t kSign = uint32_t(1) << 31;
  for (size_t i = 0; i < words.size(); ++i) {
    for (uint32_t change : {uint32_t(1), kSign}) {
      words[i] ^= change;
      look();
      for (size_t other : {i + 1, i + 16, i + 32, i + 64}) {
        if (other >= words.size()) continue;
        words[other] ^= change;
        look();
        words[other] ^= change;
        if (change == 1 || words[i] == words[other]) continue;
        std::swap(words[i], words[other]);
        look();
        std::swap(words[i], words[other]);
      }
      words[i] ^= change;
    }
    // A change that a chain turns into one of the sign, and the sign itself a stripe later.
    for (int bit : {16, 18})
      for (size_t stripe : {16, 32, 64}) {
        if (i + stripe >= words.size()) continue;
        words[i] ^= uint32_t(1) << bit, words[i + stripe] ^= kSign;
        look();
        words[i] ^= uint32_t(1) << bit, words[i + stripe] ^= kSign;
      }
  }
  for (uint32_t& word : words) word ^= kSign;
  look();
  for (uint32_t& word : words) word ^= kSign;
  const size_t count = seen.size();
  std::sort(seen.begin(), seen.end(),
            [](const Fingerprint& a, const Fingerprint& b) { return std::pair(a.bits[0], a.bits[1]) < std::pair(b.bits[0], b.bits[1]); });
  const size_t distinct = size_t(std::unique(seen.begin(), seen.end()) - seen.begin());
  check(distinct == count, "%s: %zu fingerprints of %zu weights", isa.name, distinct, count);
  look();
  check(seen.back() == whole, "%s: the same weights have another fingerprint", isa.name);
  std::printf("%s: %zu fingerprints\n", isa.name, count);
}

}  // namespace
}  // namespace rnnkernels

int main() {
  using namespace rnnkernels;
  for (const std::string& name : cpu::supported_isas()) {
    cpu::set_isa(name);
    test_fingerprints(cpu::current());
  }
  cpu::set_isa("scalar");
  for (int kind : {0, 1, 2})
    for (bool reverse : {false, true})
      for (int threads : {1, 2, 3}) test({kind == 1, kind == 2, reverse, threads});
  return check_failures != 0;
}

// The persistent kernels: a whole sequence in one launch, for any page. What runs here is one thread of one block; Cta is what it knows of
// the machine (its place, the block's barrier and memory, loads and stores that other blocks see), so that the same code runs on a GPU and,
// thread by thread in any order, on a host.
//
// State travels between blocks as packets: a number and the epoch that it belongs to in one 8-byte word, so that whoever sees the epoch has
// the number, and no barrier or fence is needed. The visit of the walk numbered n, from 0, writes epoch n + 1 to the side (n & 1) of its
// buffer. Two sides suffice: a block writes visit n + 1 only after it has read visit n from every block of its tile, and each of those had
// read visit n - 1 before it wrote visit n.
#pragma once

#include "core/step.h"
#include "core/tiling.h"
#include "num/scalar.h"

namespace rnnkernels::cuda {

using Number = scalar::F32;

// Problem::rows is a host pointer; blocks read where each step's tokens start.
struct PersistentForward {
  Forward f;
  Tiling tiling;
  const int64_t* offsets;  // [T + 1]
  uint64_t* packets;       // zeros
};

struct PersistentBackward {
  Backward g;  // for a cell of several stages kept and grad_gates are the same memory, which the stages hand on to each other
  Tiling tiling;
  const int64_t* offsets;
  uint64_t* packets;
};

RNN_FN uint64_t packet(float number, uint32_t epoch) { return uint64_t(epoch) << 32 | float_bits(number); }
RNN_FN float number_of(uint64_t packet) { return float_of_bits(uint32_t(packet)); }
RNN_FN uint32_t epoch_of(uint64_t packet) { return uint32_t(packet >> 32); }

template <class Cell, class S, class Cta>
class Block {
 public:
  using Info = InfoOf<Cell>;

  RNN_FN Block(Cta& cta, const Problem& p, const Tiling& tiling, const int64_t* offsets, uint64_t* packets)
      : cta(cta), p(p), t(tiling), offsets(offsets), packets(packets) {
    const int64_t place = cta.block() % t.unit_ctas, row_tile = cta.block() / t.unit_ctas;
    first_row = row_tile * t.tile_rows(p.batch);
    rows = p.batch - first_row < t.tile_rows(p.batch) ? p.batch - first_row : t.tile_rows(p.batch);
    RNN_UNROLL
    for (int s = 0; s < Info::value.stages; ++s) {
      const int64_t begin = place * t.stage[s].block_units, end = begin + t.stage[s].block_units;
      unit0[s] = begin < t.stage[s].units ? begin : t.stage[s].units;
      unit1[s] = end < t.stage[s].units ? end : t.stage[s].units;
    }
  }

  RNN_FN float* numbers(int64_t offset) const { return reinterpret_cast<float*>(cta.shared() + offset); }
  RNN_FN int64_t step(int64_t n, bool from_start) const { return p.reverse != from_start ? n : p.steps - 1 - n; }
  // How many of the tile's rows take part in a step.
  RNN_FN int64_t active(int64_t step) const {
    const int64_t n = offsets[step + 1] - offsets[step] - first_row;
    return n < 0 ? 0 : n < rows ? n : rows;
  }

  // In how many steps a row of the tile takes part.
  RNN_FN int64_t steps_of(int64_t row) const {
    int64_t low = 0, high = p.steps;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (active(middle) > row)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  // The block's rows of a matrix: row c · block_units + u, depth k. weight(c, unit, k) reads it.
  template <class Weight>
  RNN_FN void load_weights(int s, const Weight& weight) const {
    const StageTiling& g = t.stage[s];
    S* to = reinterpret_cast<S*>(cta.shared() + g.weights);
    for (int64_t i = cta.thread(); i < g.quads * g.rows * 4; i += t.threads) {
      const int64_t k = i / (4 * g.rows) * 4 + i % 4, row = i / 4 % g.rows;
      const int64_t c = row / g.block_units, unit = unit0[s] + row % g.block_units;
      to[i] = k < g.depth && c < g.columns && unit < unit1[s] ? weight(c, unit, k) : narrow<S>(0.0f);
    }
  }

  // Where a number of an operand comes from: a packet of another block, or a value known here.
  struct Source {
    const uint64_t* packet;  // null: the value
    uint32_t epoch;
    float value;
  };
  RNN_FN Source received(int s, int64_t visit, int64_t row, int64_t k) const {
    return {packets + t.packets[s] + ((visit & 1) * p.batch + row) * t.packet_width[s] + k, uint32_t(visit + 1), 0};
  }
  RNN_FN static Source known(float value) { return {nullptr, 0, value}; }
  RNN_FN void send(int s, int64_t visit, int64_t row, int64_t k, float number) const {
    cta.store(packets + t.packets[s] + ((visit & 1) * p.batch + row) * t.packet_width[s] + k, packet(number, uint32_t(visit + 1)));
  }

  // The operand of `count` rows into shared memory, then each thread's share of the product; source(row of these, k) says where it is.
  template <class From>
  RNN_FN void multiply(int s, int64_t count, const From& source) const {
    const StageTiling& g = t.stage[s];
    float* const a = numbers(t.operand);
    const int64_t width = g.quads * 4;
    for (int64_t begin = cta.thread(); begin < count * width; begin += kPacketsAtOnce * t.threads) {
      Source from[kPacketsAtOnce];
      uint64_t word[kPacketsAtOnce];
      RNN_UNROLL
      for (int j = 0; j < kPacketsAtOnce; ++j) {
        const int64_t i = begin + j * t.threads;
        from[j] = i < count * width && i % width < g.depth ? source(i / width, i % width) : known(0);
        if (from[j].packet) word[j] = cta.load(from[j].packet);
      }
      RNN_UNROLL
      for (int j = 0; j < kPacketsAtOnce; ++j) {
        const int64_t i = begin + j * t.threads;
        if (i >= count * width) continue;
        if (from[j].packet) {
          for (uint32_t tries = 0; epoch_of(word[j]) != from[j].epoch; word[j] = cta.load(from[j].packet)) cta.waiting(++tries);
          from[j].value = number_of(word[j]);
        }
        a[i / width * t.operand_row + i % width] = from[j].value;
      }
    }
    cta.sync();
    const int row = cta.thread() % g.rows, slice = cta.thread() / g.rows;
    const S* w = reinterpret_cast<const S*>(cta.shared() + g.weights) + row * 4;
    float sum[kRowsAtOnce];
    RNN_UNROLL
    for (int n = 0; n < kRowsAtOnce; ++n) sum[n] = 0;
    for (int64_t q = slice; q < g.quads; q += g.slices) {
      float x[4];
      RNN_UNROLL
      for (int j = 0; j < 4; ++j) x[j] = widen(w[q * g.rows * 4 + j]);
      RNN_UNROLL
      for (int n = 0; n < kRowsAtOnce; ++n) {
        if (n >= count) continue;
        RNN_UNROLL
        for (int j = 0; j < 4; ++j) sum[n] = multiply_add(x[j], a[n * t.operand_row + q * 4 + j], sum[n]);
      }
    }
    float* const partial = numbers(t.partial);
    RNN_UNROLL
    for (int n = 0; n < kRowsAtOnce; ++n)
      if (n < count) partial[(slice * kRowsAtOnce + n) * g.rows + row] = sum[n];
    cta.sync();
  }
  RNN_FN float total(int s, int64_t n, int64_t c, int64_t u) const {
    const StageTiling& g = t.stage[s];
    const float* from = numbers(t.partial) + n * g.rows + c * g.block_units + u;
    float sum = 0;
    for (int slice = 0; slice < g.slices; ++slice) sum += from[slice * kRowsAtOnce * g.rows];
    return sum;
  }

  // This thread's share of `count` rows × the block's units of stage s.
  template <class Each>
  RNN_FN void each_unit(int s, int64_t count, const Each& each) const {
    const int64_t units = t.stage[s].block_units;
    for (int64_t i = cta.thread(); i < count * units; i += t.threads)
      if (unit0[s] + i % units < unit1[s]) each(i / units, i % units);
  }

  RNN_FN static float multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    return __fmaf_rn(a, b, c);
#else
    return a * b + c;
#endif
  }

  Cta& cta;
  const Problem& p;
  const Tiling& t;
  const int64_t* const offsets;
  uint64_t* const packets;
  int64_t first_row, rows;
  int64_t unit0[kMaxStages], unit1[kMaxStages];
};

template <class T>
RNN_FN T* plus(T* base, int64_t elements) {
  return base ? base + elements : nullptr;
}

// Stage s of the forward walk's visit n, and the stages after it.
template <int s, class Cell, class S, class Cta>
RNN_FN void forward_stages(const Block<Cell, S, Cta>& b, const PersistentForward& r, int64_t n, int64_t step, int64_t count) {
  using Info = InfoOf<Cell>;
  constexpr int stages = Info::value.stages, states = Info::value.states, vectors = Info::value.vectors, kept = Info::value.kept;
  if constexpr (s < stages) {
    const Forward& f = r.f;
    const Problem& p = f.problem;
    const Tiling& t = r.tiling;
    const StageTiling& g = t.stage[s];
    const int64_t before = p.reverse ? step + 1 : step - 1;
    const int64_t known = n == 0 ? 0 : b.active(before) < count ? b.active(before) : count;  // rows that had a visit before
    const int64_t token = b.offsets[step] + b.first_row, u0 = b.unit0[s];
    constexpr int columns = Info::value.hidden_slots(s), operand = Info::value.stage[s].operand;
    constexpr bool last = s == stages - 1;
    constexpr int reader = last ? 0 : s + 1, read = Info::value.stage[reader].operand;  // who reads what this stage gives
    constexpr int places = vectors ? vectors : 1, sums = columns ? columns : 1;
    constexpr bool sends = last || Info::value.hidden_slots(reader) > 0;

    ForwardStep x{};
    x.hidden = p.hidden;
    x.output = p.output;
    x.gates_row = f.gates_row;
    x.gates_slot = p.hidden;
    x.gates = static_cast<const S*>(f.gates) + token * f.gates_row;
    x.kept = p.training ? static_cast<S*>(f.gates) + token * f.gates_row : nullptr;
    if (stages > 1) {
      x.between = b.numbers(t.between) - u0;
      x.between_slot = g.block_units;
      x.between_row = kept * g.block_units;
    }
    each<states>([&](auto index) {
      constexpr int i = decltype(index)::value;
      if constexpr (Info::value.sees(s, i)) {
        x.previous[i] = x.next[i] = b.numbers(t.state[i]) - u0;
        x.state_row[i] = g.block_units;
        x.history[i] = plus(static_cast<S*>(i == 0 ? f.output : f.history[i]), token * g.units);
      }
    });
    for (int64_t first = 0; first < count; first += t.rows_at_once) {
      const int64_t some = count - first < t.rows_at_once ? count - first : t.rows_at_once;
      if (columns)
        b.multiply(s, some, [&](int64_t row, int64_t k) {
          const int64_t at = b.first_row + first + row;
          if (operand != kPreviousState) return b.received(s - 1, n, at, k);
          if (first + row < known) return b.received(stages - 1, n - 1, at, k);
          return b.known(f.initial[0] ? widen(static_cast<const S*>(f.initial[0])[at * g.depth + k]) : 0.0f);
        });
      b.each_unit(s, some, [&](int64_t row, int64_t u) {
        const int64_t unit = u0 + u;
        Number w[places];
        load_vectors<Cell, Number, S>(f.vectors, unit, 1, w);
        float sum[sums];
        RNN_UNROLL
        for (int c = 0; c < columns; ++c) sum[c] = b.total(s, row, c, u);
        forward_units<Cell, s, Number, S>(x, w, first + row, unit, 1, columns ? sum : nullptr, 1);
        if (sends) {
          const float* from = last ? b.numbers(t.state[0]) + (first + row) * g.block_units
                                   : b.numbers(t.between) + ((first + row) * kept + read) * g.block_units;
          b.send(s, n, b.first_row + first + row, unit, from[u]);
        }
      });
    }
    forward_stages<s + 1, Cell, S>(b, r, n, step, count);
  }
}

template <class Cell, class S, class Cta>
RNN_FN void persistent_forward(Cta& cta, const PersistentForward& r) {
  constexpr int stages = InfoOf<Cell>::value.stages, states = InfoOf<Cell>::value.states;
  const Forward& f = r.f;
  const Block<Cell, S, Cta> b(cta, f.problem, r.tiling, r.offsets, r.packets);
  RNN_UNROLL
  for (int s = 0; s < stages; ++s)
    if (b.t.stage[s].depth)
      b.load_weights(s, [&](int64_t c, int64_t unit, int64_t k) {
        return static_cast<const S*>(f.weights[s])[(c * b.t.stage[s].units + unit) * b.t.stage[s].depth + k];
      });
  const auto each_state = [&](const auto& each) {
    RNN_UNROLL
    for (int i = 0; i < states; ++i) {
      const int s = i == 0 ? stages - 1 : 0;
      float* const state = b.numbers(b.t.state[i]);
      b.each_unit(s, b.rows, [&](int64_t row, int64_t u) {
        each(i, (b.first_row + row) * b.t.stage[s].units + b.unit0[s] + u, state[row * b.t.stage[s].block_units + u]);
      });
    }
  };
  each_state([&](int i, int64_t at, float& state) { state = f.initial[i] ? widen(static_cast<const S*>(f.initial[i])[at]) : 0.0f; });
  cta.sync();
  for (int64_t n = 0; n < f.problem.steps; ++n) {
    const int64_t step = b.step(n, true), count = b.active(step);
    if (count > 0)
      forward_stages<0, Cell, S>(b, r, n, step, count);
    else if (!f.problem.reverse)
      break;  // rows only leave
  }
  cta.sync();
  each_state([&](int i, int64_t at, float& state) { static_cast<S*>(f.final[i])[at] = narrow<S>(state); });
}

// Stage s of the backward walk's visit n, and the stages before it.
template <int s, class Cell, class S, class Cta>
RNN_FN void backward_stages(const Block<Cell, S, Cta>& b, const PersistentBackward& r, int64_t n, int64_t step, int64_t count) {
  using Info = InfoOf<Cell>;
  if constexpr (s >= 0) {
    constexpr int stages = Info::value.stages, states = Info::value.states, vectors = Info::value.vectors;
    constexpr bool last = s == stages - 1;
    constexpr int reader = last ? 0 : s + 1, columns = Info::value.hidden_slots(s);
    constexpr int places = vectors ? vectors : 1;
    const Backward& g = r.g;
    const Problem& p = g.problem;
    const Tiling& t = r.tiling;
    const int64_t u0 = b.unit0[s], units = t.stage[s].block_units, width = t.stage[s].units;
    const int64_t begin = b.offsets[step], token = begin + b.first_row;
    const int64_t after = p.reverse ? step - 1 : step + 1;  // the step that the walk visited before
    const int64_t known = !last ? count : n == 0 ? 0 : b.active(after) < count ? b.active(after) : count;
    const int64_t before = p.reverse ? step + 1 : step - 1;
    const bool has_before = before >= 0 && before < p.steps;

    BackwardStep x{};
    x.hidden = p.hidden;
    x.output = p.output;
    const int64_t room = Info::value.room() * p.hidden;
    x.kept = static_cast<const S*>(g.kept) + token * room;
    x.grad_gates = static_cast<S*>(g.grad_gates) + token * room;
    x.previous_rows = has_before ? b.active(before) : 0;
    x.grad_output = plus(static_cast<const S*>(g.grad_output), token * width);
    each<states>([&](auto index) {
      constexpr int i = decltype(index)::value;
      if constexpr (Info::value.sees(s, i)) {
        const S* after_steps = static_cast<const S*>(i == 0 ? g.output : g.history[i]);
        x.states[i] = after_steps + token * width;
        x.previous[i] = has_before ? after_steps + (b.offsets[before] + b.first_row) * width : nullptr;
        x.initial[i] = plus(static_cast<const S*>(g.initial[i]), b.first_row * width);
        x.carried[i] = b.numbers(t.state[i]) - u0;
        x.carried_row[i] = units;
      }
    });
    x.operand_slot[s] = units;
    x.operand_row[s] = columns * units;
    for (int64_t first = 0; first < count; first += t.rows_at_once) {
      const int64_t some = count - first < t.rows_at_once ? count - first : t.rows_at_once;
      const bool multiply = t.stage[s].depth && first < known;
      if (multiply)
        b.multiply(s, some, [&](int64_t row, int64_t k) {
          return first + row < known ? b.received(reader, last ? n - 1 : n, b.first_row + first + row, k) : b.known(0);
        });
      float* const staged = b.numbers(t.staged[s]);
      x.operand[s] = staged - u0 - first * columns * units;
      b.each_unit(s, some, [&](int64_t row, int64_t u) {
        const int64_t unit = u0 + u;
        Number w[places];
        load_vectors<Cell, Number, S>(g.vectors, unit, 1, w);
        const float sum = multiply ? b.total(s, row, 0, u) : 0.0f;
        backward_units<Cell, s, Number, S>(x, w, first + row, unit, 1, &sum);
        RNN_UNROLL
        for (int c = 0; c < columns; ++c)
          b.send(s, n, b.first_row + first + row, c * width + unit, staged[(row * columns + c) * units + u]);
      });
    }
    backward_stages<s - 1, Cell, S>(b, r, n, step, count);
  }
}

template <class Cell, class S, class Cta>
RNN_FN void persistent_backward(Cta& cta, const PersistentBackward& r) {
  constexpr int stages = InfoOf<Cell>::value.stages, states = InfoOf<Cell>::value.states, last = stages - 1;
  const Backward& g = r.g;
  const Problem& p = g.problem;
  const Block<Cell, S, Cta> b(cta, p, r.tiling, r.offsets, r.packets);
  RNN_UNROLL
  for (int s = 0; s < stages; ++s)
    if (b.t.stage[s].depth)
      b.load_weights(s, [&](int64_t, int64_t unit, int64_t k) {
        return static_cast<const S*>(g.weights[s < last ? s + 1 : 0])[k * b.t.stage[s].units + unit];
      });
  const auto each_state = [&](int i, const auto& each) {
    const int s = i == 0 ? last : 0;
    float* const state = b.numbers(b.t.state[i]);
    b.each_unit(s, b.rows, [&](int64_t row, int64_t u) {
      each((b.first_row + row) * b.t.stage[s].units + b.unit0[s] + u, state[row * b.t.stage[s].block_units + u]);
    });
  };
  RNN_UNROLL
  for (int i = 0; i < states; ++i)
    each_state(i, [&](int64_t at, float& state) { state = g.grad_final[i] ? widen(static_cast<const S*>(g.grad_final[i])[at]) : 0.0f; });
  cta.sync();
  for (int64_t n = 0; n < p.steps; ++n) {
    const int64_t step = b.step(n, false), count = b.active(step);
    if (count > 0)
      backward_stages<last, Cell, S>(b, r, n, step, count);
    else if (p.reverse)
      break;
  }
  cta.sync();
  RNN_UNROLL
  for (int i = 1; i < states; ++i)
    if (g.grad_initial[i]) each_state(i, [&](int64_t at, float& state) { static_cast<S*>(g.grad_initial[i])[at] = narrow<S>(state); });
  if (!g.grad_initial[0]) return;
  // Each row's first step was the walk's last visit to it.
  for (int64_t first = 0; first < b.rows; first += b.t.rows_at_once) {
    const int64_t some = b.rows - first < b.t.rows_at_once ? b.rows - first : b.t.rows_at_once;
    const StageTiling& s = b.t.stage[last];
    if (s.depth)
      b.multiply(last, some, [&](int64_t row, int64_t k) {
        return b.received(0, (p.reverse ? b.steps_of(first + row) : p.steps) - 1, b.first_row + first + row, k);
      });
    b.each_unit(last, some, [&](int64_t row, int64_t u) {
      const float carried = b.numbers(b.t.state[0])[(first + row) * s.block_units + u];
      const float sum = s.depth ? b.total(last, row, 0, u) : 0.0f;
      static_cast<S*>(g.grad_initial[0])[(b.first_row + first + row) * s.units + b.unit0[last] + u] = narrow<S>(carried + sum);
    });
  }
}

}  // namespace rnnkernels::cuda

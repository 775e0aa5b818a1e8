// What backward owes besides the recurrence: the sums over all tokens that are the gradients of the weights, biases and vectors, and the
// gradient of the input. Chunks of steps, cut the same for any number of threads, are a product each, and each sum is added up in the order
// of the chunks. They are taken in rounds of one or several, while gate gradients or, where matrices are large, sums are still in the
// cache. Two groups of rows may have sums of their own, each added up by the thread that walks its rows, or by all; in the end they are
// added to each other.
#pragma once

#include "engines/cpu/packing.h"

namespace rnnkernels::cpu {

class Gradients {
 public:
  Gradients(const Walk& walk, const Backward& backward)
      : w(walk),
        g(backward),
        slots(w.cell.slots * w.p.hidden),
        x_slots(w.cell.input_slots() * w.p.hidden),
        groups(w.plan_.sum_groups),
        cuts(w.cut_rows(groups)),
        numbers_row(w.row_bytes(x_slots)),
        chunk_tokens(w.plan_.grad_chunk * most_rows(w.p, groups)),
        turned_row(w.row_bytes(chunk_tokens)),
        sums_slots(g.grad_bias_ih || g.grad_bias_hh || any_vector()),
        sums_weights(g.grad_weight_ih || any_weight()),
        wanted(!w.p.complete && (g.grad_input || sums_slots || sums_weights)) {}

  void start(const Walk::Member& me) const {
    if (!wanted) return;
    if (g.grad_input)
      Packer(w, me).pack_transposed(grad_input_product(w.cell, w.p), w.plan_.grad_input_blocks, g.weight_ih,
                                    at(g.workspace, w.memory.grad_packed));
    for (int group = 0; group < groups; ++group) {
      w.each_vector(me, slots, [&](int64_t begin, int64_t n) { std::memset(slot_sums(group, begin), 0, size_t(n * w.number_bytes)); });
      w.each_vector(me, w.cell.vectors * w.p.hidden,
                    [&](int64_t begin, int64_t n) { std::memset(vector_sums(group, begin), 0, size_t(n * w.number_bytes)); });
    }
  }

  // After the walk's n-th step.
  void add(Walk::Member& me, int64_t n) {
    const int64_t steps = w.plan_.round_chunks * w.plan_.grad_chunk;
    if (wanted && ((n + 1) % steps == 0 || n + 1 == w.p.steps)) round(me, n / steps * steps, n + 1);
  }

  // After the last round and a meeting of all members.
  void finish(const Walk::Member& me) const {
    if (!wanted) return;
    w.each_vector(me, w.p.hidden, [&](int64_t begin, int64_t n) {
      auto store = [&](const void* sums, void* to, int64_t block) {
        if (to) w.storage.store(sums, n, at(to, (block * w.p.hidden + begin) * w.storage_bytes));
      };
      for (int group = 1; group < groups; ++group) {
        for (int i = 0; i < w.cell.slots; ++i) w.ops.add(slot_sums(group, i * w.p.hidden + begin), n, slot_sums(0, i * w.p.hidden + begin));
        for (int i = 0; i < w.cell.vectors; ++i)
          w.ops.add(vector_sums(group, i * w.p.hidden + begin), n, vector_sums(0, i * w.p.hidden + begin));
      }
      for (int i = 0, x = 0, h = 0; i < w.cell.slots; ++i) {
        const void* sums = slot_sums(0, i * w.p.hidden + begin);
        if (w.cell.slot[i].feeds & X) store(sums, g.grad_bias_ih, x++);
        if (w.cell.biased(i)) store(sums, g.grad_bias_hh, h++);
      }
      for (int i = 0; i < w.cell.vectors; ++i) {
        const PerUnit& vector = w.cell.vector[i];
        if (vector.factor == Factor::Fixed) continue;
        store(!w.cell.has_factor(i) ? slot_sums(0, vector.slot * w.p.hidden + begin) : vector_sums(0, i * w.p.hidden + begin),
              g.grad_vectors[i], 0);
      }
    });
    auto finish = [&](const auto& matrix_of, void* to) {
      const Matrix matrix = matrix_of(0);
      const int64_t begin = split(matrix.rows, me.members, me.id), end = split(matrix.rows, me.members, me.id + 1);
      const int64_t from = begin * matrix.width * w.number_bytes;
      for (int group = 1; to && group < groups; ++group)
        w.ops.add(at(matrix_of(group).sums, from), (end - begin) * matrix.width, at(matrix.sums, from));
      if (to && w.storage_bytes != w.number_bytes)
        w.storage.store(at(matrix.sums, from), (end - begin) * matrix.width, at(to, begin * matrix.width * w.storage_bytes));
      // Below a matrix's blocks there is nothing.
      for (int64_t unit = begin; to && w.p.units && to == g.grad_weights[0] && unit < end; ++unit)
        std::memset(at(to, unit * matrix.width * w.storage_bytes), 0, size_t(unit / w.p.module * w.p.module * w.storage_bytes));
    };
    finish([&](int group) { return weight_ih(group); }, g.grad_weight_ih);
    for (int s = 0; s < w.cell.stages; ++s) finish([&](int group) { return weight(group, s); }, g.grad_weights[s]);
  }

 private:
  // The gradient of a matrix: where its sums are added up, and the panels of what it multiplied, chunk by chunk.
  struct Matrix {
    int64_t rows, width;
    int blocks;
    void *sums, *panels;
  };
  Matrix weight_ih(int group) const {
    return {x_slots, w.p.input, w.plan_.grad_weight_ih_blocks, sums(group, g.grad_weight_ih, w.memory.grad_weight_ih),
            of(group, w.memory.grad_input)};
  }
  Matrix weight(int group, int s) const {
    return {w.cell.hidden_slots(s) * w.width_of_stage(s), operand_width(w.cell, w.p, s), w.plan_.grad_weight_blocks[s],
            sums(group, g.grad_weights[s], w.memory.grad_weights[s]), of(group, w.memory.grad_operand[s])};
  }
  void* panels(const Matrix& matrix, int64_t chunk) const {
    const Product most = grad_weight_product(matrix.width, chunk_tokens);
    return at(matrix.panels, chunk * panel_count(w.m, most, matrix.blocks) * panel_bytes(w.m, most, matrix.blocks));
  }
  // In a group's part of the workspace.
  void* of(int group, int64_t offset) const { return at(g.workspace, offset + group * w.memory.grad_group); }
  void* sums(int group, void* result, int64_t offset) const {
    const int copy = group - w.memory.grad_direct;
    return copy < 0 ? result : at(g.workspace, offset + copy * w.memory.grad_sums);
  }
  void* slot_sums(int group, int64_t i) const { return of(group, w.memory.grad_slots + i * w.number_bytes); }
  void* vector_sums(int group, int64_t i) const { return of(group, w.memory.grad_vectors + i * w.number_bytes); }
  // What is private to a thread.
  void* turned(int id) const { return at(g.workspace, w.memory.grad_turned + id * w.memory.grad_thread); }
  void* numbers(int id) const { return at(g.workspace, w.memory.grad_numbers + id * w.memory.grad_thread); }

  bool any_vector() const {
    return std::any_of(g.grad_vectors, g.grad_vectors + w.cell.vectors, [](void* to) { return to != nullptr; });
  }
  bool any_weight() const {
    return std::any_of(g.grad_weights, g.grad_weights + w.cell.stages, [](void* to) { return to != nullptr; });
  }

  struct Token {
    int64_t step, row, place;
  };
  // A group's tokens of the chunk that begins with the walk's n-th step, those with most units first.
  std::vector<Token> tokens_of(int group, int64_t n) const {
    const int64_t end = std::min(n + w.plan_.grad_chunk, w.p.steps);
    const int64_t t0 = std::min(w.step(n, false), w.step(end - 1, false)), t1 = t0 + end - n;
    std::vector<Token> tokens;
    tokens.reserve(size_t((t1 - t0) * most_rows(w.p, groups)));
    const int64_t first = cuts[size_t(group)], last = cuts[size_t(group) + 1];
    for (int64_t t = t0; t < t1; ++t) {
      const auto add = [&](int64_t row) { tokens.push_back({t, row, w.offsets[size_t(t)] + row}); };
      for (int64_t i = 0; w.p.lengths && i < w.rows(t); ++i)
        if (const int64_t row = w.sorted[size_t(i)]; row >= first && row < last) add(row);
      for (int64_t row = first; !w.p.lengths && row < std::min(last, w.rows(t)); ++row) add(row);
    }
    if (w.p.units)
      std::stable_sort(tokens.begin(), tokens.end(), [&](const Token& a, const Token& b) { return w.p.units[a.step] > w.p.units[b.step]; });
    return tokens;
  }
  // How many of them have the unit.
  int64_t with_unit(const std::vector<Token>& tokens, int64_t unit) const {
    if (!w.p.units) return int64_t(tokens.size());
    return std::partition_point(tokens.begin(), tokens.end(), [&](const Token& k) { return w.p.units[k.step] > unit; }) - tokens.begin();
  }

  // State i before a token; null for zero.
  const void* before(int i, const Token& k) const {
    const int64_t step = w.p.reverse ? k.step + 1 : k.step - 1, row_bytes = w.width(i) * w.storage_bytes;
    const int32_t* const marks = w.marks_before(k.step);
    if (marks && marks[k.row] >= 0) {
      const int64_t t = w.p.reverse ? k.step + 1 : k.step;
      return at(g.reset[i].data, (t * g.reset[i].token + k.row * g.reset[i].row) * w.storage_bytes);
    }
    const bool starts = w.p.lengths ? step >= w.p.lengths[k.row] : step >= w.p.steps || (step >= 0 && k.row >= w.rows(step));
    if (step < 0 || starts) return at(g.initial[i], k.row * row_bytes);
    return at(i == 0 ? g.output : g.history[i], (w.offsets[size_t(step)] + k.row) * row_bytes);
  }
  // What a vector was multiplied with.
  const void* factor_of(const PerUnit& vector, const Token& k) const {
    if (vector.factor == Factor::OldState) return before(vector.state, k);
    if (vector.factor == Factor::Kept) return at(g.kept, (k.place * w.cell.room() + vector.state) * w.p.hidden * w.storage_bytes);
    return at(vector.state == 0 ? g.output : g.history[vector.state], k.place * w.width(vector.state) * w.storage_bytes);
  }
  // What stage s's matrix multiplied.
  const void* operand(int s, const Token& k) const {
    const int kept = w.cell.stage[s].operand;
    if (kept == kPreviousState) return before(0, k);
    return at(g.kept, (k.place * w.cell.room() + kept) * w.p.hidden * w.storage_bytes);
  }

  using Chunks = std::vector<std::vector<Token>>;

  // Of the walk's steps [n0, n1).
  void round(Walk::Member& me, int64_t n0, int64_t n1) {
    // A member that walks a group's rows alone adds up their tokens alone, in its own cache; else all add up each group's together.
    const bool alone = groups > 1 && me.row_groups == groups && me.unit_groups == 1;
    Walk::Member adds = me;
    if (alone) adds.id = 0, adds.members = 1;
    for (int group = alone ? me.row_group : 0; group < (alone ? me.row_group + 1 : groups); ++group) {
      Chunks chunks;
      for (int64_t n = n0; n < n1; n += w.plan_.grad_chunk) chunks.push_back(tokens_of(group, n));
      // Until the gate gradients are there and nobody multiplies with the last round's panels.
      if (!alone && group == 0) w.wait_all(me);
      for (size_t c = 0; c < chunks.size(); ++c) {
        lay_panels(adds, group, int64_t(c), chunks[c]);
        if (sums_slots) add_slots(adds, group, chunks[c]);
      }
      if (!alone) w.wait_all(me);
      if (sums_weights) add_weights(adds, group, chunks, turned(me.id), n0 > 0);
      for (size_t c = 0; g.grad_input && c < chunks.size(); ++c) add_input(adds, chunks[c], numbers(me.id));
    }
  }

  // The operands of the weights' gradients, this member's tokens of them, for all.
  void lay_panels(const Walk::Member& me, int group, int64_t chunk, const std::vector<Token>& tokens) const {
    if (!sums_weights) return;
    const int64_t count = int64_t(tokens.size());
    w.each_vector(me, count, [&](int64_t begin, int64_t n) {
      const int64_t end = begin + n;
      std::vector<const void*> rows(static_cast<size_t>(count));
      auto lay = [&](const Matrix& matrix) {
        const Product product = grad_weight_product(matrix.width, count);
        w.panels(product).spread(rows.data(), product, matrix.blocks, 0, panel_count(w.m, product, matrix.blocks), begin, end,
                                 panels(matrix, chunk));
      };
      if (g.grad_weight_ih) {
        for (int64_t k = begin; k < end; ++k) rows[size_t(k)] = at(g.input, tokens[size_t(k)].place * w.p.input * w.storage_bytes);
        lay(weight_ih(group));
      }
      for (int s = 0; s < w.cell.stages; ++s) {
        if (!g.grad_weights[s]) continue;
        for (int64_t k = begin; k < end; ++k) rows[size_t(k)] = operand(s, tokens[size_t(k)]);
        lay(weight(group, s));
      }
    });
  }

  const void* gates_of(const Token& k) const { return at(g.grad_gates, k.place * w.cell.room() * w.p.hidden * w.storage_bytes); }

  void add_slots(const Walk::Member& me, int group, const std::vector<Token>& tokens) const {
    const int64_t count = int64_t(tokens.size());
    w.each_vector(me, slots, [&](int64_t begin, int64_t n) {
      std::vector<double> some(static_cast<size_t>(n)), all(static_cast<size_t>(n));  // room for n numbers of either kind
      for (int64_t first = 0; first < count; first += kTokensInAChain) {
        std::fill(some.begin(), some.end(), 0.0);
        for (int64_t k = first; k < std::min(first + kTokensInAChain, count); ++k)
          w.storage.add(at(gates_of(tokens[size_t(k)]), begin * w.storage_bytes), n, some.data());
        w.ops.add(some.data(), n, all.data());
      }
      w.ops.add(all.data(), n, slot_sums(group, begin));
    });
    w.each_vector(me, w.p.hidden, [&](int64_t begin, int64_t n) {
      std::vector<double> gate(static_cast<size_t>(n)), factor(static_cast<size_t>(n)), some(static_cast<size_t>(n)),
          all(static_cast<size_t>(n));
      for (int i = 0; i < w.cell.vectors; ++i) {
        const PerUnit& vector = w.cell.vector[i];
        if (!g.grad_vectors[i] || !w.cell.has_factor(i)) continue;
        std::fill(some.begin(), some.end(), 0.0);
        std::fill(all.begin(), all.end(), 0.0);
        int64_t chain = 0;
        for (const Token& k : tokens) {
          if (chain++ == kTokensInAChain) {
            w.ops.add(some.data(), n, all.data());
            std::fill(some.begin(), some.end(), 0.0);
            chain = 1;
          }
          const void* state = factor_of(vector, k);
          if (!state) continue;
          w.storage.load(at(state, begin * w.storage_bytes), n, factor.data());
          w.storage.load(at(gates_of(k), (vector.slot * w.p.hidden + begin) * w.storage_bytes), n, gate.data());
          w.ops.multiply_add(factor.data(), gate.data(), n, some.data());
        }
        w.ops.add(some.data(), n, all.data());
        w.ops.add(all.data(), n, vector_sums(group, i * w.p.hidden + begin));
      }
    });
  }

  // This member's units' rows of all matrices, some units of one slot at a time, so that their sums stay in the cache from chunk to chunk.
  void add_weights(const Walk::Member& me, int group, const Chunks& chunks, void* turned, bool onto) const {
    std::vector<const void*> gates;
    w.each_vector(me, w.p.hidden, [&](int64_t first, int64_t n) {
      const int64_t vectors = ceil_div(n, w.m.lanes), parts = ceil_div(n, w.plan_.turned_units);
      int64_t x = 0, h[kMaxStages] = {};  // rows of the matrices that the slots before have
      for (int i = 0; i < w.cell.slots; ++i) {
        const int stage = w.cell.stage_of(i);
        const bool feeds_x = w.cell.slot[i].feeds & X, feeds_h = w.cell.slot[i].feeds & H;
        const bool adds_x = feeds_x && g.grad_weight_ih, adds_h = feeds_h && g.grad_weights[stage];
        for (int64_t part = 0; (adds_x || adds_h) && part < parts; ++part) {
          const int64_t begin = first + split(vectors, parts, part) * w.m.lanes,
                        end = first + std::min(n, split(vectors, parts, part + 1) * w.m.lanes);
          for (size_t c = 0; c < chunks.size(); ++c) {
            const std::vector<Token>& tokens = chunks[c];
            gates.clear();
            for (const Token& k : tokens) gates.push_back(gates_of(k));
            const int64_t unit = i * w.p.hidden + begin, most = with_unit(tokens, begin);
            w.panels(grad_weight_product(w.p.hidden, most))
                .turn(gates.data(), unit, end - begin, most, turned, turned_row / w.number_bytes);
            const auto add = [&](const Matrix& matrix, int64_t row, int64_t width) {
              add_weight(matrix, row, begin, std::min(end, width), tokens, int64_t(c), turned, onto || c > 0);
            };
            if (adds_x) add(weight_ih(group), x, w.p.hidden);
            if (adds_h) add(weight(group, stage), h[stage], w.width_of_stage(stage));
          }
        }
        x += feeds_x * w.p.hidden;
        h[stage] += feeds_h * w.width_of_stage(stage);
      }
    });
  }

  // The sums of units [begin, end), which are rows of the matrix from `row` on.
  void add_weight(const Matrix& matrix, int64_t row, int64_t begin, int64_t end, const std::vector<Token>& tokens, int64_t chunk,
                  const void* turned, bool onto) const {
    const Product product = grad_weight_product(matrix.width, int64_t(tokens.size()));
    const Pieces pieces(matrix.blocks * w.m.lanes * w.number_bytes, matrix.width * w.number_bytes);
    alignas(64) char sums[kTileBytes];
    const Sums tile{nullptr, 0, sums, tile_row(w.m, product, matrix.blocks)};
    w.multiply(
        product, matrix.blocks, panels(matrix, chunk), 0, panel_count(w.m, product, matrix.blocks), begin, end,
        [&](int64_t unit) { return at(turned, (unit - begin) * turned_row); }, [&](int64_t, int64_t) { return tile; },
        [&](int64_t first, int rows, int64_t column) {
          void* to[kMaxTileRows];
          for (int r = 0; r < rows; ++r) to[r] = at(matrix.sums, (row + first + r) * matrix.width * w.number_bytes);
          w.ops.merge(sums, to, rows, column, matrix.blocks, matrix.width, onto);
        },
        [&](int64_t unit) { return with_unit(tokens, unit); },
        [&](int64_t first, int rows, int64_t column) {
          return Soon{{}, pieces.at(at(matrix.sums, ((row + first) * matrix.width + column) * w.number_bytes), rows)};
        });
  }

  // This member's tokens' share of it, a few at a time.
  void add_input(const Walk::Member& me, const std::vector<Token>& tokens, void* numbers) const {
    const Product product = grad_input_product(w.cell, w.p);
    const int64_t count = int64_t(tokens.size()), last = split(count, me.members, me.id + 1);
    const Pieces pieces(w.plan_.grad_input_blocks * w.m.lanes * w.storage_bytes, w.p.input * w.storage_bytes);
    int64_t places[kMaxTileRows];
    alignas(64) char sums[kTileBytes];
    const Sums tile{nullptr, 0, sums, tile_row(w.m, product, w.plan_.grad_input_blocks)};
    for (int64_t begin = split(count, me.members, me.id); begin < last; begin += w.plan_.numbers_tokens) {
      const int64_t end = std::min(begin + w.plan_.numbers_tokens, last);
      for (int64_t k = begin; k < end; ++k) w.load_operand(gates_of(tokens[size_t(k)]), x_slots, at(numbers, (k - begin) * numbers_row));
      w.multiply(
          product, w.plan_.grad_input_blocks, at(g.workspace, w.memory.grad_packed), 0,
          panel_count(w.m, product, w.plan_.grad_input_blocks), begin, end,
          [&](int64_t k) { return at(static_cast<const void*>(numbers), (k - begin) * numbers_row); },
          [&](int64_t, int64_t) { return tile; },
          [&](int64_t first, int rows, int64_t unit) {
            for (int r = 0; r < rows; ++r) places[r] = tokens[size_t(first + r)].place;
            w.storage.put(sums, places, rows, unit, w.plan_.grad_input_blocks, w.p.input, g.grad_input);
          },
          [&](int64_t k) { return w.p.units ? w.p.units[tokens[size_t(k)].step] : product.depth; },
          [&](int64_t first, int rows, int64_t unit) {
            const int64_t place = tokens[size_t(first)].place;
            const int64_t run = run_of(rows, 1, [&](int r) { return tokens[size_t(first + r)].place; });
            return Soon{{}, pieces.at(at(g.grad_input, (place * w.p.input + unit) * w.storage_bytes), run)};
          });
    }
  }

  const Walk& w;
  const Backward& g;
  const int64_t slots, x_slots;  // units of all slots, and of those that the input feeds, which come first
  const int groups;
  const std::vector<int64_t> cuts;                      // where their rows begin
  const int64_t numbers_row, chunk_tokens, turned_row;  // bytes of a row; of a chunk at most
  const bool sums_slots, sums_weights, wanted;
};

}  // namespace rnnkernels::cpu

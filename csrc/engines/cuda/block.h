// One block of a persistent kernel: its units and rows, its share of the matrices, and what it exchanges with the blocks of its tile. The
// code is one thread's; Cta is what that knows of the machine (its place, barriers, shared memory, loads and stores that other blocks see,
// the tensor cores), so that the same code runs on a GPU and, thread by thread in any order, on a host.
//
// State travels between blocks as packets: 12 bytes of operand and the epoch that they belong to, loaded and stored in one piece, so that
// whoever sees the epoch has the numbers, and no barrier or fence is needed. The visit of the walk numbered n, from 0, writes epoch n + 1
// to the side (n & 1) of its buffer. Two sides suffice: a block writes visit n + 1 only after it has read visit n from every block of its
// tile, and each of those had read visit n - 1 before it wrote visit n.
#pragma once

#include "engines/cuda/packing.h"

namespace rnnkernels::cuda {

struct alignas(kPacketBytes) Packet {
  uint32_t word[kPacketWords], epoch;
};

RNN_FN uint32_t epoch_of_visit(int64_t visit) { return uint32_t(visit + 1); }
RNN_FN int side_of_visit(int64_t visit) { return int(visit & 1); }

constexpr int64_t kNoVisit = -1;

template <class Cell, class S, class Arithmetic, class Cta>
class Block {
 public:
  using Info = InfoOf<Cell>;
  static constexpr ProductShape shape = Arithmetic::shape;
  static constexpr int kHeldItems = shape.held_of(Info::value.stages), kItemWords = shape.item_words;

  // The items of weights that a thread keeps in registers.
  struct Held {
    Word stage[Info::value.stages][kHeldItems][kItemWords];
  };

  RNN_FN Block(Cta& cta, const Problem& p, bool reverse, const Tiling& tiling, const int64_t* offsets, Packet* packets)
      : cta(cta), p(p), reverse(reverse), t(tiling), offsets(offsets), packets(packets), arithmetic(p) {
    place = cta.block() % t.unit_ctas;
    first_row = int64_t(cta.block() / t.unit_ctas % t.row_tiles) * t.tile_rows;
    rows = int(p.batch - first_row < t.tile_rows ? p.batch - first_row : t.tile_rows);
    RNN_UNROLL
    for (int s = 0; s < Info::value.stages; ++s) {
      const StageTiling& g = t.stage[s];
      const int64_t begin = int64_t(place) * g.block_units, end = begin + g.block_units;
      unit0[s] = begin < g.units ? begin : g.units;
      units[s] = int((end < g.units ? end : g.units) - unit0[s]);
    }
  }

  RNN_FN float* numbers(int64_t offset) const { return reinterpret_cast<float*>(cta.shared() + offset); }
  RNN_FN int64_t step(int64_t n, bool from_start) const { return reverse != from_start ? n : p.steps - 1 - n; }
  // How many of the tile's rows take part in a step.
  RNN_FN int active(int64_t step) const {
    const int64_t n = offsets[step + 1] - offsets[step] - first_row;
    return int(n < 0 ? 0 : n < rows ? n : rows);
  }
  // In how many steps a row of the tile takes part.
  RNN_FN int64_t steps_of(int row) const {
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

  // Before any packet: sides without an epoch. Device memory's are the launcher's to clear.
  RNN_FN void open() const {
    if (t.exchange == Exchange::Near)
      for (int s = 0; s < Info::value.stages; ++s)
        for (int i = cta.thread(); i < 2 * t.tile_rows * t.stage[s].send_packets(t.unit_ctas); i += kThreads)
          reinterpret_cast<Packet*>(cta.shared() + t.stage[s].packets)[i] = {};
    meet();
  }
  // Nobody leaves while others may still write into its memory.
  RNN_FN void close() const { meet(); }

  // ---- the matrix

  // This thread's items of stage s's matrix, as pack() left them.
  template <int s>
  RNN_FN void load_weights(Held& held, const void* workspace) const {
    const StageTiling& g = t.stage[s];
    const Word* const from = packed_item<Arithmetic>(t, s, workspace, place, 0) + cta.thread();
    RNN_UNROLL
    for (int i = 0; i < kHeldItems; ++i)
      if (i < g.held) {
        RNN_UNROLL
        for (int w = 0; w < kItemWords; ++w) held.stage[s][i][w] = from[(i * kItemWords + w) * kThreads];
      }
    for (int i = g.held * kItemWords; i < g.items() * kItemWords; ++i) *shared_word(s, i) = from[i * kThreads];
  }

  // The product of stage s's matrix with `count` rows of the operand from row `first` of it on.
  template <int s>
  RNN_FN void multiply(const Held& held, int first, int count) const {
    const StageTiling& g = t.stage[s];
    const Lane<Arithmetic> at(g, cta.thread());
    const uint32_t* const operand = reinterpret_cast<const uint32_t*>(cta.shared() + t.operand) + first * t.operand_row;
    float* const partial = numbers(t.partial) + at.slice * shape.group * t.partial_row;
    for (int pass = 0; pass < g.passes; ++pass) {
      typename Arithmetic::Sum sum{};
      const auto add = [&](int k, const Word* item) { arithmetic.add(cta, sum, item, operand + at.depth(g, k), t.operand_row, count); };
      if (pass == 0) {
        RNN_UNROLL
        for (int i = 0; i < kHeldItems; ++i)
          if (i < g.held) add(i, held.stage[s][i]);
      }
      for (int k = pass ? 0 : g.held; k < g.per_slice; ++k) {
        Word item[kItemWords];
        RNN_UNROLL
        for (int w = 0; w < kItemWords; ++w) item[w] = *shared_word(s, (pass * g.per_slice + k) * kItemWords + w);
        add(k, item);
      }
      float* const to = partial + at.panel(g, pass) * g.panel_rows;
      Arithmetic::give(cta.thread() % 32, g.panel_rows, sum, count, [&](int n, int row, float x) { to[n * t.partial_row + row] = x; });
    }
    cta.sync();
  }
  RNN_FN float total(int s, int n, int c, int u) const {
    const StageTiling& g = t.stage[s];
    const float* from = numbers(t.partial) + n * t.partial_row + c * g.block_units + u;
    float sum = 0;
    for (int slice = 0; slice < g.slices; ++slice) sum += from[slice * shape.group * t.partial_row];
    return sum;
  }

  // ---- the exchange

  // The operand of stage s for `count` rows of the tile from `first` on: of each row what its visit(row) sent, or with kNoVisit the numbers
  // known(row, k).
  template <class Visit, class Known>
  RNN_FN void receive(int s, int first, int count, const Visit& visit, const Known& known) const {
    const StageTiling &g = t.stage[s], &source = t.stage[g.source];
    uint32_t* const operand = reinterpret_cast<uint32_t*>(cta.shared() + t.operand);
    const int share = source.share(), from_block = source.share_packets(), of_row = source.send_packets(t.unit_ctas), all = count * of_row;
    for (int begin = cta.thread(); begin < all; begin += kPacketsAtOnce * kThreads) {
      const Packet* from[kPacketsAtOnce];
      Packet packet[kPacketsAtOnce];
      RNN_UNROLL
      for (int j = 0; j < kPacketsAtOnce; ++j) {
        const int i = begin + j * kThreads, row = first + i / of_row;
        from[j] = i < all && visit(row) != kNoVisit ? buffer(g.source, visit(row), row) + i % of_row : nullptr;
        if (from[j]) packet[j] = look(from[j]);
      }
      RNN_UNROLL
      for (int j = 0; j < kPacketsAtOnce; ++j) {
        const int i = begin + j * kThreads, row = first + i / of_row, block = i % of_row / from_block;
        if (i >= all) continue;
        if (from[j])
          for (uint32_t tries = 0; packet[j].epoch != epoch_of_visit(visit(row)); packet[j] = look(from[j])) cta.waiting(++tries);
        RNN_UNROLL
        for (int w = 0; w < kPacketWords; ++w) {
          const int word = i % from_block * kPacketWords + w, k = block * share + word;
          if (word >= share) continue;
          operand[(row - first) * t.operand_row + k] = from[j] ? packet[j].word[w] : join<S>([&](int v) {
            const int64_t at = on_wire<Arithmetic>(t, s, k, v);
            return at < 0 ? narrow<S>(0.0f) : known(row, at);
          });
        }
      }
    }
    const int sent = source.send_words(t.unit_ctas), rest = g.operand_words - sent;  // a product goes through whole items
    for (int i = cta.thread(); i < count * rest; i += kThreads) operand[i / rest * t.operand_row + sent + i % rest] = 0;
    cta.sync();
  }

  // This block's share of what stage s hands on, for `count` rows of the tile from `first` on; number(row, c, u) is column c of unit u.
  template <class Get>
  RNN_FN void send(int s, int64_t visit, int first, int count, const Get& number) const {
    const StageTiling& g = t.stage[s];
    const int packets_of_row = g.share_packets();
    for (int i = cta.thread(); i < count * packets_of_row; i += kThreads) {
      const int row = first + i / packets_of_row, at = i % packets_of_row;
      Packet packet;
      packet.epoch = epoch_of_visit(visit);
      RNN_UNROLL
      for (int w = 0; w < kPacketWords; ++w) {
        const int word = at * kPacketWords + w, c = word / g.column_words, u = word % g.column_words * shape.word_values;
        packet.word[w] = join<S>([&](int v) { return narrow<S>(word < g.share() && u + v < units[s] ? number(row, c, u + v) : 0.0f); });
      }
      Packet* const to = buffer(s, visit, row) + place * packets_of_row + at;
      if (t.exchange == Exchange::Grid)
        cta.store(to, packet);
      else
        for (int peer = 0; peer < t.unit_ctas; ++peer) cta.store_near(peer, to, packet);
    }
  }

  // This thread's share of `count` rows × the block's units of stage s; the first of them is row thread / units, unit thread % units.
  template <class Each>
  RNN_FN void each_unit(int s, int count, const Each& each) const {
    const int n = units[s];
    for (int i = cta.thread(); i < count * n; i += kThreads) each(i / n, i % n);
  }

  Cta& cta;
  const Problem& p;
  const bool reverse;
  const Tiling& t;
  const int64_t* const offsets;
  Packet* const packets;
  const Arithmetic arithmetic;
  int place, rows;
  int64_t first_row;
  int64_t unit0[kMaxStages];
  int units[kMaxStages];

 private:
  RNN_FN void meet() const {
    if (t.exchange == Exchange::Near && t.unit_ctas > 1)
      cta.sync_cluster();
    else
      cta.sync();
  }
  // Word i of this thread's items, of those that are not held.
  RNN_FN Word* shared_word(int s, int i) const {
    const StageTiling& g = t.stage[s];
    return reinterpret_cast<Word*>(cta.shared() + g.weights) + (i - g.held * kItemWords) * kThreads + cta.thread();
  }
  RNN_FN Packet* buffer(int s, int64_t visit, int row) const {
    const StageTiling& g = t.stage[s];
    const int of_row = g.send_packets(t.unit_ctas);
    if (t.exchange == Exchange::Near)
      return reinterpret_cast<Packet*>(cta.shared() + g.packets) + (side_of_visit(visit) * t.tile_rows + row) * of_row;
    return packets + g.packets + (side_of_visit(visit) * p.batch + first_row + row) * of_row;
  }
  RNN_FN Packet look(const Packet* from) const { return t.exchange == Exchange::Grid ? cta.load(from) : cta.load_near(from); }
};

}  // namespace rnnkernels::cuda

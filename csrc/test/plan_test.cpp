// The plan as a pure function, over thousands of problems: every unit and row has one owner, limits are kept, nothing in the workspace
// overlaps.
#include "core/plan.h"
#include "core/ahead.h"
#include "core/apart.h"
#include "core/teams.h"
#include "core/tiling.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "cells/list.h"
#include "test/check.h"

using namespace rnnkernels;

namespace {

void test(const Machine& m, const CellInfo& cell, const Problem& p, bool backward) {
  const Schedule s = plan(m, cell, p, backward);
  const auto where = [&](const char* what) {
    return check(false, "%s: %s B %ld H %ld T %ld threads %d lanes %d", what, cell.name, long(p.batch), long(p.hidden), long(p.steps),
                 p.threads, m.lanes);
  };
  if (s.threads() > std::max(p.threads, 1)) where("more threads than asked for");
  if (s.row_groups > std::max<int64_t>(p.batch, 1)) where("a row group without rows");
  for (int stage = 0; stage < cell.stages; ++stage) {
    const Product product = backward ? backward_product(cell, p, stage) : forward_product(cell, p, stage);
    const int vectors = s.blocks[stage] * std::max(product.columns, 1);
    if (vectors > kMaxVectorsPerPanel) where("a panel wider than the kernels");
    const int rows = tile_rows(m, product, vectors);
    if (rows < 1 || rows > kMaxTileRows || (!by_matrices(m, product) && rows > 1 && rows * vectors > m.registers))
      where("a tile larger than the registers");
    const int64_t panels = panel_count(m, product, s.blocks[stage]);
    if (panels * s.blocks[stage] * m.lanes < product.units) where("units without a panel");
    if ((panels - 1) * s.blocks[stage] * m.lanes >= product.units) where("a panel without units");
    int64_t covered = 0;
    for (int g = 0; g < s.unit_groups; ++g) {
      const int64_t begin = split(panels, s.unit_groups, g), end = split(panels, s.unit_groups, g + 1);
      if (begin != covered || end < begin) where("panels not cut one after the other");
      covered = end;
    }
    if (covered != panels) where("panels without an owner");
  }
  const Layout l = layout(m, cell, p, s, backward);
  std::vector<std::pair<int64_t, int64_t>> parts, kept;
  auto& packed = p.keeps_packed ? kept : parts;
  const auto rows = [&](int64_t width) { return p.batch * padded(width, m.number_bytes) * m.number_bytes; };
  for (int i = 0; i < cell.stages; ++i) {
    const Product product = backward ? backward_product(cell, p, i) : forward_product(cell, p, i), input = input_product(cell, p, i);
    if (!p.complete) {
      packed.push_back({l.packed[i], panel_count(m, product, s.blocks[i]) * panel_bytes(m, product, s.blocks[i])});
      if (!backward)
        packed.push_back({l.packed_input[i], panel_count(m, input, s.input_blocks[i]) * panel_bytes(m, input, s.input_blocks[i])});
      if (p.keeps_packed) {
        kept.push_back({l.prints[i], panel_count(m, product, s.blocks[i]) * int64_t(sizeof(Fingerprint))});
        kept.push_back({l.input_prints[i], panel_count(m, input, s.input_blocks[i]) * int64_t(sizeof(Fingerprint))});
      }
    }
    if (s.blocks[i] % s.input_blocks[i] || s.input_blocks[i] * input.columns > kMaxVectorsPerPanel)
      where("input panels that do not divide the panels");
    if (backward) parts.push_back({l.operand[i], (i ? 1 : 2) * rows(cell.hidden_slots(i) * width_of(p, cell.stage[i].width))});
  }
  for (int i = 0; i < cell.states; ++i) parts.push_back({l.state[i], (i || backward ? 1 : 2) * rows(width_of(p, cell.state_width(i)))});
  if (p.weight_type == WeightType::Int8 || (p.weight_type == WeightType::BF16 && !m.pairs))
    parts.push_back({l.wide, s.threads() * l.wide_bytes});
  for (int i = 0; i < cell.stages && !p.complete; ++i) {
    const Product product = backward ? backward_product(cell, p, i) : forward_product(cell, p, i);
    if (in_pairs(m, product) && l.paired_bytes < rows(ceil_div(product.depth, 2))) where("operands longer than the place for their pairs");
  }
  if (m.pairs) parts.push_back({l.paired, s.threads() * l.paired_bytes});
  if (!backward && cell.stages > 1) parts.push_back({l.between, rows(cell.kept * p.hidden)});
  if (cell.moments()) {
    parts.push_back({l.partial, 2 * p.batch * partial_row(m, cell, p) * int64_t(sizeof(double))});
    parts.push_back({l.totals, s.threads() * p.batch * (backward ? kMaxSums : cell.moments()) * m.number_bytes});
  }
  if (s.chunk < 1 || s.chunk > std::max<int64_t>(p.steps, 1)) where("a chunk of no steps or more than all");
  if (!backward && !p.complete) {
    for (int i = 0; i < cell.stages; ++i) {
      const Product product = input_product(cell, p, i);
      const int64_t row = ceil_div(product.units, s.blocks[i] * m.lanes) * s.blocks[i] * product.columns * m.lanes * m.number_bytes;
      parts.push_back({l.gates[i], s.chunk * p.batch * row});
      parts.push_back({l.bias[i], row});
    }
    if (p.storage == Storage::BF16 && (!m.pairs || p.input % 2))
      parts.push_back({l.numbers, s.threads() * s.chunk * p.batch * p.input * m.number_bytes});
  }
  if (backward && !p.complete) {
    if (s.grad_chunk < 1 || s.grad_chunk > std::max<int64_t>(p.steps, 1)) where("a chunk of gradients of no steps or more than all");
    Problem alone = p;
    alone.threads = 1;
    const Schedule serial = plan(m, cell, alone, true);
    if (serial.grad_chunk != s.grad_chunk || serial.sum_groups != s.sum_groups) where("chunks that depend on the threads");
    if (s.round_chunks < 1 || (s.round_chunks - 1) * s.grad_chunk >= std::max<int64_t>(p.steps, 1))
      where("a round of chunks without steps");
    if (s.sum_groups < 1 || s.sum_groups > kSumGroups) where("no groups of rows, or more than there is room for");
    const int64_t tokens = s.grad_chunk * most_rows(p, s.sum_groups), slots = cell.slots * p.hidden, number = m.number_bytes;
    const auto panels = [&](const Product& q, int blocks) {
      if (blocks < 1 || blocks > kMaxVectorsPerPanel) where("a panel of gradients wider than the kernels");
      if (panel_count(m, q, blocks) * blocks * m.lanes < q.units) where("gradients without a panel");
      return panel_count(m, q, blocks) * panel_elements(m, q, blocks) * number;
    };
    parts.push_back({l.grad_packed, panels(grad_input_product(cell, p), s.grad_input_blocks)});
    if (s.turned_units < m.lanes || s.turned_units % m.lanes) where("units turned that are no whole vectors");
    if (s.numbers_tokens < (m.matrices ? kMaxTileRows : kMaxFmaRows)) where("numbers of less tokens than a tile has rows");
    for (int id = 0; id < s.threads(); ++id) {
      const auto add = [&](int64_t offset, int64_t bytes) { parts.push_back({offset + id * l.grad_thread, bytes}); };
      add(l.grad_numbers, s.numbers_tokens * padded(cell.input_slots() * p.hidden, number) * number);
      add(l.grad_turned, s.turned_units * padded(tokens, number) * number);
    }
    for (int group = 0; group < s.sum_groups; ++group) {
      const auto add = [&](int64_t offset, int64_t bytes) { parts.push_back({offset + group * l.grad_group, bytes}); };
      add(l.grad_input, s.round_chunks * panels(grad_weight_product(p.input, tokens), s.grad_weight_ih_blocks));
      add(l.grad_slots, slots * number);
      add(l.grad_vectors, cell.vectors * p.hidden * number);
      for (int i = 0; i < cell.stages; ++i)
        add(l.grad_operand[i], s.round_chunks * panels(grad_weight_product(operand_width(cell, p, i), tokens), s.grad_weight_blocks[i]));
    }
    if (l.grad_direct != (p.storage != Storage::BF16)) where("sums that are results, though of another type, or that are not");
    for (int copy = 0; copy < s.sum_groups - l.grad_direct; ++copy) {
      const auto add = [&](int64_t offset, int64_t bytes) { parts.push_back({offset + copy * l.grad_sums, bytes}); };
      add(l.grad_weight_ih, cell.input_slots() * p.hidden * p.input * number);
      for (int i = 0; i < cell.stages; ++i)
        add(l.grad_weights[i], cell.hidden_slots(i) * width_of(p, cell.stage[i].width) * operand_width(cell, p, i) * number);
    }
  }
  for (auto [memory, room] : {std::pair(&parts, l.bytes), std::pair(&kept, l.packed_bytes)}) {
    std::sort(memory->begin(), memory->end());
    int64_t end = 0;
    for (auto [at, bytes] : *memory) {
      if (at < end || at % 64) where("parts of memory overlap or are not aligned");
      if (at >= end + 64) where("memory that nobody uses");
      end = at + bytes;
    }
    if (end > room) where("memory is too small");
    if (!memory->empty() && room >= end + 64) where("memory at the end that nobody uses");
  }
}

// Every unit and row of a persistent grid has one block, every number of every matrix one place, parts of memory do not overlap, limits are
// kept.
void test_tiling(const Device& device, const CellInfo& cell, const Problem& p, bool backward, const Tiling& t) {
  const auto where = [&](const char* what) {
    return check(false, "%s: %s B %ld H %ld %s, %d multiprocessors", what, cell.name, long(p.batch), long(p.hidden),
                 backward ? "backward" : "forward", device.multiprocessors);
  };
  const ProductShape& shape = product_shape(p);
  if (t.exchange == Exchange::Grid && t.blocks() > device.multiprocessors) where("more blocks than multiprocessors");
  if (t.exchange == Exchange::Near && t.unit_ctas > device.cluster_blocks) where("more blocks than a cluster has");
  if (t.shared_bytes > device.shared_bytes) where("more shared memory than there is");
  if (int64_t(t.tile_rows) * t.row_tiles < p.batch) where("rows without a block");
  if (p.batch && int64_t(t.tile_rows) * (t.row_tiles - 1) >= p.batch) where("a block without rows");
  if (t.rows_at_once < (shape.tensor ? 8 : 1)) where("less than a fragment at once");
  std::vector<std::pair<int64_t, int64_t>> shared, memory;
  int64_t partial = 0;
  for (int s = 0; s < cell.stages; ++s) {
    const StageTiling& g = t.stage[s];
    if (int64_t(g.block_units) * t.unit_ctas < g.units) where("units without a block");
    if (s == 0 && int64_t(g.block_units) * (t.unit_ctas - 1) >= g.units) where("a block without units");
    const int64_t sent = 2 * int64_t(g.send_packets(t.unit_ctas)) * kPacketBytes;
    if (g.share_packets() * kPacketWords < g.share()) where("words without a packet");
    if (t.exchange == Exchange::Near) shared.push_back({g.packets, sent * t.tile_rows});
    if (t.exchange == Exchange::Grid) memory.push_back({g.packets * kPacketBytes, sent * p.batch});
    if (backward) shared.push_back({t.staged[s], int64_t(shape.group) * cell.hidden_slots(s) * g.block_units * 4});
    if (!g.operand_words) continue;
    const int over = shape.tensor ? 1 : 32 / g.panel_rows;
    if (g.across * (g.slices / over) != kWarps) where("warps that do not cover the product");
    if (g.passes * g.across * g.panel_rows < g.block_units * g.columns) where("rows of the matrix without a panel");
    if (g.operand_words < t.stage[g.source].send_words(t.unit_ctas) || t.operand_row < g.operand_words)
      where("an operand longer than its place");
    if (g.held > shape.held_of(cell.stages) || g.held > g.per_slice) where("more in registers than there is");
    shared.push_back({g.weights, int64_t(g.items() - g.held) * shape.item_words * kThreads * 16});
    memory.push_back({g.packed, int64_t(t.unit_ctas) * g.items() * shape.item_words * kThreads * 16});
    partial = std::max(partial, int64_t(g.slices) * shape.group);
    if (t.partial_row < g.rows) where("sums longer than their place");
  }
  shared.push_back({t.operand, int64_t(t.rows_at_once) * t.operand_row * 4});
  shared.push_back({t.partial, partial * t.partial_row * 4});
  for (int i = 0; i < cell.states; ++i)
    shared.push_back({t.state[i], int64_t(t.tile_rows) * t.stage[i == 0 ? cell.stages - 1 : 0].block_units * 4});
  if (!backward && cell.stages > 1) shared.push_back({t.between, int64_t(t.tile_rows) * cell.kept * t.stage[0].block_units * 4});
  for (auto [parts, size] : {std::pair(&shared, t.shared_bytes), std::pair(&memory, t.workspace_bytes)}) {
    std::sort(parts->begin(), parts->end());
    int64_t end = 0;
    for (auto [at, n] : *parts) {
      if (n && at < end) where("parts overlap");
      end = std::max(end, at + n);
    }
    if (end > size) where("parts lie outside");
  }
}

// Lines asked for are those of the pieces, each once; of a panel that is far away all are asked for, by one tile or the next.
void test_ahead() {
  alignas(64) static char memory[1 << 16];
  for (int64_t lines : {1, 2, 3, 4, 7, 8})
    for (int64_t count : {0, 1, 5}) {
      constexpr int64_t stride = 4096;
      const Ahead ahead = Pieces(lines * 64 - 4, stride).at(memory, count);
      std::vector<const char*> asked;
      for (int64_t k = 0; k < ahead.lines(); ++k) asked.push_back(ahead.line(k));
      for (int64_t i = 0; i < count; ++i)
        for (int64_t line = 0; line < lines; ++line)
          check(std::count(asked.begin(), asked.end(), memory + i * stride + line * 64) == 1, "line %ld of %ld, piece %ld of %ld",
                long(line), long(lines), long(i), long(count));
    }
  check(Pieces(64, 64).at(nullptr, 3).lines() == 0, "what is not there is asked for");
  Machine m{16, 24, 4};
  m.l2_bytes = 1 << 12;
  constexpr int64_t depth = 10, bytes = depth * 4 * 64;
  const Product product{32, depth, 4};
  const PanelsAhead panels(m, product, 1, 2, 3);
  int64_t asked = 0;
  for (int64_t tile = 0; panels.wanted(memory, tile, depth); ++tile, asked += depth)
    check(panels.lines(memory, tile, depth).line(0) == memory + asked * 64, "tile %ld asks for other lines", long(tile));
  check(asked * 64 == bytes, "%ld lines of a panel", long(asked));
  m.pairs = m.matrices = true;
  const PanelsAhead shared(m, {32, 4 * depth, 4}, 1, 2, 3);  // 80 lines, 27 a tile
  check(shared.wanted(memory, 2, depth) && !shared.wanted(memory, 3, depth) && shared.lines(memory, 2, depth).line(0) == memory + 54 * 64,
        "a tile's share of a panel");
  check(!panels.wanted(nullptr, 0, depth) && !PanelsAhead(Machine{16, 24, 4}, product, 1, 2, 3).wanted(memory, 0, depth),
        "asks for the panel after the last, or for one that is near");
  const int64_t places[] = {5, 6, 7, 9};
  check(run_of(4, 1, [&](int r) { return places[r]; }) == 3 && run_of(1, 1, [&](int r) { return places[r]; }) == 1, "runs of places");
}

}  // namespace

int main() {
  int count = 0;
  for (const CellInfo& cell : kCells)
    for (auto [lanes, registers, bytes] :
         std::vector<std::tuple<int, int, int>>{{1, 12, 4}, {8, 12, 4}, {4, 12, 8}, {16, 24, 4}, {8, 24, 8}})
      for (int64_t batch : {0, 1, 2, 3, 7, 8, 64, 129, 1000})
        for (int64_t hidden : {1, 15, 16, 17, 33, 64, 100, 128, 511, 2048})
          for (int64_t steps : {1, 100})
            for (int threads : {1, 2, 3, 16, 61})
              for (bool backward : {false, true}) {
                Machine m{};
                m.lanes = lanes;
                m.registers = registers;
                m.number_bytes = bytes;
                const int64_t output = cell.projected() ? (hidden + 1) / 2 : hidden;
                const bool complete = steps == 1 && cell.stages == 1, training = backward || hidden % 2;
                const Storage storage = bytes == 8 ? Storage::F64 : batch % 2 ? Storage::F32 : Storage::BF16;
                m.pairs = storage == Storage::BF16 && lanes == 16 && hidden != 511;
                m.matrices = m.pairs && hidden % 3 == 1;
                Problem p{0, storage, steps, batch, threads == 3 ? 41 : 40, hidden, output, nullptr, false, training, complete, threads};
                if (!training && !complete && bytes == 4) p.weight_type = WeightType(batch % kWeightTypes);
                p.keeps_packed = !backward && !complete && threads % 2;
                p.chained = !training && !complete && batch % 4 == 1;
                p.least = hidden % 3 ? 1 : threads / 2;
                p.row_groups = hidden % 5 ? 0 : threads / 3;
                test(m, cell, p, backward);
                ++count;
              }
  std::printf("%d plans\n", count);
  const Machine wide{16, 24, 4};
  const CellInfo& lstm =
      *std::find_if(std::begin(kCells), std::end(kCells), [](const CellInfo& c) { return !std::strcmp(c.name, "lstm"); });
  const auto panel_of_one_row = [&](int64_t l1_bytes, int64_t hidden, int threads) {
    Machine m = wide;
    m.l1_bytes = l1_bytes;
    Problem p{0, Storage::F32, 100, 1, hidden, hidden, hidden, nullptr, false, false, false, threads};
    p.least = threads;
    return plan(m, lstm, p, false).blocks[0];
  };
  check(panel_of_one_row(24 << 10, 64, 1) == 1 && panel_of_one_row(24 << 10, 64, 2) == 1, "the panel where steps turn stays in L1");
  check(panel_of_one_row(36 << 10, 64, 1) == 2 && panel_of_one_row(36 << 10, 64, 2) == 2, "as wide as L1 lets it");
  check(panel_of_one_row(24 << 10, 256, 2) == 2, "wide where no panel fits L1");
  const auto tried = [&](int64_t batch, int64_t hidden, int threads, bool training) {
    const Problem p{0, Storage::F32, 100, batch, hidden, hidden, hidden, nullptr, false, training, false, threads};
    Team found[kTeams];
    const int count = teams(wide, lstm, p, training, found);
    check(found[0].least == 1 && found[0].most == threads, "first comes what the model would do");
    bool serial = false;
    for (int i = 0; i < count; ++i) {
      Problem of_team = p;
      of_team.least = found[i].least, of_team.threads = found[i].most, of_team.row_groups = found[i].row_groups;
      const Schedule forward = plan(wide, lstm, of_team, false), backward = plan(wide, lstm, of_team, true);
      for (const Schedule& s : {forward, backward}) {
        check(s.threads() >= found[i].least && s.threads() <= found[i].most, "a team has so many threads: B %ld H %ld", long(batch),
              long(hidden));
        check(!found[i].row_groups || s.row_groups == found[i].row_groups, "and cuts the batch so: B %ld H %ld", long(batch), long(hidden));
      }
      serial = serial || (forward.threads() == 1 && (!training || backward.threads() == 1));
    }
    return std::pair(count, serial);
  };
  check(tried(1, 64, 2, false) == std::pair(2, true) && tried(1, 64, 2, true).second, "a small step may be quicker alone");
  check(tried(1, 64, 1, true) == std::pair(1, true), "one thread has no choice");
  check(tried(1, 512, 2, false) == std::pair(1, false), "a large one is shared");
  check(tried(64, 256, 2, false) == std::pair(2, false) && tried(1, 256, 2, false).first <= 2, "by units or, where there are any, by rows");
  for (int threads : {3, 4, 16, 61})
    for (int64_t batch : {1, 8, 64}) check(tried(batch, 256, threads, batch == 8).first <= kTeams, "few are tried");
  const auto apart = [&](int64_t steps, int64_t batch, int64_t hidden, int threads) {
    const Problem p{0, Storage::F32, steps, batch, hidden, hidden, hidden, nullptr, false, true, steps == 1, threads};
    return gains_apart(wide, kCells[0], p, true);
  };
  check(apart(100, 1, 64, 2) && apart(100, 8, 64, 2), "small sequences gain side by side");
  check(!apart(100, 1, 64, 1) && !apart(1, 1, 64, 2) && !apart(100, 0, 64, 2), "one thread, one step or no rows gain nothing");
  check(!apart(100, 1, 4096, 2) && !apart(100, 512, 64, 16), "matrices beyond L2 and batches for many threads gain nothing");
  const auto chained = [&](int64_t steps, int64_t batch, int64_t hidden, int threads, int layers, int64_t input = 64) {
    const Problem p{0, Storage::F32, steps, batch, hidden, hidden, hidden, nullptr, false, false, false, threads};
    return gains_chained(wide, kCells[0], p, input, layers);
  };
  check(chained(100, 1, 64, 2, 2) && chained(100, 1, 64, 4, 3) && chained(1000, 1, 128, 2, 4), "small layers gain in a chain");
  check(!chained(100, 1, 64, 1, 2) && !chained(100, 1, 64, 2, 1) && !chained(8, 1, 64, 2, 2),
        "one thread, one layer, few steps gain nothing");
  check(!chained(100, 1, 64, 2, 2, 4096), "a first layer that reads much gains nothing");
  check(!chained(100, 1, 4096, 2, 2) && !chained(100, 512, 64, 16, 2), "large matrices and batches for many threads gain nothing");
  int tilings = 0, fitting = 0;
  for (const CellInfo& cell : kCells)
    for (const Device& device : {Device{132, 227 << 10, 8}, Device{108, 163 << 10, 1}, Device{46, 99 << 10, 1}, Device{1, 48 << 10, 1}})
      for (auto [storage, products] : {std::pair(Storage::F32, Products::Exact), std::pair(Storage::F32, Products::ThreeTf32),
                                       std::pair(Storage::BF16, Products::Exact)})
        for (int64_t batch : {0, 1, 2, 3, 8, 17, 64, 65, 1000})
          for (int64_t hidden : {1, 15, 33, 64, 100, 129, 512, 600, 1024, 1111, 2048})
            for (bool backward : {false, true}) {
              const int64_t output = cell.projected() ? (hidden + 1) / 2 : hidden;
              const Problem p{0, storage, 100, batch, 40, hidden, output, nullptr, false, true, false, 1, products};
              for (int sequences : {1, 2}) {
                const Tiling t = tile(device, cell, p, backward, sequences);
                check(t.sequences == sequences || !t.fits, "a tiling of another number of sequences");
                if (t.fits) test_tiling(device, cell, p, backward, t);
                ++tilings;
                fitting += t.fits;
              }
            }
  const auto together = [&](int64_t batch, int64_t hidden, Storage storage) {
    const Problem p{0, storage, 100, batch, hidden, hidden, hidden, nullptr, false, true, false, 1};
    return gains_together({132, 227 << 10, 8}, lstm, p, false) && gains_together({132, 227 << 10, 8}, lstm, p, true);
  };
  check(together(1, 64, Storage::F32) && together(16, 512, Storage::BF16) && together(1, 512, Storage::F32),
        "two directions that leave multiprocessors idle gain in one launch");
  check(!together(1, 1024, Storage::F32), "two directions whose weights do not fit on the chip together gain nothing");
  std::printf("%d tilings, %d fit\n", tilings, fitting);
  for (int64_t n : {0, 1, 5, 64})
    for (int groups : {1, 2, 7})
      for (int i = 0; i < groups; ++i) {
        const int64_t size = split(n, groups, i + 1) - split(n, groups, i);
        check(size == n / groups || size == n / groups + 1, "split(%ld, %d) is uneven", long(n), groups);
      }
  test_ahead();
  return check_failures != 0;
}

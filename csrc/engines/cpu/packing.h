// Weights cut into panels, each member of a team a share of them.
#pragma once

#include "engines/cpu/walk.h"

namespace rnnkernels::cpu {

class Packer {
 public:
  Packer(const Walk& walk, const Walk::Member& member) : w(walk), me(member) {}

  // Panels that outlive the call have prints of what they were made of.
  struct Kept {
    Fingerprint* prints = nullptr;
    Pack pack = Pack::All;
  };

  // Weights [columns·units, depth].
  void pack(const Product& product, int blocks, const void* weights, void* packed, Kept kept) const {
    each_panel(product, blocks, [&](int64_t panel) {
      if (is_new(product, blocks, weights, panel, kept)) w.panels(product).pack(weights, product, blocks, panel, panel + 1, 0, packed);
    });
  }

  // Weights [depth, units].
  void pack_transposed(const Product& product, int blocks, const void* weights, void* packed) const {
    if (!product.depth || w.p.complete) return;
    const int64_t panels = panel_count(w.m, product, blocks);
    std::vector<const void*> rows(static_cast<size_t>(product.depth));
    for (int64_t k = 0; k < product.depth; ++k) rows[size_t(k)] = at(weights, k * product.units * w.storage_bytes);
    w.panels(product).spread(rows.data(), product, blocks, split(panels, me.members, me.id), split(panels, me.members, me.id + 1), 0,
                             product.depth, packed);
  }

  // A stage's matrix: with modules, of each panel what its product reads.
  void pack_matrix(int s, const void* weights, void* packed, void* workspace, Kept kept) const {
    const Product& product = w.products[s];
    const int blocks = w.plan_.blocks[s];
    if (product.type != WeightType::Numbers && !in_pairs(w.m, product)) return pack_narrow(s, weights, packed, workspace, kept);
    if (!w.p.units) return pack(product, blocks, weights, packed, kept);
    each_panel(product, blocks, [&](int64_t panel) {
      if (!is_new(product, blocks, weights, panel, kept)) return;
      w.storage.panels.pack(weights, product, blocks, panel, panel + 1, panel * blocks * w.m.lanes / w.p.module * w.p.module, packed);
      clear_below_blocks(s, false, panel, packed);
    });
  }

  // Zeros for what lies below the blocks of the transposed matrix in this member's panels of it, as far as a product reads them.
  void clear_below_blocks(int s, void* packed) const {
    if (!w.p.units) return;
    each_panel(w.products[s], w.plan_.blocks[s], [&](int64_t panel) { clear_below_blocks(s, true, panel, packed); });
  }

 private:
  void clear_below_blocks(int s, bool transposed, int64_t panel, void* packed) const {
    const int64_t hidden = w.p.hidden, module = w.p.module, width = w.plan_.blocks[s] * w.m.lanes;
    const auto block = [&](int64_t unit) { return std::min(unit, hidden - 1) / module; };
    const int64_t first = block(panel * width), last = block(panel * width + width - 1);
    for (int64_t k = (first + transposed) * module; k < std::min((last + transposed) * module, hidden); ++k)
      for (int64_t i = 0; i < width; ++i)
        if (transposed ? block(k) > block(panel * width + i) : block(k) < block(panel * width + i))
          std::memset(at(packed, ((panel * hidden + k) * width + i) * w.number_bytes), 0, size_t(w.number_bytes));
  }

  template <class Take>
  void each_panel(const Product& product, int blocks, const Take& take) const {
    if (!product.depth || w.p.complete) return;
    const int64_t panels = panel_count(w.m, product, blocks);
    for (int64_t panel = split(panels, me.members, me.id); panel < split(panels, me.members, me.id + 1); ++panel) take(panel);
  }

  // Whether a panel has to be made, whose print is then that of its weights.
  bool is_new(const Product& product, int blocks, const void* weights, int64_t panel, Kept kept) const {
    if (!kept.prints) return true;
    const int64_t unit = panel * blocks * w.m.lanes, units = std::min(int64_t(blocks) * w.m.lanes, product.units - unit);
    const void* stretches[kMaxVectorsPerPanel];
    for (int c = 0; c < product.columns; ++c) stretches[c] = at(weights, (c * product.units + unit) * product.depth * w.storage_bytes);
    const Fingerprint found = w.isa.fingerprint(stretches, product.columns, units * product.depth * w.storage_bytes);
    const bool known = kept.pack == Pack::Changed && kept.prints[panel] == found;
    kept.prints[panel] = found;
    return !known;
  }

  void pack_narrow(int s, const void* weights, void* packed, void* workspace, Kept kept) const {
    const int blocks = w.plan_.blocks[s];
    const int64_t bytes = panel_bytes(w.m, w.products[s], blocks);
    const Product& product = w.products[s];
    const int64_t elements = panel_elements(w.m, product, blocks);
    void* const numbers = at(workspace, w.memory.wide + me.id * w.memory.wide_bytes);
    each_panel(product, blocks, [&](int64_t panel) {
      if (!is_new(product, blocks, weights, panel, kept)) return;
      // The kernel finds a panel's place by its number, and this one is to lie first.
      w.storage.panels.pack(weights, product, blocks, panel, panel + 1, 0, at(numbers, -panel * elements * w.number_bytes));
      w.ops.narrow[int(product.type)](numbers, product.depth, int64_t(blocks) * product.columns * w.m.lanes, at(packed, panel * bytes));
    });
  }

  const Walk& w;
  const Walk::Member& me;
};

}  // namespace rnnkernels::cpu

// What a page is, and what an engine may ask of it.
//
// A page is a struct of one recurrent cell's mathematics, for one unit (or one vector of units) of one step:
//
//   struct Cell {
//     static constexpr Slot slots[] = {{"name", X | H}, …};   // the pre-activations, and which linear maps feed each; X slots come first
//     static constexpr const char* states[] = {"h", …};       // state 0 is what the cell puts out and what U multiplies
//     static constexpr int kept = …;                          // values of a step that backward needs; absent: one a slot
//     static constexpr Stage stages[] = {…};                  // absent: one stage of all slots
//     static constexpr PerUnit vectors[] = {…};               // absent: none
//     static constexpr unsigned changes[] = {…};              // absent: all; of each stage, a bit for a slot that its backward changes
//     template <int S, class V> RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V* k);
//     template <int S, class V> RNN_FN static void backward(V d1, const V* w, const V* s, const V* s1, V* k, V* d);
//   };
// Without a backward it gets that of automatic.h.
//
// A page with sums over a row's units takes more: forward(…, const V* r, V* e), backward(…, const V* r, const V* q, V* e). e: what goes
// into the sums; r: mean, variance, mean, variance … of what the stages' forward put in, all stages one after the other; q: the means of
// what backward put in at the stage after this one. There s[i > 0] in forward after the writer is the state that it wrote.
//
// A page made of others says all of the above but the functions at once: static constexpr CellInfo info.
//
// forward<S>: stage S. a: all slots' pre-activations (this stage's are set); w: per-unit vectors; s: states before the step; s1: states
// after it; k: kept values. A stage writes the kept values of its own slots; those beyond the slots are the first stage's (or
// CellInfo::keeper's) to write. The last stage writes state 0, the first (or CellInfo::writer) all others. A stage sees the states of its
// own width only.
//
// backward<S>: the stages run last to first. d1: the gradient of what the stage gave: of state 0 after the step for the last stage, of the
// next stage's operand otherwise. k arrives as kept (and as later stages left it) and leaves, slot by slot, as the gradients of the
// pre-activations. d arrives as the gradients of the states after the step (d[0] as 0: it is in d1) and leaves as the gradients of the
// states before it, less what flows through U, which the engine adds. Stages after the first read no state but 0.
//
// How what comes next fits. Coupled or absent forget gates: other slots. Peephole: vectors, `o` after the new `c` inside forward. GRU
// reset-before and projections: two stages, the second reading a kept value. SCRN, IndRNN: a stage without an H slot has no product, so no
// barrier. Clockwork: the engine shortens a stage's width to a prefix of units, as it shortens a batch to a prefix of rows. Layer norm:
// sums over a row's units between two stages, which an engine that cannot take them refuses. No page changes for another's sake.
#pragma once

#include <stdint.h>

#include "num/storage.h"

namespace rnnkernels {

// The input's product, a matrix's, or a number that the caller gives for each token, row or unit (a mask; gates made elsewhere).
// M, beside G: a mask, which has no gradient.
enum Feed : unsigned { X = 1, H = 2, G = 4, M = 8 };

struct Slot {
  const char* name = nullptr;
  unsigned feeds = 0;
};

// How many units a stage has: the hidden size, or the size of state 0 where a projection makes it smaller.
enum class Width { Hidden, Output };

constexpr int kPreviousState = -1;

struct Stage {
  int first = 0, count = 0;  // its slots
  int operand =
      kPreviousState;  // what its matrix multiplies: state 0 before the step, or the kept value of this index, from an earlier stage
  Width width = Width::Hidden;
  int sums = 0;       // values that forward hands to a sum over the row's units: the stages after it get their means and variances
  int back_sums = 0;  // likewise backward: the stage before it gets their means
};

// A vector of one learned number a unit. Its gradient is Σ da[slot] ⊙ factor over all steps and rows, which the engine takes. One: it is
// the bias of a slot that U alone feeds. Itself: it enters anywhere, and backward leaves its gradient in the slot, which nothing feeds.
// Kept: the kept value of the index `state`, beyond the slots. Fixed: it is not learned but given by the caller, and has no gradient (nor a
// slot); such vectors come last.
enum class Factor { One, OldState, NewState, Itself, Kept, Fixed };
struct PerUnit {
  const char* name = nullptr;
  int slot = 0;
  Factor factor = Factor::One;
  int state = 0;
};

constexpr int kMaxSlots = 20, kMaxStages = 4, kMaxStates = 4, kMaxVectors = 10, kMaxGiven = 12, kMaxSums = 8;

// A page's shape with its defaults filled in: what engines, bindings and tests read.
struct CellInfo {
  const char* name;
  int slots, stages, states, kept, vectors;
  Slot slot[kMaxSlots];
  Stage stage[kMaxStages];
  const char* state[kMaxStates];
  PerUnit vector[kMaxVectors];
  const char* page = "";           // as C++ names it
  int writer = 0;                  // the stage that writes the states beyond the first
  int keeper[2 * kMaxSlots] = {};  // of kept values beyond the slots, the stage that writes each

  unsigned unkept = 0;                                  // the slots, a bit each, of which forward leaves nothing for backward
  unsigned changes[kMaxStages] = {~0u, ~0u, ~0u, ~0u};  // the slots that a stage's backward may change

  RNN_FN constexpr bool in_stage(int s, int i) const { return stage[s].first <= i && i < stage[s].first + stage[s].count; }
  RNN_FN constexpr int stage_of(int i) const {
    int s = 0;
    while (!in_stage(s, i)) ++s;
    return s;
  }
  // How many of a stage's slots before `end` its matrix feeds; with the default, all of them.
  RNN_FN constexpr int hidden_slots(int s, int end = kMaxSlots) const {
    int n = 0;
    for (int i = 0; i < slots && i < end; ++i) n += in_stage(s, i) && (slot[i].feeds & H);
    return n;
  }
  RNN_FN constexpr int input_slots(int s) const {
    int n = 0;
    for (int i = 0; i < slots; ++i) n += in_stage(s, i) && (slot[i].feeds & X);
    return n;
  }
  RNN_FN constexpr int input_slots() const { return first_input_slot(stages); }
  // The input's slots come first, stage by stage.
  RNN_FN constexpr int first_input_slot(int s) const {
    int n = 0;
    for (int i = 0; i < s; ++i) n += input_slots(i);
    return n;
  }
  // Whether each slot of a stage that the input or a matrix feeds is fed by both, so that a product can add up what both give.
  RNN_FN constexpr bool fed_alike(int s) const {
    for (int i = 0; i < slots; ++i)
      if (in_stage(s, i) && !(slot[i].feeds & X) != !(slot[i].feeds & H)) return false;
    return true;
  }
  // How many slots before `end` the caller gives; with the default, all of them.
  RNN_FN constexpr int given_slots(int end = kMaxSlots) const {
    int n = 0;
    for (int i = 0; i < slots && i < end; ++i) n += (slot[i].feeds & G) != 0;
    return n;
  }
  RNN_FN constexpr bool has_matrix() const {
    for (int i = 0; i < slots; ++i)
      if (slot[i].feeds & H) return true;
    return false;
  }
  // Whether U's bias has a row for the slot: those that a projection feeds have none, and those with a norm between it and the page.
  RNN_FN constexpr bool biased(int i) const {
    bool vector_of_it = false;
    for (int v = 0; v < vectors; ++v) vector_of_it = vector_of_it || (vector[v].slot == i && vector[v].factor == Factor::One);
    return (slot[i].feeds & H) && ((slot[i].feeds & X) || vector_of_it);
  }
  // How many means and variances of the stages before `end` a token has.
  RNN_FN constexpr int moments(int end = kMaxStages) const {
    int n = 0;
    for (int s = 0; s < stages && s < end; ++s) n += 2 * stage[s].sums;
    return n;
  }
  // Whether a stage's backward finds the slot's or kept value: as forward left it, or as the stages after it did.
  RNN_FN constexpr bool arrives(int s, int i) const { return (i < kept && !(unkept >> i & 1)) || (i < slots && s + 1 < stages); }
  // The values a token has room for: a kept value becomes the gradient of the slot in its place.
  RNN_FN constexpr int room() const { return kept > slots ? kept : slots; }
  RNN_FN constexpr bool projected() const { return stage[stages - 1].width == Width::Output; }
  RNN_FN constexpr Width state_width(int i) const { return i == 0 && projected() ? Width::Output : Width::Hidden; }
  RNN_FN constexpr bool sees(int s, int i) const { return state_width(i) == stage[s].width; }
  RNN_FN constexpr int last_to_see(int i) const {
    int s = stages - 1;
    while (!sees(s, i)) --s;
    return s;
  }
  RNN_FN constexpr bool writes(int s, int i) const { return sees(s, i) && s == (i == 0 ? stages - 1 : writer); }
  RNN_FN constexpr bool keeps(int s, int i) const {
    return i < kept && !(unkept >> i & 1) && (in_stage(s, i) || (i >= slots && keeper[i] == s));
  }
  // Whether a vector's gradient is more than the sum of its slot's.
  RNN_FN constexpr bool has_factor(int v) const {
    return vector[v].factor == Factor::OldState || vector[v].factor == Factor::NewState || vector[v].factor == Factor::Kept;
  }
};

namespace detail {

template <class Cell, class = void>
struct Stages {
  static constexpr int count = 1;
  static constexpr Stage get(int) { return {0, int(sizeof(Cell::slots) / sizeof(Slot))}; }
};
template <class Cell>
struct Stages<Cell, decltype(void(Cell::stages))> {
  static constexpr int count = sizeof(Cell::stages) / sizeof(Stage);
  static constexpr Stage get(int i) { return Cell::stages[i]; }
};
template <class Cell, class = void>
struct Vectors {
  static constexpr int count = 0;
  static constexpr PerUnit get(int) { return {}; }
};
template <class Cell>
struct Vectors<Cell, decltype(void(Cell::vectors))> {
  static constexpr int count = sizeof(Cell::vectors) / sizeof(PerUnit);
  static constexpr PerUnit get(int i) { return Cell::vectors[i]; }
};

template <class Cell, class = void>
struct Kept {
  static constexpr int count = sizeof(Cell::slots) / sizeof(Slot);
};
template <class Cell>
struct Kept<Cell, decltype(void(Cell::kept))> {
  static constexpr int count = Cell::kept;
};

template <class Cell, class = void>
struct Changes {
  static constexpr unsigned get(int) { return ~0u; }
};
template <class Cell>
struct Changes<Cell, decltype(void(Cell::changes))> {
  static constexpr unsigned get(int s) { return Cell::changes[s]; }
};

template <class Cell, class = void>
struct Described {
  static constexpr CellInfo get() {
    static_assert(sizeof(Cell::slots) / sizeof(Slot) <= kMaxSlots && Stages<Cell>::count <= kMaxStages &&
                      sizeof(Cell::states) / sizeof(const char*) <= kMaxStates && Vectors<Cell>::count <= kMaxVectors,
                  "the page is larger than the contract's tables");
    CellInfo info{"",
                  int(sizeof(Cell::slots) / sizeof(Slot)),
                  Stages<Cell>::count,
                  int(sizeof(Cell::states) / sizeof(const char*)),
                  Kept<Cell>::count,
                  Vectors<Cell>::count,
                  {},
                  {},
                  {},
                  {}};
    for (int i = 0; i < info.slots; ++i) info.slot[i] = Cell::slots[i];
    for (int i = 0; i < info.stages; ++i) info.stage[i] = Stages<Cell>::get(i);
    for (int i = 0; i < info.stages; ++i) info.changes[i] = Changes<Cell>::get(i);
    for (int i = 0; i < info.states; ++i) info.state[i] = Cell::states[i];
    for (int i = 0; i < info.vectors; ++i) info.vector[i] = Vectors<Cell>::get(i);
    return info;
  }
};
template <class Cell>
struct Described<Cell, decltype(void(Cell::info))> {
  static constexpr CellInfo get() { return Cell::info; }
};

}  // namespace detail

template <class Cell>
constexpr CellInfo describe(const char* name, const char* page = "") {
  CellInfo info = detail::Described<Cell>::get();
  info.name = name;
  info.page = page;
  return info;
}

// For pages made of others: one with another vector, the last.
constexpr CellInfo with_vector(CellInfo info, PerUnit vector) {
  info.vector[info.vectors++] = vector;
  return info;
}

// And one with another slot, the last of a stage, kept and changed by it. What was at that place or after it moves one further.
constexpr CellInfo with_slot(const CellInfo& from, int stage, Slot slot) {
  CellInfo info = from;
  const int at = from.stage[stage].first + from.stage[stage].count;
  const unsigned below = (1u << at) - 1;
  for (int i = at; i < from.slots; ++i) info.slot[i + 1] = from.slot[i];
  info.slot[at] = slot;
  ++info.slots;
  for (int s = 0; s < info.stages; ++s) {
    if (s > stage) ++info.stage[s].first;
    if (from.stage[s].operand >= at) ++info.stage[s].operand;
    if (from.changes[s] != ~0u) info.changes[s] = (from.changes[s] & below) | (from.changes[s] & ~below) << 1 | unsigned(s == stage) << at;
  }
  ++info.stage[stage].count;
  info.unkept = (from.unkept & below) | (from.unkept & ~below) << 1;
  for (int i = from.kept; i < at; ++i) info.unkept |= 1u << i;
  info.kept = (from.kept > at ? from.kept : at) + 1;
  for (int i = at; i < from.kept; ++i) info.keeper[i + 1] = from.keeper[i];
  for (int i = 0; i < info.vectors; ++i) {
    if (from.vector[i].slot >= at) ++info.vector[i].slot;
    if (from.vector[i].factor == Factor::Kept && from.vector[i].state >= at) ++info.vector[i].state;
  }
  return info;
}

// A page's description as a compile-time constant, for templates over it.
template <class Cell>
struct InfoOf {
  static constexpr CellInfo value = describe<Cell>("");
  static_assert(value.slots <= kMaxSlots && value.vectors <= kMaxVectors, "the page is larger than the contract's tables");
  static constexpr bool slots_in_stages() {
    for (int i = 0; i < value.slots; ++i) {
      int stages = 0;
      for (int s = 0; s < value.stages; ++s) stages += value.in_stage(s, i);
      if (stages != 1) return false;
    }
    return true;
  }
  static_assert(slots_in_stages(), "every slot is in one stage");
  static_assert(value.kept <= 2 * kMaxSlots, "the page keeps too many values");
  static_assert(value.given_slots() <= kMaxGiven, "the page is given too many slots");
  static constexpr bool sums_fit() {
    for (int s = 0; s < value.stages; ++s)
      if (value.stage[s].sums > kMaxSums || value.stage[s].back_sums > kMaxSums) return false;
    return true;
  }
  static_assert(sums_fit(), "a stage puts too many values into sums over a row");
  static constexpr bool inputs_first() {
    for (int i = 1; i < value.slots; ++i)
      if ((value.slot[i].feeds & X) && !(value.slot[i - 1].feeds & X)) return false;
    return true;
  }
  static_assert(inputs_first(), "the slots that the input feeds come first");
  static constexpr bool vectors_have_slots() {
    for (int i = 0; i < value.vectors; ++i) {
      if (value.vector[i].slot < 0 || value.vector[i].slot >= value.slots) return false;
      if (value.vector[i].factor == Factor::Kept ? value.vector[i].state < value.slots || value.vector[i].state >= value.kept
                                                 : value.vector[i].state >= value.states)
        return false;
      const unsigned feeds = value.slot[value.vector[i].slot].feeds;
      if (value.vector[i].factor == Factor::Itself ? feeds != 0 : value.vector[i].factor == Factor::One && feeds != H) return false;
    }
    return true;
  }
  static constexpr bool fixed_come_last() {
    for (int i = 1; i < value.vectors; ++i)
      if (value.vector[i - 1].factor == Factor::Fixed && value.vector[i].factor != Factor::Fixed) return false;
    return true;
  }
  static_assert(fixed_come_last(), "the vectors that nothing learns come last");
  static_assert(vectors_have_slots(), "a vector's slot is there, fed by U alone for Factor::One, by nothing for Factor::Itself");
  static constexpr bool operands_survive() {
    for (int s = 0; s < value.stages; ++s)
      if (value.stage[s].operand != kPreviousState && value.stage[s].operand < value.slots) return false;
    return true;
  }
  static_assert(operands_survive(), "a stage's operand must be kept beyond the slots, where no gradient is written over it");
};

}  // namespace rnnkernels

// The seam between the walk over time, compiled once for the baseline, and the kernels, compiled once for each instruction set: tables of
// functions over untyped memory. Numbers are float or double as the storage type asks; pointers that step from row to row come with their
// stride in elements.
#pragma once

#include "cells/list.h"
#include "core/ahead.h"
#include "core/plan.h"
#include "core/step.h"

namespace rnnkernels::cpu {

constexpr int kSumsOf32Registers = 24;  // accumulators of a tile; the others are the panel's and the rows'

// The rows of a tile: first, first + stride, … of the batch or, where rows end in any order, of the longest first. Threads that share a
// batch take turns row by row, so that a ragged batch stays balanced. Pages get it by reference: a copy on the stack, read in one piece
// just after it was written in several, would wait for all stores before it, those of the page before among them.
struct RowSet {
  int64_t first;
  int count, stride;
  const int64_t* order = nullptr;
  int64_t operator[](int i) const {
    const int64_t place = first + int64_t(i) * stride;
    return order ? order[place] : place;
  }
};

// What is added to a tile's sums in the end, null for nothing, and where they go: a row's vectors side by side, so many numbers from one
// row to the next.
struct Sums {
  const void* also;
  int64_t also_row;
  void* to;
  int64_t to_row;
};
constexpr int kTileBytes = kMaxVectorsPerPanel * kMaxTileRows * 64;

// Kernels for each tile: to[row][vector][lane] = also[row][vector][lane] + Σ_k rows[row][k] panel[k][vector][lane]. By vectors, chains of
// kWordsInAChain words are added up and `also` to them; by matrices, the sums of sixteen words each are added to `also`. `to` must not
// overlap what is read, but may be `also` where there is one chain. Null soon: it asks for nothing.
struct Tiles {
  using Tile = void (*)(const void* const* rows, const void* panel, int64_t depth, const Sums& sums, const Soon* soon);
  Tile tile[kMaxVectorsPerPanel][kMaxTileRows];
};

struct NumberOps {
  int lanes, registers;
  Tiles products[kWeightTypes];  // by what the panel is made of
  // A panel of numbers [depth][width] made narrower.
  void (*narrow[kWeightTypes])(const void* numbers, int64_t depth, int64_t width, void* packed);
  void (*add)(const void* from, int64_t n, void* to);
  void (*multiply_add)(const void* a, const void* b, int64_t n, void* to);  // to += a b
  // A tile's sums into rows of numbers, or onto what is there.
  void (*merge)(const void* sums, void* const* rows, int count, int64_t unit, int blocks, int64_t width, bool onto);
};

// How matrices come to lie as operands.
struct PanelOps {
  // Panels [begin, end) of weights [columns·units, depth], of each row what comes from column `first` on.
  void (*pack)(const void* weights, const Product&, int blocks, int64_t begin, int64_t end, int64_t first, void* packed);
  // Rows [first, last) of panels [begin, end) of a matrix [depth, units] given by the addresses of its rows, null for zeros.
  void (*spread)(const void* const* rows, const Product&, int blocks, int64_t begin, int64_t end, int64_t first, int64_t last,
                 void* packed);
  // Rows become columns: turned[column][k] = rows[k][first + column].
  void (*turn)(const void* const* rows, int64_t first, int64_t width, int64_t count, void* turned, int64_t turned_row);
};

// Where the processor multiplies bfloat16 two at once, rows and panels are of pairs along the depth, which these have halved.
struct PairOps {
  Tiles products;
  // Where a processor has registers that a thread must take before products and give back after them; or null.
  void (*start)();
  void (*finish)();
  PanelOps panels;
  // A row of numbers rounded; the last one of an odd number has zero beside it.
  void (*narrow)(const void* numbers, int64_t n, void* pairs);
};

struct StorageOps {
  PanelOps panels;
  // to[token][unit…] = sums, for the tokens of a tile.
  void (*put)(const void* sums, const int64_t* tokens, int count, int64_t unit, int blocks, int64_t width, void* to);
  void (*load)(const void* storage, int64_t n, void* numbers);
  void (*add)(const void* storage, int64_t n, void* numbers);
  void (*store)(const void* numbers, int64_t n, void* storage);
};

struct PageOps {
  // The pointwise part of a stage for a tile of rows and `blocks` vectors of units from `unit` on, as far as `end`; null sums are zero.
  // Forward's input gates are in the step or, with the bias, sums of a tile too, to which the recurrent ones are added where
  // both feed a stage's slots alike.
  using Forward = void (*)(const ForwardStep&, const RowSet&, int64_t unit, int64_t end, int blocks, const void* input, const void* sums);
  using Backward = void (*)(const BackwardStep&, const RowSet&, int64_t unit, int64_t end, int blocks, const void* sums);
  Forward forward[kMaxStages];
  Backward backward[kMaxStages];
};

// A cell as the engine runs it: its shape, and its page compiled for each storage type.
struct Page {
  CellInfo cell;
  PageOps ops[kStorages];
};

struct Isa {
  const char* name;
  const char* pages;  // the instruction set whose pages it runs
  // Of `count` stretches of memory, each of so many bytes, one after the other.
  Fingerprint (*fingerprint)(const void* const* stretches, int count, int64_t bytes);
  NumberOps number[2];  // float, double
  StorageOps storage[kStorages];
  Page page[kCellCount];
  const PairOps* pairs;  // or null
};

// What an instruction set that knows bfloat16 has of its own; everything else is that of another one.
struct Bfloat16 {
  PairOps pairs;
  StorageOps storage;
  PageOps page[kCellCount];
};

// What one has of its own that multiplies pairs a tile of sixteen rows at a time.
struct MatrixTiles {
  Tiles products;
  void (*start)();
  void (*finish)();
};

extern const Isa isa_scalar;
#if RNNKERNELS_X86
extern const Isa isa_avx2;
extern const Isa isa_avx512;
extern const Bfloat16 bfloat16_avx512;
extern const MatrixTiles tiles_amx;
#endif

}  // namespace rnnkernels::cpu

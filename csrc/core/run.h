// What an engine is asked to do, as plain data. Shapes stand beside the pointers; the caller owns and has checked everything.
#pragma once

#include <stdint.h>

#include "cells/contract.h"

namespace rnnkernels {

enum class Storage { F32, F64, BF16, F16 };
constexpr int kStorages = 4;
constexpr int64_t kStorageBytes[] = {4, 8, 2, 2};
constexpr int64_t kNumberBytes[] = {4, 8, 4, 4};  // half types are computed with in float

// How a CUDA engine multiplies float32: exactly, with tensor cores by three products of halved numbers, or by one (10 bits of each).
enum class Products { Exact, ThreeTf32, Tf32 };

// How a CPU engine holds the matrices of the recurrence while it walks: as the numbers it computes with or, for inference, as bfloat16, or
// as int8 with a factor for each result.
enum class WeightType { Numbers, BF16, Int8 };
constexpr int kWeightTypes = 3;

// T steps of up to B rows. Tokens lie step by step: row b of step t is token offset(t) + b.
struct Problem {
  int cell;  // index into cells.def
  Storage storage;
  int64_t steps, batch;    // T, B
  int64_t input;           // I
  int64_t hidden, output;  // H, and the size P of state 0 (P = H without a projection)
  const int64_t* rows;     // [T], non-increasing: how many rows take part in each step; null: all, always
  bool reverse;            // run from the last step to the first
  bool training;           // keep what backward needs
  bool complete;           // the gates arrive with both products already in them (one step only): the engine multiplies nothing
  int threads;             // at most so many
  Products products = Products::Exact;
  // What happens inside a padded batch. Tokens past a row's length have outputs and gradients of zero.
  const int64_t* lengths = nullptr;  // [B]: how many steps each row has, in any order; null: all of them
  const uint8_t* resets = nullptr;   // [T, B]: whether the state between the step before and this one is replaced, that of step 0 ignored
  // Only the units below units[t] take part in step t, the others keep their state; and a unit's matrix row starts at its block of so many
  // units. For cells with one slot.
  const int64_t* units = nullptr;  // [T]
  int64_t module = 0;
  WeightType weight_type = WeightType::Numbers;
  bool keeps_packed = false;  // packed weights lie in memory of the caller's, who may have them from call to call
  bool chained = false;       // a layer of a stack whose layers run at the same time, each a few steps behind the one below
  int least = 1;              // threads, where there are as many
  int row_groups = 0;         // of threads, each with its share of the batch, where that can be; 0: as many as seem the quickest
};

// Where a slot's given numbers lie: [H] each, so many elements from a token and from a row to the next; 0: the same for all of them.
struct Given {
  const void* data;
  int64_t token, row;
};

// What becomes of packed weights that are kept: they are as they must be; all are packed; all are, and it is noted of which weights; those
// panels are whose weights are not what was noted.
enum class Pack { Never, All, Noted, Changed };

// N = number of tokens, G = room() of the cell; storage type unless said otherwise.
struct Forward {
  Problem problem;
  const void* input;      // [N, I]; not for a complete run
  const void* weight_ih;  // [X slots · H, I]
  const void* bias_ih;    // [X slots · H], or null for zero
  const void* bias_hh;    // [biased() slots · H], or null; added where the slot has X too, the others have vectors
  void* gates;            // [N, gates_row]: a complete run's pre-activations, slot i at i·H; for training the kept values come to lie here,
  int64_t gates_row;      // and gates_row is G·H; null for inference that is not complete
  const void* weights[kMaxStages];   // of each stage with a matrix: [its H slots · its width, its operand's width]
  const void* vectors[kMaxVectors];  // [H], or null for zero
  const void* initial[kMaxStates];   // [B, width], or null for zero
  Given given[kMaxGiven];
  Given reset[kMaxStates];    // by the token that is marked; null for zero
  void* final[kMaxStates];    // [B, width], each null for nothing
  void* output;               // [N, P]: state 0 after each step; null for nothing, where all units take part
  void* history[kMaxStates];  // [N, H]: the other states after each step, or null for inference
  void* moments;              // numbers, [N, moments()]: of the sums over a row's units, or null for inference
  void* workspace;            // workspace_bytes() of it
  void* packed;               // where the problem keeps packed weights, packed_bytes() for them
  Pack pack;                  // and what becomes of these
};

struct Backward {
  Problem problem;
  const void* kept;  // as forward left it
  void* grad_gates;  // [N, G·H]: gradient of slot i at i·H; may be the same memory as kept
  const void* weights[kMaxStages];
  const void* vectors[kMaxVectors];
  const void* initial[kMaxStates];
  const void* output;
  const void* history[kMaxStates];
  const void* moments;
  const void* grad_states[kMaxStates];  // [N, width]: of each state after each step, the output's first; each null for zero
  const void* grad_final[kMaxStates];   // [B, width], or null for zero
  void* grad_initial[kMaxStates];       // [B, width], or null where nobody asks; of a complete run without U's part
  Given reset[kMaxStates];
  void* grad_reset[kMaxStates];  // [marks in resets, width], in the order of their tokens; a mark without effect is passed by; or null
  // Sums over all tokens, each null where nobody asks; a complete run leaves them to its caller.
  const void* input;               // [N, I]
  const void* weight_ih;           // [X slots · H, I]
  void* grad_input;                // [N, I]
  void* grad_weight_ih;            // [X slots · H, I]
  void* grad_weights[kMaxStages];  // as weights
  void* grad_bias_ih;              // [X slots · H]
  void* grad_bias_hh;              // [biased() slots · H]
  void* grad_vectors[kMaxVectors];
  void* workspace;
};

}  // namespace rnnkernels

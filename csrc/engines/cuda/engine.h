// The CUDA engines. Stepwise: a library's product and one launch of a page a step, always possible. Persistent: the whole sequence in one
// launch, its weights on the chip, where they fit.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "core/step.h"
#include "core/tiling.h"

namespace rnnkernels::cuda {

struct PersistentForward;
struct PersistentBackward;

struct CudaError : std::runtime_error {
  CudaError(const char* what, const char* why) : std::runtime_error(std::string("CUDA: ") + what + ": " + why) {}
};

struct StepKernels {
  void (*forward[kMaxStages])(const ForwardStep&, int64_t rows, const void* sums, void* stream);
  void (*backward[kMaxStages])(const BackwardStep&, int64_t rows, int64_t summed_rows, const void* sums, void* stream);
};

struct PersistentKernels {
  void (*forward)(const PersistentForward&, void* stream);
  void (*backward)(const PersistentBackward&, void* stream);
  int (*residents)(bool backward, const Tiling&, int multiprocessors);
};

struct CellKernels {
  PersistentKernels persistent[kStorages];  // null where there is none
  PersistentKernels tf32;                   // float32 by tensor cores
  StepKernels step[kStorages];
};

// The kernels of a cell that was loaded; they live to the end of the program.
void add_kernels(int cell, const CellKernels*);

// A device as the persistent engine sees it.
Device device(int index);

// Empty if the persistent engine can run it on the device, otherwise the reason why not.
std::string fits(const Problem&, bool backward, int device);
// Whether two such sequences that do not depend on each other should be one launch.
bool gains_together(const Problem&, bool backward, int device);
// For each of so many sequences of one launch.
int64_t workspace_bytes(const Problem&, bool backward, int device, int sequences);

// One launch for up to kSequences calls whose problems differ in their direction alone. Pointers are the device's; offsets [T + 1] say
// where each step's tokens start; a call's workspace holds workspace_bytes(). On the stream given, of the device given. The input's product
// is in f.gates already; sums over tokens are left to the caller.
void forward(const std::vector<const Forward*>&, const int64_t* offsets, int device, void* stream);
void backward(const std::vector<const Backward*>&, const int64_t* offsets, int device, void* stream);

// Stage s of one step for `rows` rows; sums: [rows][H slots · width] in storage type, null for zero; backward has them for summed_rows
// rows.
void forward_step(const Problem&, int stage, const ForwardStep&, int64_t rows, const void* sums, int device, void* stream);
void backward_step(const Problem&, int stage, const BackwardStep&, int64_t rows, int64_t summed_rows, const void* sums, int device,
                   void* stream);

}  // namespace rnnkernels::cuda

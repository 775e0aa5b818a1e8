// A stack of layers kept ready to take one step at a time: weights packed once, states inside, a step of all layers by one team.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <vector>

#include "engines/cpu/prepared.h"

namespace rnnkernels::cpu {

// It keeps the instruction set and the number of threads that it was made with. Calls from several threads wait for each other: a team that
// another one joined would wait for ever.
class Stream {
 public:
  // The layers, the first one first: one step of the same batch each, for inference, each as wide as the next one's input.
  explicit Stream(const std::vector<Problem>& layers);

  int64_t bytes() const { return bytes_; }

  // Once, before all else: bytes() of memory that outlives this.
  void place(void* workspace);
  // Of what is given it takes a layer's weights, biases and vectors, none of which is read again, and its given numbers, which are.
  void pack(size_t layer, const Forward& given);
  // States [layers, B, width] each, null for zero; of the rows given.
  void load(const void* const* states, const std::vector<int64_t>& rows);
  void store(void* const* states);
  // x [B, I] of the first layer, y [B, P] of the last.
  void step(const void* x, void* y);

 private:
  struct Layer {
    Layer(const Forward& forward, const Page& page) : f(forward), run(f, page) {}
    Forward f;
    Prepared run;
    int64_t workspace = 0, vectors = 0, output = 0;  // from the whole workspace's start: its own, copies of its vectors, its output
    std::vector<InputGates::Chunk> chunks;           // one a member
  };

  int call();  // how many threads this step is worth
  void start(int members);

  int threads_ = 1;
  bool worth_waking_ = false;
  std::chrono::steady_clock::time_point last_;
  std::vector<std::unique_ptr<Layer>> layers_;
  int64_t bytes_ = 0, side_ = 0;
  Barrier team_;
  std::mutex mutex_;
};

}  // namespace rnnkernels::cpu

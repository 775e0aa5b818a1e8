#include "engines/cpu/stream.h"

#include <iterator>

#include "engines/cpu/engine.h"

namespace rnnkernels::cpu {

namespace {

// What a team must save of a step to be called for it. While its threads still spin from the step before, that is more than a fork: one
// that must first wait for its core costs many steps' gain. Once they sleep, it is a waking, which takes as long as the machine's other
// work pleases.
constexpr double kSpinningNs = 5e3, kSleepingNs = 100e3;
// Threads spin for longer than this.
constexpr auto kAwake = std::chrono::milliseconds(1);

// What a step of a schedule takes once its weights are packed.
double step_ns(const Machine& m, const CellInfo& cell, const Problem& p, const Schedule& s) {
  const int64_t rows = ceil_div(p.batch, s.row_groups);
  double ns = 0;
  for (int stage = 0; stage < cell.stages; ++stage) {
    ns += product_ns(m, forward_product(cell, p, stage), s.blocks[stage], rows, s.unit_groups);
    ns += product_ns(m, input_product(cell, p, stage), s.input_blocks[stage], rows, s.unit_groups);
    if (s.unit_groups > 1) ns += m.barrier_ns;
  }
  return ns;
}

}  // namespace

Stream::Stream(const std::vector<Problem>& layers) {
  // One number of threads for the stack: the layers wait for each other in any case.
  double alone = 0, shared = 0;
  for (Problem p : layers) {
    const CellInfo& cell = page_of(p).cell;
    const Machine m = machine(current(), p);
    const Schedule team = plan(m, cell, p, false);
    threads_ = std::max(threads_, team.threads());
    shared += step_ns(m, cell, p, team) + m.barrier_ns;
    p.threads = 1;
    alone += step_ns(m, cell, p, plan(m, cell, p, false));
  }
  if (alone - shared < kSpinningNs) threads_ = 1;
  worth_waking_ = alone - shared > kSleepingNs;
  Layout all;
  for (Problem p : layers) {
    if (threads_ == 1) p.threads = 1;
    Forward f{};
    f.problem = p;
    layers_.push_back(std::make_unique<Layer>(f, page_of(p)));
    Layer& layer = *layers_.back();
    const Walk& w = layer.run.w;
    layer.chunks.resize(size_t(w.plan_.threads()));
    layer.workspace = all.take(w.memory.bytes);
    layer.vectors = all.take(w.cell.vectors * p.hidden * w.storage_bytes);
    layer.output = all.take(p.batch * p.output * w.storage_bytes);
  }
  bytes_ = all.bytes;
}

void Stream::place(void* workspace) {
  const void* below = nullptr;
  for (const auto& layer : layers_) {
    Forward& f = layer->f;
    f.workspace = at(workspace, layer->workspace);
    f.input = below;
    below = f.output = at(workspace, layer->output);
    for (int i = 0; i < layer->run.w.cell.vectors; ++i)
      f.vectors[i] = at(workspace, layer->vectors + i * f.problem.hidden * layer->run.w.storage_bytes);
  }
}

void Stream::pack(size_t index, const Forward& given) {
  const std::lock_guard lock(mutex_);
  Layer& layer = *layers_.at(index);
  Forward& f = layer.f;
  const Walk& w = layer.run.w;
  f.weight_ih = given.weight_ih;
  f.bias_ih = given.bias_ih;
  f.bias_hh = given.bias_hh;
  std::copy(std::begin(given.weights), std::end(given.weights), f.weights);
  std::copy(std::begin(given.given), std::end(given.given), f.given);
  for (int i = 0; i < w.cell.vectors; ++i) {
    const size_t bytes = size_t(w.p.hidden * w.storage_bytes);
    void* const copy = const_cast<void*>(f.vectors[i]);
    if (given.vectors[i])
      std::memcpy(copy, given.vectors[i], bytes);
    else
      std::memset(copy, 0, bytes);
  }
  run_team(w.plan_.threads(), [&](int id, int members) { layer.run.pack(w.member(id, members)); });
}

void Stream::load(const void* const* states, const std::vector<int64_t>& rows) {
  const std::lock_guard lock(mutex_);
  for (size_t l = 0; l < layers_.size(); ++l) {
    const Walk& w = layers_[l]->run.w;
    const void* of_layer[kMaxStates] = {};
    for (int i = 0; i < w.cell.states; ++i) of_layer[i] = at(states[i], int64_t(l) * w.p.batch * w.width(i) * w.storage_bytes);
    for (int64_t row : rows) layers_[l]->run.load(of_layer, row);
  }
}

void Stream::store(void* const* states) {
  const std::lock_guard lock(mutex_);
  for (size_t l = 0; l < layers_.size(); ++l) {
    const Walk& w = layers_[l]->run.w;
    void* of_layer[kMaxStates] = {};
    for (int i = 0; i < w.cell.states; ++i) of_layer[i] = at(states[i], int64_t(l) * w.p.batch * w.width(i) * w.storage_bytes);
    for (int64_t row = 0; row < w.p.batch; ++row) layers_[l]->run.store(of_layer, row, side_);
  }
}

int Stream::call() {
  if (threads_ == 1 || worth_waking_) return threads_;
  const auto before = last_;
  last_ = std::chrono::steady_clock::now();
  return last_ - before < kAwake ? threads_ : 1;
}

void Stream::start(int members) {
  team_.start(members);
  for (const auto& layer : layers_) {
    Walk& w = layer->run.w;
    w.start(w.member(0, std::min(members, w.plan_.threads())));
  }
}

void Stream::step(const void* x, void* y) {
  const std::lock_guard lock(mutex_);
  layers_.front()->f.input = x;
  layers_.back()->f.output = y;
  const int called = call();
  // Before the fork, so that nobody need meet; should fewer come than were called, once more among these.
  start(called);
  run_team(called, [&](int id, int members) {
    if (members != called) {
      if (id == 0) start(members);
      meet(members);
    }
    const Walk& first = layers_.front()->run.w;
    const Registers registers(first.m.pairs ? first.isa.pairs : nullptr);
    uint32_t round = 0;
    for (const auto& layer : layers_) {
      if (layer != layers_.front()) team_.wait(round);
      const Walk& w = layer->run.w;
      const int sharing = std::min(members, w.plan_.threads());
      if (id >= sharing) continue;
      Walk::Member me = w.member(id, sharing);
      layer->run.step(me, 0, side_, layer->chunks[size_t(id)]);
    }
  });
  side_ = 1 - side_;
}

}  // namespace rnnkernels::cpu

// A GPU's grid on the host: every thread of every block is a fiber, and which one runs next is drawn at random, at each barrier and at each
// look at another block's memory. Tensor cores are computed lane by lane as the PTX manual lays their fragments out.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "engines/cuda/persistent.h"
#include "test/check.h"

namespace rnnkernels {

class Grid {
 public:
  // What a thread did that another may notice. A sync is that of its block.
  struct Event {
    enum Kind { Load, Store, Sync } kind;
    const void* address;
    uint32_t epoch;
  };

  Grid(const Tiling& t, unsigned seed) : tiling_(t), random_(seed) {
    for (int b = 0; b < t.blocks(); ++b) {
      shared_.emplace_back(static_cast<size_t>(t.shared_bytes) + 16, char(0xff));  // NaN wherever nobody wrote
      block_barriers_.emplace_back();
    }
    tile_barriers_.resize(size_t(t.sequences * t.row_tiles));
    warps_.resize(shared_.size() * kWarps);
  }

  struct Cta {
    Grid* grid;
    int block_, thread_;
    int block() const { return block_; }
    int thread() const { return thread_; }
    char* shared() const { return grid->shared(block_); }
    void sync() const {
      grid->note(*this, {Event::Sync, nullptr, 0});
      grid->sync(grid->block_barriers_[size_t(block_)], kThreads, *this);
    }
    void sync_cluster() const {
      const int cluster = grid->tiling_.unit_ctas;
      grid->sync(grid->tile_barriers_[size_t(block_ / cluster)], kThreads * cluster, *this);
    }
    cuda::Packet load(const cuda::Packet* p) const {
      grid->sometimes_yield(*this);
      grid->note(*this, {Event::Load, p, p->epoch});
      return *p;
    }
    void store(cuda::Packet* p, const cuda::Packet& x) const {
      grid->note(*this, {Event::Store, p, x.epoch});
      *p = x;
      ++grid->progress_;
      grid->sometimes_yield(*this);
    }
    cuda::Packet load_near(const cuda::Packet* p) const {
      check(grid->owns(block_, p), "a load from outside the block's shared memory");
      return load(p);
    }
    void store_near(int peer, cuda::Packet* p, const cuda::Packet& x) const {
      check(grid->owns(block_, p), "an address outside the block's shared memory");
      const int64_t offset = reinterpret_cast<char*>(p) - shared();
      const int cluster = grid->tiling_.unit_ctas;
      store(reinterpret_cast<cuda::Packet*>(grid->shared(block_ / cluster * cluster + peer) + offset), x);
    }
    template <cuda::Fragment kind>
    void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) const {
      grid->mma<kind>(*this, d, a, b);
    }
    void waiting(uint32_t) const { grid->yield(*this); }
  };

  // False when the threads wait for each other for ever.
  bool run(const std::function<void(Cta&)>& kernel) {
    const size_t count = shared_.size() * kThreads;
    fibers_ = std::vector<Fiber>(count);
    for (size_t i = 0; i < count; ++i) {
      Fiber& f = fibers_[i];
      f.stack.reset(new char[kStack]);
      f.body = [this, i, &kernel] {
        Cta cta{this, int(i) / kThreads, int(i) % kThreads};
        kernel(cta);
      };
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = &main_;
      const auto address = reinterpret_cast<uintptr_t>(&f);
      makecontext(&f.context, reinterpret_cast<void (*)()>(&Grid::enter), 2, unsigned(address >> 32), unsigned(address));
    }
    std::vector<size_t> ready(count);
    for (size_t i = 0; i < count; ++i) ready[i] = i;
    uint64_t seen = progress_, idle = 0;
    while (!ready.empty()) {
      // Blocks run in bursts, so that some lag far behind others.
      const size_t start = random_() % ready.size(), burst = 1 + random_() % 64;
      bool ran = false;
      for (size_t j = 0; j < burst && !ready.empty(); ++j) {
        const size_t at = (start + j) % ready.size();
        Fiber& f = fibers_[ready[at]];
        if (f.blocked) continue;
        ran = true;
        swapcontext(&main_, &f.context);
        if (f.done) {
          ready[at] = ready.back();
          ready.pop_back();
          ++progress_;
        }
      }
      idle = progress_ == seen ? idle + 1 : 0;
      seen = progress_;
      if (idle > 200000 + (ran ? 0 : 1)) return false;
    }
    return true;
  }

  // Each thread's events in its order, kept from here on.
  void record() { events_.resize(shared_.size() * kThreads); }
  const std::vector<std::vector<Event>>& events() const { return events_; }

 private:
  static constexpr size_t kStack = 64 << 10;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    std::function<void()> body;
    bool done = false, blocked = false;
  };

  static void enter(unsigned high, unsigned low) {
    Fiber* f = reinterpret_cast<Fiber*>(uintptr_t(high) << 32 | low);
    f->body();
    f->done = true;
  }
  struct Barrier {
    int arrived = 0;
    std::vector<Fiber*> waiting;
  };
  struct Warp {
    Barrier barrier;
    uint32_t a[32][4], b[32][2];
    float sum[32][4];
  };

  char* shared(int block) {
    char* p = shared_[size_t(block)].data();
    return p + (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16;
  }
  bool owns(int block, const cuda::Packet* p) {
    const int64_t offset = reinterpret_cast<const char*>(p) - shared(block);
    return offset >= 0 && offset + kPacketBytes <= tiling_.shared_bytes;
  }
  Fiber& fiber(const Cta& cta) { return fibers_[size_t(cta.block_) * kThreads + size_t(cta.thread_)]; }
  void note(const Cta& cta, Event event) {
    if (!events_.empty()) events_[size_t(cta.block_) * kThreads + size_t(cta.thread_)].push_back(event);
  }
  void yield(const Cta& cta) { swapcontext(&fiber(cta).context, &main_); }
  void sometimes_yield(const Cta& cta) {
    if (random_() % 8 == 0) yield(cta);
  }
  // last(): what the one that comes last does before the others go on.
  template <class Last>
  void sync(Barrier& barrier, int all, const Cta& cta, const Last& last) {
    if (++barrier.arrived < all) {
      fiber(cta).blocked = true;
      barrier.waiting.push_back(&fiber(cta));
      yield(cta);
      return;
    }
    last();
    for (Fiber* f : barrier.waiting) f->blocked = false;
    barrier = {};
    ++progress_;
  }
  void sync(Barrier& barrier, int all, const Cta& cta) {
    sync(barrier, all, cta, [] {});
  }

  // mma.m16n8k16 and mma.m16n8k8, by the manual's tables of which lane holds what.
  template <cuda::Fragment kind>
  void mma(const Cta& cta, float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
    Warp& warp = warps_[size_t(cta.block_) * kWarps + size_t(cta.thread_ / 32)];
    const int lane = cta.thread_ % 32;
    std::copy_n(a, 4, warp.a[lane]);
    std::copy_n(b, 2, warp.b[lane]);
    sync(warp.barrier, 32, cta, [&warp] {
      constexpr bool half = kind != cuda::Fragment::Tf32;
      float A[16][16], B[16][8];
      const auto number = [](uint32_t word, int i) {
        if constexpr (kind == cuda::Fragment::Bf16) return widen(bf16{uint16_t(word >> (16 * i))});
        if constexpr (kind == cuda::Fragment::F16) return widen(f16{uint16_t(word >> (16 * i))});
        return float_of_bits(word & ~0x1fffu);  // the unit does not look at the last 13 bits
      };
      for (int l = 0; l < 32; ++l) {
        const int row = l / 4, in_group = l % 4;
        for (int e = 0; e < 4; ++e)
          for (int i = 0; i < (half ? 2 : 1); ++i)
            A[row + (e & 1 ? 8 : 0)][half ? in_group * 2 + i + (e & 2 ? 8 : 0) : in_group + (e & 2 ? 4 : 0)] = number(warp.a[l][e], i);
        for (int e = 0; e < 2; ++e)
          for (int i = 0; i < (half ? 2 : 1); ++i) B[half ? in_group * 2 + i + 8 * e : in_group + 4 * e][row] = number(warp.b[l][e], i);
      }
      for (int l = 0; l < 32; ++l)
        for (int e = 0; e < 4; ++e) {
          warp.sum[l][e] = 0;
          for (int k = 0; k < (half ? 16 : 8); ++k) warp.sum[l][e] += A[l / 4 + (e & 2 ? 8 : 0)][k] * B[k][l % 4 * 2 + (e & 1)];
        }
    });
    for (int e = 0; e < 4; ++e) d[e] += warp.sum[lane][e];
  }

  const Tiling tiling_;
  std::mt19937 random_;
  std::vector<std::vector<char>> shared_;
  std::vector<Barrier> block_barriers_, tile_barriers_;
  std::vector<Warp> warps_;
  std::vector<Fiber> fibers_;
  std::vector<std::vector<Event>> events_;
  ucontext_t main_;
  uint64_t progress_ = 0;
};

// The workspace as the engine hands it to a kernel.
template <class Arithmetic, class S>
std::vector<uint64_t> workspace_of(const CellInfo& cell, const Problem& p, const Tiling& t, const void* const* weights, bool backward) {
  std::vector<uint64_t> workspace(size_t(t.workspace_bytes / 8 + 2), ~uint64_t(0));
  std::fill_n(workspace.begin(), t.packet_count * kPacketBytes / 8, 0);
  for (int s = 0; s < cell.stages; ++s) {
    const cuda::Matrix matrix = cuda::matrix_of(cell, p, weights, backward, s);
    if (!matrix.weights) continue;
    for (int block = 0; block < t.unit_ctas; ++block)
      for (int i = 0; i < t.stage[s].items(); ++i)
        for (int w = 0; w < Arithmetic::shape.item_words; ++w)
          for (int thread = 0; thread < kThreads; ++thread) {
            const cuda::Word word = cuda::pack<Arithmetic, S>(t, s, matrix, block, i, w, thread);
            std::memcpy(cuda::packed_item<Arithmetic>(t, s, static_cast<void*>(workspace.data()), block, i) + w * kThreads + thread, &word,
                        sizeof word);
          }
  }
  return workspace;
}

}  // namespace rnnkernels

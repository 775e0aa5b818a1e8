// Threads that walk through a sequence together: torch's own OpenMP threads, and a barrier cheaper than OpenMP's.
#pragma once

#include <linux/futex.h>
#include <omp.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

namespace rnnkernels::cpu {

inline void pause_thread() {
#if RNNKERNELS_X86
  __builtin_ia32_pause();
#endif
}

// A counter that every member bumps and watches. It spins while the others are about to arrive and sleeps when they are not: on a machine
// with more threads than cores the one that is waited for may need this very core.
class alignas(128) Barrier {
 public:
  void start(int members) {
    members_ = uint32_t(members);
    arrived_.store(0, std::memory_order_relaxed);
  }

  // `round` is the member's own count of its waits, from 0. Counts wrap around, so only differences mean something.
  void wait(uint32_t& round) {
    if (members_ == 1) return;
    const uint32_t full = ++round * members_;
    if (arrived_.fetch_add(1) + 1 == full) {
      // In one order with the sleeper's own two steps: either it sees the full count or it is seen here.
      if (sleepers_.load()) futex(FUTEX_WAKE_PRIVATE, members_);
      return;
    }
    for (int spins = 0; missing(arrived_.load(std::memory_order_acquire), full); ++spins) {
      if (spins < 2000) {
        pause_thread();
        continue;
      }
      sleepers_.fetch_add(1);
      for (uint32_t seen; missing(seen = arrived_.load(), full);) futex(FUTEX_WAIT_PRIVATE, seen);
      sleepers_.fetch_sub(1);
      return;
    }
  }

 private:
  static bool missing(uint32_t arrived, uint32_t full) { return int32_t(arrived - full) < 0; }
  void futex(int operation, uint32_t value) {
    static_assert(sizeof arrived_ == sizeof(uint32_t), "a futex is a plain word");
    syscall(SYS_futex, &arrived_, operation, value, nullptr, nullptr, 0);
  }

  std::atomic<uint32_t> arrived_{0};
  uint32_t members_ = 1;
  alignas(64) std::atomic<uint32_t> sleepers_{0};
};

// How far one thread has come, for another to wait on.
class alignas(128) Progress {
 public:
  void reach(int64_t steps) { steps_.store(steps, std::memory_order_release); }
  void wait_for(int64_t steps) const {
    for (int spins = 0; steps_.load(std::memory_order_acquire) < steps; ++spins)
      if (spins < 2000)
        pause_thread();
      else
        sched_yield();
  }

 private:
  std::atomic<int64_t> steps_{0};
};

bool forked();  // whether this process is a child of fork()

// Runs work(member, members) on up to `wanted` threads; on this one alone inside another parallel region, and in a child of fork(), where
// OpenMP's threads are gone but OpenMP does not know it. Work must give the same result for any number of members.
template <class Work>
void run_team(int wanted, const Work& work) {
  if (wanted <= 1 || omp_in_parallel() || forked()) {
    work(0, 1);
    return;
  }
#pragma omp parallel num_threads(wanted)
  work(omp_get_thread_num(), omp_get_num_threads());
}

// Runs work(i) for i below `count` on up to so many threads. It may wait for lower ones: each thread takes its own in order. A team inside
// one of them is that thread alone.
template <class Work>
void run_apart(int count, int threads, const Work& work) {
  if (count <= 1 || threads <= 1 || omp_in_parallel() || forked()) {
    for (int i = 0; i < count; ++i) work(i);
    return;
  }
#pragma omp parallel num_threads(count < threads ? count : threads)
  for (int i = omp_get_thread_num(); i < count; i += omp_get_num_threads()) work(i);
}

// For all members of a team, where waiting is rare.
inline void meet(int members) {
  if (members > 1) {
#pragma omp barrier
  }
}

}  // namespace rnnkernels::cpu

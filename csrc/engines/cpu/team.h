// Threads that walk through a sequence together: torch's own OpenMP threads, and a barrier cheaper than OpenMP's.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>

namespace rnnkernels::cpu {

// A counter that every member bumps and watches. Spins while the others are about to arrive, yields when the machine has more threads than cores.
class alignas(128) Barrier {
 public:
  void start(int members) {
    members_ = members;
    arrived_.store(0, std::memory_order_relaxed);
  }

  // `round` is the member's own count of its waits, from 0.
  void wait(int64_t& round) {
    if (members_ == 1) return;
    const int64_t full = ++round * members_;
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == full) return;
    for (int spins = 0; arrived_.load(std::memory_order_acquire) < full; ++spins) {
      if (spins < 2000)
        pause();
      else
        sched_yield();
    }
  }

 private:
  static void pause() {
#if RNNKERNELS_X86
    __builtin_ia32_pause();
#endif
  }

  std::atomic<int64_t> arrived_{0};
  int members_ = 1;
};

bool forked();  // whether this process is a child of fork()

// Runs work(member, members) on up to `wanted` threads; on this one alone inside another parallel region, and in a child of fork(), where OpenMP's
// threads are gone but OpenMP does not know it. Work must give the same result for any number of members.
template <class Work>
void run_team(int wanted, const Work& work) {
  if (wanted <= 1 || omp_in_parallel() || forked()) {
    work(0, 1);
    return;
  }
#pragma omp parallel num_threads(wanted)
  work(omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace rnnkernels::cpu

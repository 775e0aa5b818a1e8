// The barrier under plain threads, so that ThreadSanitizer sees all of it: no member passes before all have arrived, with more threads than
// cores too.
#include "engines/cpu/team.h"

#include <thread>
#include <vector>

#include "test/check.h"

using rnnkernels::cpu::Barrier;

int main() {
  for (int members : {1, 2, 3, 8}) {
    constexpr int rounds = 300;
    Barrier barrier;
    barrier.start(members);
    // Plain numbers on purpose: only the barrier orders the accesses.
    std::vector<int> written(size_t(members) * 16, -1);
    std::vector<int> early(size_t(members) * 16, 0);
    std::vector<std::thread> threads;
    for (int id = 0; id < members; ++id)
      threads.emplace_back([&, id] {
        uint32_t round = 0;
        for (int i = 0; i < rounds; ++i) {
          written[size_t(id) * 16] = i;
          barrier.wait(round);
          for (int other = 0; other < members; ++other) early[size_t(id) * 16] += written[size_t(other) * 16] != i;
          barrier.wait(round);
        }
      });
    for (auto& thread : threads) thread.join();
    int total = 0;
    for (int id = 0; id < members; ++id) total += early[size_t(id) * 16];
    std::printf("barrier, %d members: %d rounds\n", members, rounds);
    check(total == 0, "%d members: a member passed %d times before another had arrived", members, total);
  }
  return check_failures != 0;
}

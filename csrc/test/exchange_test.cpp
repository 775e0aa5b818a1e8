// The exchange between blocks, under every interleaving. The kernels run once on the host's grid, where each thread's loads, stores and
// barriers are recorded: what a thread does depends on sizes only, so these are its program. A search then visits every state that the
// programs can reach together: in none may they wait for each other for ever, and in none may a packet be written over that somebody has
// still to read.
//
// A model without memory: a load sees the last store. What orders them on a GPU is said in docs/cuda.md.
#include <algorithm>
#include <map>
#include <string>
#include <unordered_set>
#include <vector>

#include "cells/list.h"
#include "test/grid.h"
#include "test/reset_before.h"

namespace rnnkernels {
namespace {

struct Operation {
  Grid::Event::Kind kind;
  int packet;
  uint32_t epoch;
};

struct Program {
  int block;
  std::vector<Operation> operations;
};

// Looks that found nothing new are left away: between two barriers a thread has read what its last look at a packet gave. Threads that
// neither load nor store only follow; a barrier after a barrier adds nothing.
std::vector<Program> programs_of(const Grid& grid, int* packets) {
  std::vector<Program> programs;
  std::map<const void*, int> numbers;
  const auto number = [&](const void* p) { return numbers.emplace(p, int(numbers.size())).first->second; };
  for (size_t thread = 0; thread < grid.events().size(); ++thread) {
    Program program{int(thread) / kThreads, {}};
    const std::vector<Grid::Event>& events = grid.events()[thread];
    bool exchanges = false;
    for (size_t i = 0; i < events.size(); ++i) {
      bool seen_again = false;
      if (events[i].kind == Grid::Event::Load)
        for (size_t j = i + 1; j < events.size() && events[j].kind == Grid::Event::Load && !seen_again; ++j)
          seen_again = events[j].address == events[i].address;
      if (seen_again) continue;
      exchanges |= events[i].kind != Grid::Event::Sync;
      program.operations.push_back({events[i].kind, events[i].kind == Grid::Event::Sync ? -1 : number(events[i].address), events[i].epoch});
    }
    if (exchanges) programs.push_back(program);
  }
  *packets = int(numbers.size());
  return programs;
}

// Barriers that no thread of the model separates by a load or a store are one.
void merge_barriers(std::vector<Program>& programs) {
  const int blocks = programs.empty() ? 0 : 1 + std::max_element(programs.begin(), programs.end(), [](const Program& a, const Program& b) {
                                                  return a.block < b.block;
                                                })->block;
  for (int block = 0; block < blocks; ++block) {
    std::vector<bool> needed;  // barrier i of the block: somebody did something since the barrier before
    for (const Program& p : programs) {
      if (p.block != block) continue;
      size_t barrier = 0;
      bool something = true;
      for (const Operation& o : p.operations) {
        if (o.kind == Grid::Event::Sync) {
          if (needed.size() <= barrier) needed.resize(barrier + 1);
          if (something) needed[barrier] = true;
          ++barrier;
          something = false;
        } else {
          something = true;
        }
      }
    }
    for (Program& p : programs) {
      if (p.block != block) continue;
      size_t barrier = 0;
      p.operations.erase(std::remove_if(p.operations.begin(), p.operations.end(),
                                        [&](const Operation& o) { return o.kind == Grid::Event::Sync && !needed[barrier++]; }),
                         p.operations.end());
    }
  }
}

struct Verdict {
  std::string fault;  // empty: none
  size_t states;
};

// Every state from the start on: each thread's place, each packet's epoch.
Verdict explore(const std::vector<Program>& programs, int packets) {
  using State = std::string;  // a byte a thread, a byte a packet
  std::unordered_set<State> known;
  std::vector<State> open;
  const size_t threads = programs.size();
  const auto add = [&](const State& s) {
    if (known.insert(s).second) open.push_back(s);
  };
  const auto next = [&](const State& s, size_t i) -> const Operation* {
    const size_t place = uint8_t(s[i]);
    return place < programs[i].operations.size() ? &programs[i].operations[place] : nullptr;
  };
  add(State(threads + size_t(packets), '\0'));
  while (!open.empty()) {
    const State s = open.back();
    open.pop_back();
    bool moved = false, ended = true;
    for (size_t i = 0; i < threads; ++i) {
      const Operation* o = next(s, i);
      if (!o) continue;
      ended = false;
      State to = s;
      if (o->kind == Grid::Event::Sync) {
        // All of the block at once, when the last has come; moved on behalf of the first.
        bool all = true, first = true;
        for (size_t j = 0; j < threads; ++j) {
          if (programs[j].block != programs[i].block) continue;
          const Operation* other = next(s, j);
          all &= other && other->kind == Grid::Event::Sync;
          first &= j >= i;
        }
        if (!all || !first) continue;
        for (size_t j = 0; j < threads; ++j)
          if (programs[j].block == programs[i].block) ++to[j];
      } else {
        char& epoch = to[threads + size_t(o->packet)];
        if (o->kind == Grid::Event::Store) {
          // Whoever has still to read what is written over will wait for it for ever; said here, where it happens.
          for (size_t j = 0; j < threads; ++j)
            for (size_t k = uint8_t(s[j]); k < programs[j].operations.size(); ++k) {
              const Operation& later = programs[j].operations[k];
              if (later.kind == Grid::Event::Load && later.packet == o->packet && later.epoch < o->epoch)
                return {"a packet of epoch " + std::to_string(later.epoch) + " is written over before it was read", known.size()};
            }
          epoch = char(o->epoch);
        } else if (uint8_t(epoch) != o->epoch) {
          continue;
        }
        ++to[i];
      }
      moved = true;
      add(to);
    }
    if (!moved && !ended) return {"all wait for each other", known.size()};
    if (known.size() > 20'000'000) return {"too many states to visit", known.size()};
  }
  return {"", known.size()};
}

struct Case {
  int64_t T, B, H;
  bool ragged, reverse;
  Exchange exchange;
  int unit_ctas, rows_at_once;
};

// `damage` edits the programs, to show that the search would notice.
template <class Cell, class Damage>
std::string fault(const std::string& cell_name, const Case& c, bool backward, const Damage& damage) {
  constexpr CellInfo cell = InfoOf<Cell>::value;
  const std::string name = cell_name + (backward ? " backward" : " forward") + (c.ragged ? " ragged" : "") + (c.reverse ? " reverse" : "") +
                           " T " + std::to_string(c.T) + " B " + std::to_string(c.B) + " H " + std::to_string(c.H) + ", " +
                           std::to_string(c.unit_ctas) + " blocks" + (c.exchange == Exchange::Near ? " near" : "");
  std::vector<int64_t> rows, offsets{0};
  for (int64_t t = 0; t < c.T; ++t) {
    rows.push_back(c.ragged ? std::max<int64_t>(1, c.B - c.B * t / c.T) : c.B);
    offsets.push_back(offsets.back() + rows.back());
  }
  const Problem p{0, Storage::F32, c.T, c.B, 1, c.H, c.H, rows.data(), c.reverse, true, false, 1};
  const size_t tokens = size_t(offsets.back()), room = size_t(cell.room() * c.H);
  std::vector<float> kept(tokens * room), output(tokens * size_t(c.H)), history(output), weight(64), small(64), final[2] = {small, small};
  const Tiling t = tile(cell, p, backward, c.exchange, c.unit_ctas, 1, c.rows_at_once);
  if (!t.fits) return name + " does not fit";
  Grid grid(t, 1);
  grid.record();
  bool ended = false;
  std::vector<uint64_t> workspace;
  if (backward) {
    Backward g{};
    g.problem = p;
    g.kept = g.grad_gates = kept.data();
    for (int s = 0; s < cell.stages; ++s) g.weights[s] = weight.data();
    g.output = output.data();
    for (int i = 0; i < cell.states; ++i) g.history[i] = history.data(), g.grad_initial[i] = final[i].data();
    workspace = workspace_of<cuda::Exact, float>(cell, p, t, g.weights, true);
    const cuda::PersistentBackward r{{g}, t, offsets.data(), {workspace.data()}};
    ended = grid.run([&](Grid::Cta& cta) { cuda::persistent_backward<Cell, float, cuda::Exact>(cta, r); });
  } else {
    Forward f{};
    f.problem = p;
    f.gates = kept.data();
    f.gates_row = int64_t(room);
    for (int s = 0; s < cell.stages; ++s) f.weights[s] = weight.data();
    f.output = output.data();
    for (int i = 0; i < cell.states; ++i) f.history[i] = history.data(), f.final[i] = final[i].data();
    workspace = workspace_of<cuda::Exact, float>(cell, p, t, f.weights, false);
    const cuda::PersistentForward r{{f}, t, offsets.data(), {workspace.data()}};
    ended = grid.run([&](Grid::Cta& cta) { cuda::persistent_forward<Cell, float, cuda::Exact>(cta, r); });
  }
  if (!ended) return name + " waits for ever";
  int packets = 0;
  std::vector<Program> programs = programs_of(grid, &packets);
  merge_barriers(programs);
  damage(programs);
  const Verdict verdict = explore(programs, packets);
  std::printf("%-60s %3zu threads, %2d packets, %8zu states\n", name.c_str(), programs.size(), packets, verdict.states);
  return verdict.fault.empty() ? "" : name + ": " + verdict.fault;
}

template <class Cell>
void test(const std::string& cell, const Case& c, bool backward) {
  const std::string found = fault<Cell>(cell, c, backward, [](std::vector<Program>&) {});
  check(found.empty(), "%s", found.c_str());
}

}  // namespace
}  // namespace rnnkernels

int main() {
  using namespace rnnkernels;
  const Exchange grid = Exchange::Grid, near = Exchange::Near;
  for (bool backward : {false, true}) {
    for (const Case& c :
         {Case{7, 1, 2, false, false, grid, 2, 8}, Case{5, 1, 3, false, false, grid, 3, 8}, Case{4, 2, 2, true, false, grid, 2, 8},
          Case{4, 2, 2, true, true, grid, 2, 8}, Case{4, 2, 2, false, false, grid, 2, 1}, Case{5, 1, 2, false, false, near, 2, 8},
          Case{4, 2, 2, true, true, near, 2, 1}, Case{4, 1, 8, false, false, grid, 2, 8}})
      test<Srn<Tanh>>("srn", c, backward);
    for (const Case& c : {Case{4, 1, 2, false, false, grid, 2, 8}, Case{2, 2, 2, true, true, grid, 2, 8}})
      test<ResetBefore>("two stages", c, backward);
  }
  // The search sees what it is for: reading and writing without a barrier between them, and a store that is missing.
  const auto without = [](Grid::Event::Kind kind, size_t most) {
    return [kind, most](std::vector<Program>& programs) {
      size_t gone = 0;
      for (Program& p : programs)
        p.operations.erase(
            std::remove_if(p.operations.begin(), p.operations.end(), [&](const Operation& o) { return o.kind == kind && gone++ < most; }),
            p.operations.end());
    };
  };
  const Case c{4, 1, 2, false, false, grid, 2, 8};
  check(!fault<Srn<Tanh>>("no barriers", c, false, without(Grid::Event::Sync, 1000)).empty(), "missing barriers were not noticed");
  check(!fault<Srn<Tanh>>("a store less", c, false, without(Grid::Event::Store, 1)).empty(), "a missing store was not noticed");
  return check_failures != 0;
}

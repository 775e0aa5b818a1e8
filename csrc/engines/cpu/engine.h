// The CPU engine: any page over a sequence.
#pragma once

#include <string>
#include <vector>

#include "core/step.h"
#include "core/teams.h"

namespace rnnkernels::cpu {

// The instruction sets in this binary that this processor runs, best first.
std::vector<std::string> supported_isas();
std::vector<std::string> built_isas();
std::string isa();
std::string isa_of_pages();  // the one whose pages it runs
// Throws std::invalid_argument for a name that is not supported; the empty name chooses the best.
void set_isa(const std::string& name);

struct Page;
// The page of the problem's cell for the chosen instruction set.
const Page& page_of(const Problem&);
// A cell of one's own, its page compiled for an instruction set: the number by which a problem names it; and its page for another one.
// Pages live to the end of the program. One thread at a time.
int add_page(const std::string& isa, const Page&);
void add_page(int cell, const std::string& isa, const Page&);

// Empty if the engine can run it, otherwise the reason why not.
std::string fits(const Problem&, const Page&);
int lanes(const Problem&);  // of the chosen instruction set's numbers
Schedule schedule(const Problem&, const Page&, bool backward);
std::vector<Team> teams(const Problem&, const Page&, bool training);
int64_t workspace_bytes(const Problem&, const Page&, bool backward);
// How many bytes packed weights take, and what tells whether those of one problem serve another with the same weights: sizes, types, cuts.
struct Packing {
  int64_t bytes;
  std::vector<int64_t> shape;
};
Packing packing(const Problem&, const Page&);

void forward(const Forward&, const Page&);
void backward(const Backward&, const Page&);
// Several that do not depend on each other, side by side on a thread each.
void forward(const std::vector<const Forward*>&);
void backward(const std::vector<const Backward*>&);
// Whether two such problems are sooner done so, forward or, training, forward and backward.
bool gains_apart(const Problem&, bool training);
// Chained problems, each of which reads the output of the one before it, at the same time on up to so many threads.
void forward_chain(const std::vector<const Forward*>&, int threads);
// Whether so many such problems, the first of which reads an input of another width, are sooner done so.
bool gains_chained(const Problem&, int64_t first_input, int layers);

// The yardstick: one stage of one step by plain loops, for rows whose products somebody else has formed: sums [rows][H slots · width] in
// storage type, null for zero; backward has them for summed_rows rows.
void forward_step(const Problem&, int stage, const ForwardStep&, int64_t rows, const void* sums);
void backward_step(const Problem&, int stage, const BackwardStep&, int64_t rows, int64_t summed_rows, const void* sums);

// Asks the system to back memory that nobody has touched yet with large pages: a fresh page costs a fault, and a large one no more than a
// small one.
void prefer_large_pages(void* memory, int64_t bytes);
// Of a core's first data cache; 0: the system does not say.
int64_t level1_bytes();

// For the benchmarks' roofs: bytes read a second by one team whose members each read their own buffer of so many bytes, over and over;
// flops a second of the best tile of a product, all of it in L1; a barrier's time; that of a cell's page, forward or backward, for a unit
// of a row, all of it in L1. In units of 1e9, µs and ns.
double measure_bandwidth(int64_t bytes, int threads);
double measure_product(Storage, int threads);
double measure_barrier(int threads);
double measure_page(int cell, Storage, bool training, bool backward);

}  // namespace rnnkernels::cpu

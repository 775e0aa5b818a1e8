// Where the engine finds a cell's page: in the table of an instruction set, or, compiled elsewhere and loaded, beside it.
#include <map>

#include "core/registry.h"
#include "engines/cpu/engine.h"
#include "engines/cpu/walk.h"

namespace rnnkernels::cpu {

namespace {

Loaded<std::map<std::string, const Page*>> loaded;

}  // namespace

const Page& page_of(int cell, const Isa& isa) {
  if (cell < kCellCount) return isa.page[cell];
  const auto& pages = *loaded.find(cell);
  const auto found = pages.find(isa.pages);
  if (found == pages.end()) throw std::invalid_argument("the cell was not compiled for the instruction set " + std::string(isa.pages));
  return *found->second;
}

const Page& page_of(const Problem& p) { return page_of(p.cell, current()); }

// What is replaced stays for good: layers may be running it.
int add_page(const std::string& isa, const Page& page) {
  const int cell = registry.add(page.cell);
  loaded.set(cell, new std::map<std::string, const Page*>{{isa, &page}});
  return cell;
}

void add_page(int cell, const std::string& isa, const Page& page) {
  auto* pages = new std::map<std::string, const Page*>(*loaded.find(cell));
  pages->emplace(isa, &page);
  loaded.set(cell, pages);
}

}  // namespace rnnkernels::cpu

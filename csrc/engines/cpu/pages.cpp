// Where the engine finds a cell's page: in the table of an instruction set, or, compiled elsewhere and loaded, beside it.
#include <map>

#include "core/registry.h"
#include "engines/cpu/engine.h"
#include "engines/cpu/walk.h"

namespace rnnkernels::cpu {

namespace {

Loaded<std::map<std::string, const Page*>> loaded;

}  // namespace

const Page& page_of(int cell, const Isa& isa) { return cell < kCellCount ? isa.page[cell] : *loaded.find(cell)->at(isa.name); }

const Page& page_of(const Problem& p) { return page_of(p.cell, current()); }

int add_page(const std::map<std::string, const Page*>& of_isa) {
  for (const std::string& isa : supported_isas())
    if (!of_isa.count(isa)) throw std::invalid_argument("a page for the instruction set " + isa + " is missing");
  const auto* pages = new std::map<std::string, const Page*>(of_isa);  // for good: layers may run it to the end
  const int cell = registry.add(pages->begin()->second->cell);
  loaded.set(cell, pages);
  return cell;
}

}  // namespace rnnkernels::cpu

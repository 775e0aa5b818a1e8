// The Python module: addresses and sizes in, nothing of torch. Whoever calls these has checked everything; see rnnkernels/ops/.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>

#include "core/registry.h"
#include "core/tiling.h"
#include "engines/cpu/engine.h"
#include "engines/cpu/stream.h"
#include "engines/traced/trace.h"
#if RNNKERNELS_CUDA
#include "engines/cuda/engine.h"
#include "engines/cuda/probe.h"
#endif

namespace py = pybind11;
using namespace rnnkernels;

namespace {

using Address = uintptr_t;
using Addresses = std::vector<Address>;
using GivenSlots = std::vector<std::tuple<Address, int64_t, int64_t>>;  // address, elements from a token and from a row to the next

template <class P = void>
P* pointer(Address a) {
  return reinterpret_cast<P*>(a);
}

template <class P, size_t n>
void fill(P* (&to)[n], const Addresses& from) {
  if (from.size() > n) throw std::invalid_argument("more addresses than the contract's tables hold");
  for (size_t i = 0; i < from.size(); ++i) to[i] = pointer(from[i]);
}

template <size_t n>
void fill(Given (&to)[n], const GivenSlots& from) {
  if (from.size() > n) throw std::invalid_argument("more given slots than the contract's tables hold");
  for (size_t i = 0; i < from.size(); ++i) to[i] = {pointer(std::get<0>(from[i])), std::get<1>(from[i]), std::get<2>(from[i])};
}

Problem problem(int cell, int storage, int64_t steps, int64_t batch, int64_t input, int64_t hidden, int64_t output, Address rows,
                bool reverse, bool training, bool complete, int threads, int products, Address lengths, Address resets, Address units,
                int64_t module, int weight_type, bool keeps_packed, bool chained, int least, int row_groups) {
  if (!registry.find(cell) || storage < 0 || storage >= kStorages || products < 0 || products > int(Products::Tf32) || weight_type < 0 ||
      weight_type >= kWeightTypes)
    throw std::invalid_argument("no such cell, storage type, way to multiply or type of weights");
  const Problem p{cell,
                  Storage(storage),
                  steps,
                  batch,
                  input,
                  hidden,
                  output,
                  pointer<const int64_t>(rows),
                  reverse,
                  training,
                  complete,
                  threads,
                  Products(products),
                  pointer<const int64_t>(lengths),
                  pointer<const uint8_t>(resets),
                  pointer<const int64_t>(units),
                  module,
                  WeightType(weight_type),
                  keeps_packed,
                  chained,
                  least,
                  row_groups};
  const std::string why_not = cpu::fits(p, cpu::page_of(p));
  if (!why_not.empty()) throw std::invalid_argument(why_not);
  return p;
}

Forward forward_call(const Problem& p, Address gates, int64_t gates_row, const Addresses& weights, const Addresses& vectors,
                     const Addresses& initial, const Addresses& final, Address output, const Addresses& history, Address workspace) {
  Forward f{};
  f.problem = p;
  f.gates = pointer(gates);
  f.gates_row = gates_row;
  fill(f.weights, weights);
  fill(f.vectors, vectors);
  fill(f.initial, initial);
  fill(f.final, final);
  f.output = pointer(output);
  fill(f.history, history);
  f.workspace = pointer(workspace);
  return f;
}

Backward backward_call(const Problem& p, Address kept, Address grad_gates, const Addresses& weights, const Addresses& vectors,
                       const Addresses& initial, Address output, const Addresses& history, const Addresses& grad_states,
                       const Addresses& grad_final, const Addresses& grad_initial, Address workspace) {
  Backward g{};
  g.problem = p;
  g.kept = pointer(kept);
  g.grad_gates = pointer(grad_gates);
  fill(g.weights, weights);
  fill(g.vectors, vectors);
  fill(g.initial, initial);
  g.output = pointer(output);
  fill(g.history, history);
  fill(g.grad_states, grad_states);
  fill(g.grad_final, grad_final);
  fill(g.grad_initial, grad_initial);
  g.workspace = pointer(workspace);
  return g;
}

Forward placed(const Forward& f, Address input, const Addresses& initial, Address gates, Address output, const Addresses& final,
               const Addresses& history, Address workspace, Address packed, int pack) {
  Forward now = f;
  now.input = pointer(input);
  fill(now.initial, initial);
  now.gates = pointer(gates);
  now.output = pointer(output);
  fill(now.final, final);
  fill(now.history, history);
  now.workspace = pointer(workspace);
  now.packed = pointer(packed);
  now.pack = Pack(pack);
  return now;
}

void need(const Problem& p, bool backward, int64_t given) {
  if (backward && p.keeps_packed) throw std::invalid_argument("packed weights are kept for the forward pass");
  if (given < cpu::workspace_bytes(p, cpu::page_of(p), backward))
    throw std::invalid_argument("the workspace is too small: the instruction set changed since it was measured");
}

py::dict description(const CellInfo& cell) {
  py::list slots, stages, states, vectors, sums, biased;
  for (int i = 0; i < cell.slots; ++i)
    slots.append(py::make_tuple(cell.slot[i].name, bool(cell.slot[i].feeds & X), bool(cell.slot[i].feeds & H), bool(cell.slot[i].feeds & G),
                                bool(cell.slot[i].feeds & M)));
  for (int i = 0; i < cell.stages; ++i) sums.append(py::make_tuple(cell.stage[i].sums, cell.stage[i].back_sums));
  for (int i = 0; i < cell.slots; ++i) biased.append(cell.biased(i));
  for (int i = 0; i < cell.stages; ++i)
    stages.append(py::make_tuple(cell.stage[i].first, cell.stage[i].count, cell.stage[i].operand, cell.stage[i].width == Width::Output));
  for (int i = 0; i < cell.states; ++i) states.append(cell.state[i]);
  const char* const factors[] = {"one", "old", "new", "itself", "kept", "fixed"};  // as enum Factor
  for (int i = 0; i < cell.vectors; ++i) {
    const PerUnit& v = cell.vector[i];
    vectors.append(py::make_tuple(v.name, v.slot, v.factor != Factor::One, factors[int(v.factor)], v.state));
  }
  return py::dict(py::arg("name") = cell.name, py::arg("page") = cell.page, py::arg("slots") = slots, py::arg("stages") = stages,
                  py::arg("states") = states, py::arg("vectors") = vectors, py::arg("kept") = cell.kept, py::arg("room") = cell.room(),
                  py::arg("projected") = cell.projected(), py::arg("sums") = sums, py::arg("biased") = biased);
}

Loaded<traced::Tracer> loaded_tracers;

// The operations of a page, each its name, the places of what it takes, and a constant's value; and of each stage where its operations end,
// what it keeps, the states it writes, what it puts into sums: by their places, -1 for nothing.
py::dict trace(int cell) {
  if (!registry.find(cell)) throw std::invalid_argument("no such cell");
  const auto t = std::make_unique<traced::Trace>();
  (cell < kCellCount ? traced::tracers[cell] : *loaded_tracers.find(cell)).run(*t);
  if (t->tape.count > Tape::room) throw std::length_error("the page has more operations than can be traced");
  const char* const names[] = {"constant", "slot",   "vector", "state", "moment", "add",  "sub", "mul",     "div",  "neg", "fma",
                               "less",     "select", "min",    "max",   "abs",    "sqrt", "exp", "sigmoid", "tanh", "relu"};  // as enum Op
  py::list operations, stages;
  for (int i = 0; i < t->tape.count; ++i) {
    const Operation& o = t->tape.list[i];
    operations.append(py::make_tuple(names[int(o.op)], o.a, o.b, o.c, o.value));
  }
  const auto places = [](const int* from, int count) { return py::cast(std::vector<int>(from, from + count)); };
  const CellInfo& info = registry[cell];
  for (int s = 0; s < info.stages; ++s) {
    const traced::StageTrace& stage = t->stage[s];
    stages.append(py::make_tuple(stage.end, places(stage.kept, info.kept), places(stage.states, info.states),
                                 places(stage.sums, info.stage[s].sums)));
  }
  return py::dict(py::arg("operations") = operations, py::arg("stages") = stages);
}

template <size_t n>
void fill(int64_t (&to)[n], const CellInfo& cell, const Problem& p) {
  for (int i = 0; i < cell.states; ++i) to[i] = width_of(p, cell.state_width(i));
}

#if RNNKERNELS_CUDA
void need_some(size_t calls) {
  if (calls < 1 || calls > size_t(kSequences)) throw std::invalid_argument("a launch is of one or two sequences");
}
#endif

void need_cuda() {
#if !RNNKERNELS_CUDA
  throw std::invalid_argument("this build has no CUDA part");
#endif
}

py::dict build() {
  py::dict d(py::arg("version") = RNNKERNELS_VERSION, py::arg("compiler") = "g++ " __VERSION__, py::arg("isas") = cpu::built_isas());
  d["headers"] = RNNKERNELS_HEADERS;
  d["flags"] = py::dict(py::arg("all") = RNNKERNELS_FLAGS, py::arg("scalar") = "", py::arg("avx2") = RNNKERNELS_FLAGS_AVX2,
                        py::arg("avx512") = RNNKERNELS_FLAGS_AVX512, py::arg("avx512bf16") = RNNKERNELS_FLAGS_AVX512BF16,
                        py::arg("cuda") = RNNKERNELS_FLAGS_CUDA);
  d["cuda"] = py::none();
#if RNNKERNELS_CUDA
  const cuda::Probe probe = cuda::probe();
  py::list devices;
  for (const auto& device : probe.devices) devices.append(py::make_tuple(device.name, device.major, device.minor));
  d["cuda"] = py::dict(py::arg("architectures") = probe.architectures, py::arg("runtime") = probe.runtime, py::arg("driver") = probe.driver,
                       py::arg("devices") = devices);
#endif
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  py::class_<Problem>(m, "Problem").def(py::init(&problem));

  m.def("cells", [] {
    py::list all;
    for (const CellInfo& cell : kCells) all.append(description(cell));
    return all;
  });
  m.def("trace", trace);
  // The addresses of a page for an instruction set and of its tracer: the number and the description of the cell that it now is.
  m.def("add_cell", [](const std::string& isa, Address page, Address tracer) {
    const int cell = cpu::add_page(isa, *pointer<const cpu::Page>(page));
    loaded_tracers.set(cell, pointer<const traced::Tracer>(tracer));
    return py::make_tuple(cell, description(registry[cell]));
  });
  m.def("add_page", [](int cell, const std::string& isa, Address page) { cpu::add_page(cell, isa, *pointer<const cpu::Page>(page)); });
  m.attr("MAX_SUMS") = kMaxSums;
  m.def("build", build);
  m.def("supported_isas", cpu::supported_isas);
  m.def("isa", cpu::isa);
  m.def("isa_of_pages", cpu::isa_of_pages);
  m.def("set_isa", cpu::set_isa);
  m.def("workspace_bytes", [](const Problem& p, bool backward) { return cpu::workspace_bytes(p, cpu::page_of(p), backward); });
  m.def("packing", [](const Problem& p) {
    const cpu::Packing found = cpu::packing(p, cpu::page_of(p));
    return py::make_tuple(found.bytes, py::tuple(py::cast(found.shape)));
  });
  m.def("schedule", [](const Problem& p, bool backward) {
    const Schedule s = cpu::schedule(p, cpu::page_of(p), backward);
    return py::make_tuple(s.row_groups, s.unit_groups, s.blocks[0] * cpu::lanes(p), s.ns);
  });
  m.def("teams", [](const Problem& p, bool training) {
    std::vector<std::tuple<int, int, int>> found;
    for (const Team& team : cpu::teams(p, cpu::page_of(p), training)) found.emplace_back(team.least, team.most, team.row_groups);
    return found;
  });
  m.def("gains_apart", cpu::gains_apart);
  m.def("gains_chained", cpu::gains_chained);
  // What the persistent engine would do with so many sequences at once on a device of so many multiprocessors, so much shared memory a
  // block and so many blocks a cluster: how blocks exchange, how many along units and rows, bytes of shared memory, whether it fits.
  m.def("tiling", [](const Problem& p, bool backward, int multiprocessors, int64_t shared_bytes, int cluster_blocks, int sequences) {
    const Tiling t = tile({multiprocessors, shared_bytes, cluster_blocks}, registry[p.cell], p, backward, sequences);
    const char* const how = t.exchange == Exchange::None ? "none" : t.exchange == Exchange::Near ? "near" : "grid";
    return py::make_tuple(how, t.unit_ctas, t.row_tiles, t.shared_bytes, t.fits);
  });
  m.def("prefer_large_pages", [](Address memory, int64_t bytes) { cpu::prefer_large_pages(pointer(memory), bytes); });
  m.def("measure_bandwidth", cpu::measure_bandwidth, py::call_guard<py::gil_scoped_release>());
  m.def("measure_product", [](int storage, int threads) {
    if (storage < 0 || storage >= kStorages) throw py::value_error("no such storage type");
    const py::gil_scoped_release release;
    return cpu::measure_product(Storage(storage), threads);
  });
  m.def("measure_barrier", cpu::measure_barrier, py::call_guard<py::gil_scoped_release>());
  m.def("measure_page", [](int cell, int storage, bool training, bool backward) {
    if (storage < 0 || storage >= kStorages) throw py::value_error("no such storage type");
    if (!registry.find(cell)) throw py::value_error("no such cell");
    const py::gil_scoped_release release;
    return cpu::measure_page(cell, Storage(storage), training, backward);
  });

  // What is to be run, and running some that do not depend on each other side by side.
  py::class_<Forward>(m, "Forward")
      .def(py::init([](const Problem& p, Address input, Address weight_ih, Address bias_ih, Address bias_hh, Address gates,
                       int64_t gates_row, const Addresses& weights, const Addresses& vectors, const Addresses& initial,
                       const Addresses& final, Address output, const Addresses& history, Address workspace, int64_t bytes,
                       const GivenSlots& given, Address moments, const GivenSlots& resets, Address packed, int pack) {
        need(p, false, bytes);
        Forward f = forward_call(p, gates, gates_row, weights, vectors, initial, final, output, history, workspace);
        f.input = pointer(input);
        f.weight_ih = pointer(weight_ih);
        f.bias_ih = pointer(bias_ih);
        f.bias_hh = pointer(bias_hh);
        fill(f.given, given);
        f.moments = pointer(moments);
        fill(f.reset, resets);
        f.packed = pointer(packed);
        f.pack = Pack(pack);
        return f;
      }))
      // With these inputs and this memory in the place of its own: now, by several threads of Python at once, or as a call to be run later.
      .def("run",
           [](const Forward& f, Address input, const Addresses& initial, Address gates, Address output, const Addresses& final,
              const Addresses& history, Address workspace, Address packed, int pack) {
             const Forward now = placed(f, input, initial, gates, output, final, history, workspace, packed, pack);
             py::gil_scoped_release release;
             cpu::forward(now, cpu::page_of(now.problem));
           })
      .def("placed", &placed);
  m.def("forward", py::overload_cast<const std::vector<const Forward*>&>(cpu::forward), py::call_guard<py::gil_scoped_release>());
  m.def("forward_chain", cpu::forward_chain, py::call_guard<py::gil_scoped_release>());

  // Layers kept ready to take one step at a time.
  py::class_<cpu::Stream>(m, "Stream")
      .def(py::init<const std::vector<Problem>&>())
      .def_property_readonly("bytes", &cpu::Stream::bytes)
      .def("place", [](cpu::Stream& s, Address workspace) { s.place(pointer(workspace)); })
      .def("pack",
           [](cpu::Stream& s, size_t layer, Address weight_ih, Address bias_ih, Address bias_hh, const Addresses& weights,
              const Addresses& vectors, const GivenSlots& given) {
             Forward f{};
             fill(f.given, given);
             f.weight_ih = pointer(weight_ih);
             f.bias_ih = pointer(bias_ih);
             f.bias_hh = pointer(bias_hh);
             fill(f.weights, weights);
             fill(f.vectors, vectors);
             py::gil_scoped_release release;
             s.pack(layer, f);
           })
      .def("load",
           [](cpu::Stream& s, const Addresses& states, const std::vector<int64_t>& rows) {
             const void* from[kMaxStates] = {};
             fill(from, states);
             py::gil_scoped_release release;
             s.load(from, rows);
           })
      .def("store",
           [](cpu::Stream& s, const Addresses& states) {
             void* to[kMaxStates] = {};
             fill(to, states);
             py::gil_scoped_release release;
             s.store(to);
           })
      .def("step", [](cpu::Stream& s, Address x, Address y) {
        py::gil_scoped_release release;
        s.step(pointer(x), pointer(y));
      });

  py::class_<Backward>(m, "Backward")
      .def(py::init([](const Problem& p, Address kept, Address grad_gates, const Addresses& weights, const Addresses& vectors,
                       const Addresses& initial, Address output, const Addresses& history, const Addresses& grad_states,
                       const Addresses& grad_final, const Addresses& grad_initial, Address input, Address weight_ih, Address grad_input,
                       Address grad_weight_ih, const Addresses& grad_weights, Address grad_bias_ih, Address grad_bias_hh,
                       const Addresses& grad_vectors, Address workspace, int64_t bytes, Address moments, const GivenSlots& resets,
                       const Addresses& grad_resets) {
        need(p, true, bytes);
        Backward g = backward_call(p, kept, grad_gates, weights, vectors, initial, output, history, grad_states, grad_final, grad_initial,
                                   workspace);
        g.input = pointer(input);
        g.weight_ih = pointer(weight_ih);
        g.grad_input = pointer(grad_input);
        g.grad_weight_ih = pointer(grad_weight_ih);
        fill(g.grad_weights, grad_weights);
        g.grad_bias_ih = pointer(grad_bias_ih);
        g.grad_bias_hh = pointer(grad_bias_hh);
        fill(g.grad_vectors, grad_vectors);
        g.moments = pointer(moments);
        fill(g.reset, resets);
        fill(g.grad_reset, grad_resets);
        return g;
      }))
      // As that of Forward. `weights` and `grad_weights`: of the input, then of the stages; `grads`: of the input and of both biases.
      .def("run", [](const Backward& g, Address kept, Address grad_gates, Address output, Address input, Address workspace,
                     const Addresses& weights, const Addresses& vectors, const Addresses& initial, const Addresses& history,
                     const Addresses& grad_states, const Addresses& grad_final, const Addresses& grad_initial,
                     const Addresses& grad_weights, const Addresses& grads, const Addresses& grad_vectors) {
        Backward now = g;
        now.kept = pointer(kept);
        now.grad_gates = pointer(grad_gates);
        now.output = pointer(output);
        now.input = pointer(input);
        now.workspace = pointer(workspace);
        now.weight_ih = pointer(weights.at(0));
        fill(now.weights, {weights.begin() + 1, weights.end()});
        fill(now.vectors, vectors);
        fill(now.initial, initial);
        fill(now.history, history);
        fill(now.grad_states, grad_states);
        fill(now.grad_final, grad_final);
        fill(now.grad_initial, grad_initial);
        now.grad_weight_ih = pointer(grad_weights.at(0));
        fill(now.grad_weights, {grad_weights.begin() + 1, grad_weights.end()});
        now.grad_input = pointer(grads.at(0));
        now.grad_bias_ih = pointer(grads.at(1));
        now.grad_bias_hh = pointer(grads.at(2));
        fill(now.grad_vectors, grad_vectors);
        py::gil_scoped_release release;
        cpu::backward(now, cpu::page_of(now.problem));
      });
  m.def("backward", py::overload_cast<const std::vector<const Backward*>&>(cpu::backward), py::call_guard<py::gil_scoped_release>());

  // One stage of one step, where the tensors are: on the CPU (device -1) or a CUDA device.
  m.def("forward_step",
        [](const Problem& p, int stage, Address gates, int64_t gates_row, Address kept, Address between, const Addresses& vectors,
           const Addresses& states, const Addresses& history, const Addresses& given, const std::vector<int64_t>& given_row, int64_t rows,
           Address sums, Address moments, Address partial, int device, [[maybe_unused]] Address stream) {
          const CellInfo& cell = registry[p.cell];
          ForwardStep step{};
          step.hidden = p.hidden;
          step.output = p.output;
          step.gates = pointer(gates);
          step.gates_row = gates_row;
          step.gates_slot = p.hidden;
          step.kept = pointer(kept);
          step.between = pointer(between);
          step.between_row = cell.kept * p.hidden;
          step.between_slot = p.hidden;
          fill(step.vectors, vectors);
          fill(step.previous, states);
          fill(step.next, states);
          fill(step.state_row, cell, p);
          fill(step.history, history);
          fill(step.given, given);
          for (size_t i = 0; i < given_row.size(); ++i) step.given_row[i] = given_row[i];
          step.moments = pointer(moments);
          step.partial = pointer<double>(partial);
          step.partial_row = p.hidden * 2 * cell.stage[stage].sums;
          py::gil_scoped_release release;
          if (device < 0) return cpu::forward_step(p, stage, step, rows, pointer(sums));
          need_cuda();
#if RNNKERNELS_CUDA
          cuda::forward_step(p, stage, step, rows, pointer(sums), device, pointer(stream));
#endif
        });
  m.def("backward_step", [](const Problem& p, int stage, Address kept, Address grad_gates, const Addresses& vectors, int64_t previous_rows,
                            const Addresses& previous, const Addresses& initial, const Addresses& states, const Addresses& grad_states,
                            const Addresses& carried, Address operand, int64_t rows, int64_t summed_rows, Address sums, Address moments,
                            Address means, Address partial, int device, [[maybe_unused]] Address stream) {
    const CellInfo& cell = registry[p.cell];
    BackwardStep step{};
    step.hidden = p.hidden;
    step.output = p.output;
    step.kept = pointer(kept);
    step.grad_gates = pointer(grad_gates);
    fill(step.vectors, vectors);
    step.previous_rows = previous_rows;
    fill(step.previous, previous);
    fill(step.initial, initial);
    fill(step.states, states);
    fill(step.grad_states, grad_states);
    fill(step.carried, carried);
    fill(step.carried_row, cell, p);
    step.operand[stage] = pointer(operand);
    step.operand_slot[stage] = width_of(p, cell.stage[stage].width);
    step.operand_row[stage] = cell.hidden_slots(stage) * step.operand_slot[stage];
    step.moments = pointer(moments);
    step.means = pointer(means);
    step.partial = pointer<double>(partial);
    step.partial_row = p.hidden * 2 * cell.stage[stage].back_sums;
    py::gil_scoped_release release;
    if (device < 0) return cpu::backward_step(p, stage, step, rows, summed_rows, pointer(sums));
    need_cuda();
#if RNNKERNELS_CUDA
    cuda::backward_step(p, stage, step, rows, summed_rows, pointer(sums), device, pointer(stream));
#endif
  });

#if RNNKERNELS_CUDA
  m.def("add_cuda_cell", [](int cell, Address kernels) { cuda::add_kernels(cell, pointer<const cuda::CellKernels>(kernels)); });
  m.def("cuda_device", [](int device) {
    const Device d = cuda::device(device);
    return py::make_tuple(d.multiprocessors, d.shared_bytes, d.cluster_blocks);
  });
  m.def("cuda_why_not", cuda::fits);
  m.def("cuda_gains_together", cuda::gains_together);
  m.def("cuda_workspace_bytes", cuda::workspace_bytes);
  m.def("cuda_forward_call", forward_call);
  m.def("cuda_backward_call", backward_call);
  m.def("cuda_forward", [](const std::vector<const Forward*>& calls, Address offsets, int device, Address stream) {
    need_some(calls.size());
    py::gil_scoped_release release;
    cuda::forward(calls, pointer<const int64_t>(offsets), device, pointer(stream));
  });
  m.def("cuda_backward", [](const std::vector<const Backward*>& calls, Address offsets, int device, Address stream) {
    need_some(calls.size());
    py::gil_scoped_release release;
    cuda::backward(calls, pointer<const int64_t>(offsets), device, pointer(stream));
  });
#endif
}

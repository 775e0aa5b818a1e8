"""The benchmarks' own machinery: what is counted, what is refused, what is written."""

import itertools
import json
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich")

from bench import goals, peers, roofs, tables, timing
from bench.__main__ import main
from bench.cases import COMPILED_STEPS, LAYOUTS, OTHERS, PADDED, PRESETS, Case, Drawn, select
from bench.memory import peak_of_step, saved_for_backward
from bench.recurrence import recurrence
from bench.run import report, run_case
from bench.timing import MIN_SAMPLES, Timing, measure
from rnnkernels import ops


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Nobody reads the times measured here."""
    monkeypatch.setattr(timing, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(roofs, "PRODUCTS", ((8, 8, 8),))
    monkeypatch.setattr(roofs, "TRIES", 1)


SMALL = Case("lstm", "training", "float32", T=4, B=2, I=3, H=5, threads=1)


@pytest.mark.parametrize(
    ("preset", "size"),
    [
        ("quick", 12),
        ("grid", 2 * 5 * 4 * 2 * 3),
        ("drawn", 20 * 2 * 3),
        ("figures", 5 + 2 * 2),
        ("steps", 3 * 2 * 3 * 3),
        ("stream", 2 * 4 * 3),
        ("cells", 12 * len(OTHERS)),
        ("compiled", 4 * len(OTHERS) + 3 * 2 * 2 * 2 * 2),
        ("inside", 3 * 4 * 2 * 2 * 2),
        ("clockwork", 2 * 2 * 2),
        ("recurrence", 3 * 2 * 4 * 5),
    ],
)
def test_presets(preset, size):
    cases = select(preset, ["float32"], [2])
    assert len(cases) == len({case.id for case in cases}) == size


def test_sizes_by_lot_are_the_same_each_time():
    first, second = (select("drawn", ["float32"], [2]) for _ in range(2))
    assert first == second
    assert all(case.flops <= Drawn.LONGEST for case in first)
    assert len({(case.T, case.B, case.I, case.H) for case in first}) >= 20
    assert sum(case.I != case.H for case in first) >= 100


def test_selection_crosses_dtypes_and_threads_and_filters():
    assert len(select("quick", ["float32", "bfloat16"], [1, 2])) == 4 * len(select("quick", ["float32"], [1]))
    assert {case.cell for case in select("grid", ["float32"], [1], "^gru/.*B1/")} == {"gru"}
    names = "quick grid drawn steps stream cells compiled inside clockwork packed derivatives bidirectional recurrence memory figures"
    assert set(PRESETS) == set(names.split())


def test_work_is_counted():
    product = 2 * 4 * 2 * 4 * 5  # two flops, T, B, gates, H; times what is summed over
    assert (SMALL.recurrent_flops, SMALL.outside_flops) == (2 * product * 5, 3 * product * 3 + product * 5)
    inference = replace(SMALL, direction="inference")
    assert inference.flops == product * 5 + product * 3
    assert inference.weight_bytes == 4 * 5 * 5 * 4
    assert replace(SMALL, direction="streaming").weight_bytes == 4 * 5 * (5 + 3) * 4


def test_timing_tells_which_is_slower():
    found = measure({"slow": lambda: time.sleep(4e-3), "fast": lambda: time.sleep(1e-3)}, budget=0)
    assert all(len(side.samples) == MIN_SAMPLES for side in found.values())
    assert found["fast"].repeats > 1
    assert found["slow"].over(found["fast"]).median > 1.5


def test_timing_takes_quartiles():
    spread = Timing([1.0, 2.0, 3.0, 4.0, 5.0], 1).seconds
    assert (spread.low, spread.median, spread.high) == (2, 3, 4)


@pytest.mark.parametrize("direction", ["inference", "training", "streaming", "penalty"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "srn"])
def test_a_case_is_checked_and_timed(cell, direction):
    found = run_case(replace(SMALL, cell=cell, direction=direction), ["torch", "rnnkernels"], 0, roofs.Roofs())
    assert not found["wrong"]
    assert found["peers"].keys() == {"torch", "rnnkernels"}
    assert found["speedup"]["torch"]["median"] > 0
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("direction", ["inference", "training"])
def test_both_directions_are_checked_and_timed(direction):
    case = replace(SMALL, cell="lstm", direction=direction, bidirectional=True)
    found = run_case(case, ["torch", "onnxruntime", "rnnkernels"], 0, roofs.Roofs())
    assert not found["wrong"]
    assert found["peers"].keys() == {"torch", "rnnkernels"}
    assert case.id.endswith("/bidirectional")
    assert case.flops == 2 * replace(case, bidirectional=False).flops


@pytest.mark.parametrize("direction", ["jvp", "penalty"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_derivatives_are_held_against_a_loop_too(cell, direction):
    found = run_case(replace(SMALL, cell=cell, direction=direction), ["torch", "loop", "rnnkernels"], 0, roofs.Roofs())
    assert not found["wrong"]
    assert found["speedup"].keys() == ({"loop"} if (cell, direction) == ("lstm", "jvp") else {"torch", "loop"})
    assert found["floor"] is None


@pytest.mark.parametrize("direction", ["inference", "training"])
@pytest.mark.parametrize("cell", ["lstm_peephole", "indrnn_relu", "gru_zoneout", "lstm_cell_norm_layer_norm"])
def test_a_cell_that_torch_lacks_is_held_against_a_loop(cell, direction):
    found = run_case(replace(SMALL, cell=cell, direction=direction), ["torch", "loop", "rnnkernels"], 0, roofs.Roofs())
    assert not found["wrong"]
    assert found["unavailable"] == {"torch": f"torch.nn has no cell {cell}"}
    assert found["speedup"]["loop"]["median"] > 0


@pytest.mark.parametrize("direction", ["inference", "training"])
def test_clockwork_is_checked_and_timed(direction):
    case = replace(SMALL, cell="srn_tanh", direction=direction, T=8, H=16, layout="clockwork")
    assert case.units_share == (16 + 2 + 4 + 2 + 6 + 2 + 4 + 2) / 8 / 16
    found = run_case(case, ["loop", "plain", "rnnkernels"], 0, roofs.Roofs())
    assert not found["wrong"]
    assert found["speedup"]["loop"]
    assert found["over_plain"]


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("direction", ["inference", "training"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "srn"])
def test_what_happens_inside_a_sequence_is_checked_and_timed(cell, direction, layout):
    case = replace(SMALL, cell=cell, direction=direction, T=8, layout=layout)
    found = run_case(case, ["torch", "plain", "rnnkernels"], 0, roofs.Roofs())
    assert not found["wrong"]
    assert found["id"].endswith(f"/{layout}")
    assert found["speedup"].keys() == {"torch"}
    assert found["over_plain"]["low"] > 0
    json.dumps(found, allow_nan=False)


def test_padding_is_not_counted_beside_the_plain_call(monkeypatch):
    timings = {"plain": Timing([1.0] * 3, 1), "torch": Timing([6.0] * 3, 1), "rnnkernels": Timing([2.0] * 3, 1)}
    monkeypatch.setattr("bench.run.measure", lambda runners, budget: {name: timings[name] for name in runners})
    found = run_case(replace(SMALL, T=4, B=2, layout="lengths"), list(timings), 0, roofs.Roofs())
    assert found["tokens"] == 1 + 4
    assert found["over_plain"] == {"median": 2 * 8 / 5, "low": 2 * 8 / 5, "high": 2 * 8 / 5}
    assert found["speedup"]["torch"]["median"] == 3


def test_lengths_and_resets_are_what_they_are_called():
    case = replace(SMALL, T=100, B=16)
    assert replace(case, layout=PADDED).lengths is replace(case, layout=PADDED).reset_mask is None
    lengths = replace(case, layout="lengths").lengths
    assert lengths.sort().values.tolist() == list(range(25, 101, 5))
    assert lengths.tolist() != lengths.sort().values.tolist()
    assert replace(case, layout="packed").lengths.equal(lengths)
    assert sorted(replace(case, layout="one_short").lengths.tolist()) == [50] + [100] * 15
    marked = replace(case, layout="resets")
    assert marked.reset_mask.sum() == 32
    assert marked.tokens == case.tokens == 1600
    assert marked.sweeps <= case.sweeps == 200
    assert replace(case, layout="lengths").flops * 1600 == case.flops * int(lengths.sum())


@pytest.mark.parametrize("direction", ["inference", "training"])
def test_a_compiled_loop_agrees(direction):
    pytest.importorskip("torch._inductor")
    case = replace(SMALL, cell="srn_sigmoid", direction=direction, T=2)
    found = run_case(case, ["loop", "compiled loop", "plain", "rnnkernels"], 0, roofs.Roofs())
    assert not found["wrong"]
    assert found["speedup"].keys() == {"loop", "compiled loop"}
    assert found["over_plain"]["median"] > 0


@pytest.mark.parametrize("direction", ["inference", "training"])
def test_compiled_layers_agree(direction):
    pytest.importorskip("torch._inductor")
    case = replace(SMALL, layout="compiled", direction=direction)
    found = run_case(case, ["torch", "rnnkernels"], 0, roofs.Roofs())
    assert case.id.endswith("/compiled")
    assert not found["wrong"]
    assert found["speedup"].keys() == {"torch"}


def test_a_long_loop_is_not_compiled():
    peer = peers.PEERS["compiled loop"]
    assert peer.why_not(replace(SMALL, cell="lstm_peephole", T=COMPILED_STEPS)) is None
    assert "minutes" in peer.why_not(replace(SMALL, cell="lstm_peephole", T=COMPILED_STEPS + 1))


@pytest.mark.parametrize(("cell", "plain"), [("lstm_peephole", "lstm"), ("gru_reset_before", "gru"), ("residual_relu", "srn")])
def test_the_plain_cell_has_as_many_products(cell, plain):
    case = replace(SMALL, cell=cell)
    assert peers.PLAIN.why_not(case) is None
    found = peers.PLAIN.prepare(case, peers.make_problem(case))()
    assert found["gradient of weight_hh"].shape == (replace(SMALL, cell=plain).page.hidden_gates * 5, 5)


def test_where_no_cell_is_plainer():
    assert "products by U: 0" in peers.PLAIN.why_not(replace(SMALL, cell="indrnn_tanh"))
    assert peers.PLAIN.why_not(SMALL)


def test_a_cell_that_is_given_its_gates_stands_against_one_without_input():
    case = replace(SMALL, cell="lstm_layer_norm")
    assert peers.PLAIN.prepare(case, peers.make_problem(case))()["gradient of weight_ih"].shape == (20, 0)


class Wrong(peers.Layers):
    def prepare(self, case, problem):
        run = super().prepare(case, problem)
        return lambda: {name: value * 1.01 for name, value in run().items()}


class Raising(peers.Layers):
    def prepare(self, case, problem):
        raise NotImplementedError("not today")


@pytest.mark.parametrize(("broken", "reason"), [(Wrong, "output differs"), (Raising, "not today")])
def test_wrong_results_are_not_timed(broken, reason, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(peers.PEERS, "rnnkernels", broken("rnnkernels", "torch.nn"))
    destination = tmp_path / "report.json"
    assert main(["--filter", "gru/training.*B1/", "--budget", "0", "--json", str(destination), "--threads", "1"]) == 1
    (case,) = json.loads(destination.read_text())["cases"]
    assert reason in case["wrong"]["rnnkernels"]
    assert case["peers"] == case["speedup"] == {}
    assert "cases are wrong" in capsys.readouterr().out


def test_a_wrong_peer_gets_no_ratio(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "stranger", Wrong("stranger", "torch.nn"))
    found = run_case(SMALL, ["torch", "stranger", "rnnkernels"], 0, roofs.Roofs())
    assert found["wrong"].keys() == {"stranger"}
    assert found["speedup"].keys() == {"torch"}


def test_gradients_count_as_results():
    run = peers.TORCH.prepare(SMALL, peers.make_problem(SMALL))
    expected = run()
    assert len([name for name in expected if name.startswith("gradient of")]) == 5
    assert "expected" in peers.difference({"output": expected["output"]}, expected, "float32")
    assert "differs" in peers.difference(expected | {"output": expected["output"] * torch.nan}, expected, "float32")


@pytest.mark.parametrize("cell", ["lstm", "gru", "srn"])
def test_onnxruntime_agrees(cell):
    case = replace(SMALL, cell=cell, direction="inference")
    peer = peers.PEERS["onnxruntime"]
    if reason := peer.why_not(case):
        pytest.skip(reason)
    problem = peers.make_problem(case)
    assert peers.difference(peer.prepare(case, problem)(), peers.TORCH.prepare(case, problem)(), case.dtype) is None


def test_onnxruntime_says_why_not():
    assert peers.PEERS["onnxruntime"].why_not(SMALL)


def measured(monkeypatch, bandwidth, barrier):
    answers = {"measure_bandwidth": lambda size, threads: bandwidth * threads, "measure_barrier": lambda threads: barrier}
    monkeypatch.setattr(roofs, "kernel_measure", answers.get)
    machine = roofs.Roofs()
    machine.rates = {("float32", threads): roofs.Rate(threads * 1e11, "nothing", list, 1) for threads in (1, 2)}
    return machine


def test_the_floor_is_the_roof_that_binds(monkeypatch):
    case = Case("lstm", "inference", "float32", T=100, B=1, I=128, H=128, threads=2)
    floor = measured(monkeypatch, bandwidth=50, barrier=0.25).floor(case)
    assert floor.roof == "cache"
    assert floor.seconds == pytest.approx(100 * case.weight_bytes / 100e9 + case.outside_flops / 2e11)
    # A dear barrier: one thread alone does better, and reads everything itself.
    alone = measured(monkeypatch, bandwidth=50, barrier=1000).floor(case)
    assert alone.seconds == pytest.approx(100 * case.weight_bytes / 50e9 + case.outside_flops / 2e11)
    assert measured(monkeypatch, 50, 0.25).floor(replace(case, B=128)).roof == "flops"


def test_a_page_adds_to_the_arithmetic(monkeypatch):
    case = Case("lstm", "training", "float32", T=100, B=128, I=128, H=128, threads=2)
    without = measured(monkeypatch, 50, 0.25).floor(case)
    answers = {"measure_bandwidth": lambda *_: 100, "measure_barrier": lambda _: 0.25, "measure_page": lambda *at: 3 if at[-1] else 2}
    machine = measured(monkeypatch, 50, 0.25)
    monkeypatch.setattr(roofs, "kernel_measure", answers.get)
    assert machine.floor(case).seconds == pytest.approx(without.seconds + 5e-9 * 100 * 128 * 128 / 2)
    assert machine.facts()["page"] == [{"cell": "lstm", "pass": "training", "dtype": "float32", "ns": pytest.approx(5)}]


@pytest.mark.parametrize("cell", ops.CELLS)
def test_pages_are_measured(cell):
    measure_page = roofs.kernel_measure("measure_page")
    for storage, training, backward in itertools.product(range(4), (False, True), (False, True)):
        assert 0 < measure_page(ops.CELLS[cell].index, storage, training, backward) < 1e6
    with pytest.raises(ValueError, match="no such cell"):
        measure_page(10**6, 0, False, False)


def test_the_rate_of_products_is_the_highest(monkeypatch):
    monkeypatch.setattr(roofs, "PRODUCTS", ((64, 64, 64),))
    monkeypatch.setattr(roofs, "kernel_measure", {"measure_product": lambda storage, threads: 1e6 if storage == 1 else 1e-6}.get)
    machine = roofs.Roofs()
    assert machine.rate("float64", 1).by == "a tile in registers"
    assert machine.flop_rate("float64", 1) == 1e15
    assert machine.rate("float32", 1).by == "torch.mm of 64 × 64 by 64 × 64"


def test_no_floor_without_measurements(monkeypatch):
    monkeypatch.setattr(roofs, "kernel_measure", lambda name: None)
    machine = roofs.Roofs(rates={("float32", 1): roofs.Rate(1e11, "nothing", list, 1)})
    assert machine.floor(SMALL) is None
    assert machine.facts()["bandwidth"][0]["gb_per_second"] is None


def test_the_recurrence_alone_is_what_more_steps_cost(monkeypatch):
    case = Case("gru", "inference", "float32", T=200, B=2, I=64, H=48, threads=1)
    machine = measured(monkeypatch, bandwidth=1e-3, barrier=0.25)  # a roof so low that no noise reaches it
    found = recurrence(case, 0, machine)
    assert (found["I"], found["floor"]["roof"]) == (1, "cache")
    slowest = machine.floor(replace(case, I=1)).seconds
    assert 0 < found["seconds"]["median"] < slowest
    assert found["share"]["median"] > 1


def test_the_recurrence_alone_on_the_command_line(tmp_path, capsys):
    path = tmp_path / "recurrence.json"
    command = ["run", "--preset", "recurrence", "--filter", "srn/.*/B1/.*H64/", "--threads", "1", "--budget", "0", "--json", str(path)]
    assert main(command) == 0
    assert [case["pass"] for case in json.loads(path.read_text())["cases"]] == ["inference", "training"]
    assert "the recurrence alone" in capsys.readouterr().out


def test_saved_memory_counts_each_storage_once():
    found = saved_for_backward(peers.TORCH, replace(SMALL, cell="srn"))
    assert found.with_output >= found.alone + 1
    assert found.alone > 0


@pytest.mark.slow
def test_the_peak_of_a_step_is_at_least_what_it_saves():
    case = replace(SMALL, T=400, B=64, I=64, H=64)
    peak, unit = peak_of_step("rnnkernels", case), case.tokens * case.H * 4
    assert 5 * unit <= peak
    assert peak_of_step("rnnkernels", case, recompute=True) < peak


@pytest.fixture
def synthetic(tmp_path):
    """A report nobody had to wait for: ours twice as fast as torch at B 1, four times at B 8; one case is wrong."""
    cases = []
    for case in select("grid", ["float32"], [2], "T100/(B1|B8)/"):
        ratio = 2.0 if case.B == 1 else 4.0
        seconds = case.flops / 1e11
        cases.append(
            {
                **case.facts(),
                "flops": case.flops,
                "floor": {"seconds": seconds / 2, "roof": "cache"},
                "share": 0.5,
                "peers": {
                    "rnnkernels": {"median": seconds, "low": seconds, "high": seconds},
                    "torch": {"median": seconds * ratio, "low": seconds, "high": seconds},
                },
                "speedup": {"torch": {"median": ratio, "low": ratio, "high": ratio}},
                "unavailable": {},
                "wrong": {},
            }
        )
    cases[0] |= {"wrong": {"rnnkernels": "output differs"}, "peers": {}, "speedup": {}, "share": None}
    path = tmp_path / "grid.json"
    path.write_text(json.dumps(report("grid", cases, roofs.Roofs(), [2])))
    return path


def test_plots(synthetic, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plots", "--from", str(synthetic)]) == 0
    written = [tmp_path / "grid-speedup.png", tmp_path / "grid-step.png"]
    assert capsys.readouterr().out.split() == [str(path) for path in written]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_the_table_in_the_readme(synthetic, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"above\n{tables.BEGIN}\nold\n{tables.END}\nbelow\n")
    for _ in range(2):  # what it wrote it can replace
        assert main(["tables", "--from", str(synthetic), "--write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith(f"{tables.END}\nbelow\n")
    assert "old" not in text
    (gru,) = [line for line in text.splitlines() if line.startswith("| gru training")]
    assert gru == "| gru training | 2.00× (2.00× to 2.00×) | 4.00× (4.00× to 4.00×) | 2.83× (2.00× to 4.00×) |"
    assert "1 of 48 cases gave wrong results" in text


def test_several_tables_in_the_readme(synthetic, tmp_path):
    half = json.loads(synthetic.read_text())
    for case in half["cases"]:
        case["dtype"] = "bfloat16"
    (tmp_path / "half.json").write_text(json.dumps(half))
    page = tmp_path / "README.md"
    page.write_text(f"{tables.BEGIN}\n{tables.END}\n")
    assert main(["tables", "--from", str(synthetic), str(tmp_path / "half.json"), "--write", str(page)]) == 0
    assert [line.count("--dtype bfloat16") for line in page.read_text().splitlines() if "--preset grid" in line] == [0, 1]
    rows = [line.split("|")[1].strip() for line in page.read_text().splitlines() if line.startswith("| gru")]
    assert rows == ["gru inference", "gru training", "gru bfloat16 inference", "gru bfloat16 training"]


def test_the_table_of_variants_is_by_peer(synthetic, tmp_path):
    report = json.loads(synthetic.read_text())
    for case in report["cases"]:
        if not case["wrong"]:
            case |= {"cell": "lstm_peephole", "speedup": {"loop": case["speedup"].pop("torch")}}
            case["over_plain"] = {"median": 1.5, "low": 1.5, "high": 1.5}
    lines = tables.markdown(report).splitlines()
    assert lines[0] == "| | × loop | of plain's time |"
    assert "| lstm_peephole training | 2.83× (2.00× to 4.00×) | 1.50× (1.50× to 1.50×) |" in lines
    assert any(line.startswith("| all inference |") for line in lines)


def test_a_table_says_which_instruction_set_was_asked_for(synthetic):
    report = json.loads(synthetic.read_text())
    assert "`python -m rnnkernels bench --preset grid`" in tables.markdown(report)
    report["machine"]["RNNKERNELS_ISA"] = "avx2"
    assert "`RNNKERNELS_ISA=avx2 python -m rnnkernels bench --preset grid`" in tables.markdown(report)


def test_the_table_of_many_batches_is_by_peer(synthetic):
    report = json.loads(synthetic.read_text())
    for B, case in enumerate(report["cases"], 1):
        case["B"] = B
    lines = tables.markdown(report).splitlines()
    assert lines[0] == "| | × torch |"
    assert "| gru training | 2.83× (2.00× to 4.00×) |" in lines
    assert any("over T 100, B 1 to 48 and H 64, 128, 256, 512." in line for line in lines)


def test_a_page_without_markers_is_left_alone(synthetic, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("no place for a table")
    with pytest.raises(SystemExit, match="bench:begin"):
        main(["tables", "--from", str(synthetic), "--write", str(page)])
    assert page.read_text() == "no place for a table"


def test_goals_count_what_is_reached_and_what_the_roof_allows(synthetic, capsys):
    assert main(["goals", "--from", str(synthetic)]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Twice torch's speed at B 1, four times at B 8, always at half of the roof.
    unit = "times the better peer's speed"
    assert f"| LSTM training, B 1, H to 256 | 2.5 | {unit} | 3 | 0 | 3 | 2.00 (2.00 to 2.00) |" in lines
    assert f"| LSTM training, B 8 | 1.1 | {unit} | 4 | 4 | 4 | 4.00 (4.00 to 4.00) |" in lines
    assert f"| GRU training, B 1, H to 256 | 20 | {unit} | 3 | 0 | 0 | 2.00 (2.00 to 2.00) |" in lines
    assert f"| all | 1 | {unit} | 47 | 47 | 47 | 4.00 (2.00 to 4.00) |" in lines, "but for the wrong one"
    assert not any("recurrence's roof" in line for line in lines), "the report says nothing of it"


def test_goals_at_most(synthetic, tmp_path):
    report = json.loads(synthetic.read_text()) | {"preset": "memory"}
    report["cases"] = [case for case in report["cases"] if case["pass"] == "training" and case["cell"] == "gru"]
    for case, peak in zip(report["cases"], (5, 6, 7), strict=False):
        case["peak_bytes"] = {"torch": 10, "rnnkernels": peak, "recompute": peak}
    page = tmp_path / "page.md"
    page.write_text(f"{goals.BEGIN}\n{goals.END}\n")
    (tmp_path / "memory.json").write_text(json.dumps(report))
    assert main(["goals", "--from", str(tmp_path / "memory.json"), "--write", str(page)]) == 0
    line = next(line for line in page.read_text().splitlines() if "at most 0.6" in line)
    assert line == "| LSTM and GRU training | at most 0.6 | of torch's peak memory | 3 | 2 | – | 0.60 (0.50 to 0.70) |"
    assert "--preset memory --saved" in page.read_text()


def test_every_goal_takes_cases_of_its_preset():
    for goal in goals.GOALS:
        cases = [case.facts() for case in select(goal.preset, ["float32"], [2])]
        assert any(map(goal.takes, cases)), str(goal)
    assert len({(str(goal), goal.figure) for goal in goals.GOALS}) == len(goals.GOALS)

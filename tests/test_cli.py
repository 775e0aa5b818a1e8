"""python -m rnnkernels: info and verify, and the verdict when a kernel is wrong."""

import json
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from rnnkernels import ops, reference, verify
from rnnkernels.__main__ import main

pytestmark = pytest.mark.skipif(find_spec("rich") is None, reason="the command line's tables need rich")

ONE_CELL = ["verify", "--quick", "--cell", "gru", "--dtype", "float32", "--isa", "scalar"]


def test_info_is_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["isa"] in facts["isas"]
    assert {"version", "compiler", "cuda", "threads", "cpu", "torch", "python"} <= facts.keys()


def test_info_as_text(capsys):
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_verify_passes(capsys, tmp_path):
    before = ops.build_info()["isa"]
    report = tmp_path / "verify.json"
    assert main([*ONE_CELL, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    assert found["ok"]
    (row,) = found["rows"]
    assert row["isa"] == "scalar"
    assert row["failed"] == 0
    assert row["checks"] > 40
    assert "ok" in capsys.readouterr().out
    assert ops.build_info()["isa"] == before


def scaled(*args, **kwargs):
    output, *states = reference.sequence(*args, **kwargs)
    return output * 1.01, *states


def poisoned(*args, **kwargs):
    output, *states = reference.sequence(*args, **kwargs)
    return output, *(state * torch.nan for state in states)


def raising(*args, **kwargs):
    raise NotImplementedError("not today")


@pytest.mark.parametrize("broken", [scaled, poisoned, raising])
def test_verify_fails_on_a_broken_kernel(broken, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ops, "sequence", broken)
    report = tmp_path / "verify.json"
    assert main([*ONE_CELL, "--json", str(report)]) == 1
    found = json.loads(report.read_text())
    assert not found["ok"]
    assert all(row["failed"] > 0 for row in found["rows"])
    assert ("not today" in capsys.readouterr().out) == (broken is raising)


@pytest.mark.parametrize("option", ["--cell", "--dtype", "--isa"])
def test_verify_names_what_it_does_not_know(option):
    with pytest.raises(SystemExit, match=r"unknown .*: nonsense; known: "):
        main(["verify", option, "nonsense"])


def test_unknown_options_are_refused():
    with pytest.raises(SystemExit):
        main(["info", "--nonsense"])


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", ["srn_tanh", "srn_relu", "lstm", "gru", "lstm_projected"])
def test_the_two_witnesses_agree(cell, reverse, ragged):
    """torch.nn, turned round where it must be, and the reference loop compute the same problem."""
    family = verify.Family("both", T=5, B=4, I=3, H=6, ragged=ragged, reverse=reverse)
    problem = verify.make(cell, family, torch.float64)
    expected = verify.compute(reference.sequence, problem)
    for name, value in verify.compute(verify.nn_sequence, problem).items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_bench_is_found(capsys):
    assert main(["bench", "--list", "--preset", "figures"]) == 0
    assert "lstm/inference/float32/T100/B1/I64/H64" in capsys.readouterr().out


def test_bench_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rnnkernels.__main__.__file__", str(tmp_path / "rnnkernels" / "__main__.py"))
    with pytest.raises(SystemExit, match="clone the repository"):
        main(["bench"])


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("rnnkernels.__main__.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'rnnkernels\[cli\]'"):
        main(ONE_CELL)


@pytest.mark.parametrize(
    ("cuda", "says"),
    [
        (None, "no: this build has no CUDA part; install it where nvcc is on PATH"),
        ({"driver": 0, "architectures": "80-real", "devices": []}, "no: built for 80-real, but there is no NVIDIA driver here"),
        ({"driver": 13000, "architectures": "80-real", "devices": []}, "no: built for 80-real, but the driver shows no device"),
    ],
    ids=["not built", "no driver", "no device"],
)
def test_info_says_what_a_gpu_lacks(cuda: Any, says: str) -> None:
    from rnnkernels.__main__ import gpu

    assert gpu(cuda).startswith(says)


def test_verify_gives_a_cell_all_of_its_numbers(capsys):
    assert main(["verify", "--quick", "--cell", "srn_tanh_tangent", "--dtype", "float32", "--isa", "scalar"]) == 0
    assert "hold" in capsys.readouterr().out

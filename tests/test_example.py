import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "char_lm.py"
STEPS = 6


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, EXAMPLE, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_char_lm(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog. çа∂🦊\n" * 40, encoding="utf-8")
    output = tmp_path / "made" / "here"
    sizes = ("--steps", STEPS, "--hidden", 24, "--batch", 3, "--length", 20, "--sample", 30)
    done = run("--text", text, *sizes, "--output", output)
    assert done.returncode == 0, done.stderr
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert set(report["cells"]) == {"LSTM", "GRU"}
    for cell in report["cells"].values():
        theirs, ours = cell["losses"]["torch.nn"], cell["losses"]["rnnkernels"]
        assert len(theirs) == len(ours) == STEPS
        assert all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(theirs, ours, strict=True))
        assert ours[-1] < ours[0]
        assert len(cell["sample"]) == 24 + 30


def test_text_too_short(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("too short", encoding="utf-8")
    done = run("--text", text)
    assert done.returncode == 2
    assert "the text has 9 characters" in done.stderr


def test_leaky() -> None:
    done = subprocess.run([sys.executable, EXAMPLE.with_name("leaky.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = [float(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("iteration")]
    assert len(errors) == 6
    assert errors[-1] < errors[0] / 2


def printed(*command: object) -> str:
    """What an example prints."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_recurrent_ppo() -> None:
    text = printed(sys.executable, EXAMPLE.with_name("recurrent_ppo.py"), "--rounds", 30)
    assert "acting and learning: 0.0e+00 apart" in text, "a stream's steps and a sequence's are the same bits"
    assert numbers(r": (\S+) of the turns right", text)[-1] > 0.9


def test_tagging() -> None:
    text = printed(sys.executable, EXAMPLE.with_name("tagging.py"), "--steps", 60, "--files", 20)
    right = numbers(r", (\S+)% of the characters", text)
    assert right[-1] > right[0]
    assert right[-1] > 70


def test_dates() -> None:
    text = printed(sys.executable, EXAMPLE.with_name("dates.py"), "--steps", 60, "--hidden", 64)
    losses = numbers(r"loss (\S+),", text)
    assert losses[-1] < losses[0] / 1.5


def test_streaming_audio() -> None:
    text = printed(sys.executable, EXAMPLE.with_name("streaming_audio.py"), "--steps", 20)
    assert "the same bits as the whole recording" in text


def test_ddp() -> None:
    text = printed(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, EXAMPLE.with_name("ddp.py"), "--steps", 50)
    errors = numbers(r"error (\S+) on 2 processes", text)
    assert len(errors) == 5
    assert errors[-1] < errors[0]

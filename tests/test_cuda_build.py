"""What the CUDA compiler says of the kernels: no spills, no arrays in local memory. Needs nvcc, no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rnnkernels import ops

ROOT = Path(__file__).resolve().parent.parent


# The build under RNNKERNELS_STRICT holds every HOT cell to this on every architecture; here are those whose report is read.
CASES = [("indrnn_relu", "90a"), ("gru_layer_norm", "90a"), ("lstm_projected_zoneout", "80")]


def compiled(cell: str, arch: str, kind: str, folder: Path, *options: str) -> str:
    """What the compiler says of a cell's kernels, which come to lie in `folder`."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine: the CUDA kernels are not compiled here")
    page = re.search(rf"^RNN_CELL\({cell}, (HOT|WARM|COLD), (.+)\)$", (ROOT / "csrc/cells/cells.def").read_text(), re.MULTILINE)
    assert page
    template = (ROOT / "csrc/engines/cuda/cell.cu.in").read_text()
    source = folder / f"{cell}.cu"
    source.write_text(template.replace("@name@", cell).replace("@heat@", page[1]).replace("@page@", page[2]))
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        "-fmad=false",
        f"-I{ROOT / 'csrc'}",
        arch,
        *options,
        kind,
        "-o",
        str(folder / "kernels"),
        str(source),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize(("cell", "arch"), CASES)
def test_no_kernel_spills_or_keeps_an_array_in_memory(cell: str, arch: str, tmp_path: Path) -> None:
    report = compiled(cell, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", tmp_path, "-Xptxas", "-v")
    kernels = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    persistent = [name for name, *_ in kernels if re.search(r"\d+(forward|backward)_kernel", name)]
    kinds = (
        0 if ops.heats()[cell] == "COLD" else 4 if ops.CELLS[cell].hidden_gates else 3
    )  # float32, bfloat16, float16; tensor cores for float32
    assert len(persistent) == 2 * kinds, "forward and backward"
    assert not [kernel for kernel in kernels if kernel[1:] != ("0", "0", "0")], kernels


def test_a_persistent_kernel_compiles_to_ptx(tmp_path: Path) -> None:
    report = compiled("indrnn_relu", "-gencode=arch=compute_90,code=compute_90", "-ptx", tmp_path)
    assert not report
    assert ".target sm_90" in (tmp_path / "kernels").read_text()

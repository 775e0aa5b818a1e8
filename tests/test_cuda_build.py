"""What the CUDA compiler says of the kernels: no spills, no arrays in local memory. Needs nvcc, no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rnnkernels import ops

ROOT = Path(__file__).resolve().parent.parent


# The build under RNNKERNELS_STRICT holds every cell to this on every architecture; here are those whose report is read.
CASES = [
    ("lstm", "90a"),
    ("lstm", "80"),
    ("lstm_projected", "90a"),
    ("gru_reset_before", "80"),
    ("indrnn_relu", "90a"),
    ("srn_identity", "80"),
]


@pytest.mark.parametrize(("cell", "arch"), CASES)
def test_no_kernel_spills_or_keeps_an_array_in_memory(cell: str, arch: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine: the CUDA kernels are not compiled here")
    page = re.search(rf"^RNN_CELL\({cell}, (HOT|COLD), (.+)\)$", (ROOT / "csrc/cells/cells.def").read_text(), re.MULTILINE)
    assert page
    template = (ROOT / "csrc/engines/cuda/cell.cu.in").read_text()
    source = tmp_path / f"{cell}.cu"
    source.write_text(template.replace("@name@", cell).replace("@heat@", page[1]).replace("@page@", page[2]))
    command = [nvcc, "-std=c++17", "-O3", "-fmad=false", f"-I{ROOT / 'csrc'}", "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "kernels.cubin"), str(source)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    kernels = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    persistent = [name for name, *_ in kernels if re.search(r"\d+(forward|backward)_kernel", name)]
    kinds = 0 if page[1] == "COLD" else 4 if ops.CELLS[cell].hidden_gates else 3  # float32, bfloat16, float16; tensor cores for float32
    assert len(persistent) == 2 * kinds, "forward and backward"
    assert not [kernel for kernel in kernels if kernel[1:] != ("0", "0", "0")], kernels

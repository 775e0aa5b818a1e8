"""A call under autocast: what torch.nn makes of its dtypes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch

from .checks import Call
from .packed import Packed

GRU = re.compile("gru(_candidate|_layer_norm|_gate_norm|_zoneout|_grad_clip|_dropout)*")
LSTM = re.compile("lstm(_.*)?")


def keeps_dtype(cell: str, is_step: bool) -> bool:
    """Whether autocast is on on the CPU and leaves a cell the dtype of its state, as torch.nn's GRU and, a step at a time, its LSTM."""
    return torch.is_autocast_enabled("cpu") and bool(GRU.fullmatch(cell) or (is_step and LSTM.fullmatch(cell)))


def autocast(call: Call, packed: Packed | None, is_step: bool) -> Call:
    """As torch.nn."""
    place, weights = call.input.device.type, call.weights()
    if place == "cpu" and keeps_dtype(call.cell, is_step):
        dtype = (call.states[-1] if call.states else call.input).dtype  # of an LSTM c's
    else:
        dtype = torch.get_autocast_dtype(place)
    if packed is not None and any(t is not None and t.dtype not in (dtype, torch.float64) for t in weights):
        raise RuntimeError(f"weight_dtype: expected None where autocast makes the weights {dtype}, got {packed.weight_dtype}")

    def cast(t: Any) -> Any:
        return t if t is None or t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype)

    states = None if call.states is None else [cast(t) for t in call.states]
    given, resets = [cast(t) for t in call.given], [cast(t) for t in call.reset_states]
    ih, hh, bias_ih, bias_hh, hr, v = [cast(w) for w in weights]
    call = call.changed(input=cast(call.input), states=states, given=given, reset_states=resets)
    return call.changed(weight_ih=ih, weight_hh=hh, bias_ih=bias_ih, bias_hh=bias_hh, weight_hr=hr, weight_v=v)


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """On the CPU, where it is on. ``torch.autocast(enabled=False)`` takes longer than a step."""
    torch.set_autocast_enabled("cpu", False)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cpu", True)

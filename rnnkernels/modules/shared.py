"""What layers and cells share: names, checks of what forward was given, and how a tracer takes them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import ops

SRNS = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "sigmoid": "RNN_SIGMOID", "identity": "RNN_IDENTITY"}

_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def whole(forward: _Forward) -> _Forward:
    """Let torch.fx take the module as one, as it takes torch.nn's by their name."""

    @functools.wraps(forward)
    def called(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, torch.fx.Proxy):
            tracer: Any = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *args), kwargs)
        return forward(self, input, *args, **kwargs)

    return called  # type: ignore[return-value]


def checked_engine(engine: str) -> str:
    """The engine, if there is one of that name."""
    if engine not in ops.ENGINES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, ops.ENGINES))}, got {engine!r}")
    return engine


def named(module: nn.Module, names: Sequence[str]) -> list[Any]:
    """The module's weights of these names, None for those that it has not."""
    # The dictionary is much quicker than getattr. What is not in it is None or an attribute that replaced a Parameter: weight drop,
    # weight_norm, a parametrization, a data-parallel replica.
    parameters = module._parameters
    return [getattr(module, name, None) if (weight := parameters.get(name)) is None else weight for name in names]


def plain_states(cell: str, hx: Any, rank: int) -> Sequence[Tensor] | None:
    """Those of the cell, none for zeros; or None, and they have to be looked at."""
    if hx is None:
        return ()
    count = len(ops.CELLS[cell].states)
    states = hx if count > 1 else (hx,)
    plain = type(states) is tuple and len(states) == count and all(type(state) is Tensor and state.dim() == rank for state in states)
    return states if plain else None


def check_agreement(input: Tensor, states: Sequence[Tensor], weight: Tensor) -> None:
    """Raise, with torch.nn's texts, unless input, states and weight share a device and, outside autocast, a dtype."""
    device, dtype = input.device, weight.dtype
    for tensor in (*states, weight):
        if tensor.device != device:
            name = "parameter" if tensor is weight else "hidden"
            raise RuntimeError(
                f"Input and {name} tensors are not at the same device, found input tensor at {device} and {name} tensor at {tensor.device}"
            )
    for tensor in (input, *states):
        if tensor.dtype != dtype and not torch._C._is_any_autocast_enabled():
            found, expected = (t.type().split(".")[-1].removesuffix("Tensor") for t in (tensor, weight))
            raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {found} and {expected}")


def check_ranks(states: Sequence[Tensor], rank: int) -> None:
    """Raise, with torch.nn's texts, unless all states have this rank."""
    for state in states:
        if state.dim() != rank:
            case = "batched 3-D" if rank == 3 else "unbatched 2-D"
            ranks = ", ".join(f"{state.dim()}-D" for state in states)
            found = f"hx should also be {rank}-D but got {ranks} tensor"
            if len(states) == 2:
                found = f"hx and cx should also be {rank}-D but got ({ranks}) tensors"
            raise RuntimeError(f"For {case} input, {found}")


def pair(hx: Any, function: str, name: str = "hx") -> tuple[Tensor, Tensor]:
    """The two states of hx, or what torch.nn's function of that name would say; of another argument, its own name."""
    if name != "hx" and (isinstance(hx, Tensor) or len(hx) != 2):
        raise TypeError(f"{name}: expected two tensors, as hx, got {'a Tensor' if isinstance(hx, Tensor) else len(hx)}")
    if isinstance(hx, Tensor):
        raise TypeError(f"{function}(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
    if len(hx) != 2:
        raise RuntimeError(f"{function} expects two hidden states")
    return hx[0], hx[1]

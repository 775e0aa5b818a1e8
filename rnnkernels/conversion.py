"""``convert``: torch.nn's recurrent modules in a model for ours, and back; ``accelerate``: the same with a report."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from . import modules
from .modules import Explanation, explain
from .modules.cells import CellBase
from .modules.modifiers import MODIFIERS
from .ops.cells import STORAGE

__all__ = ["Acceleration", "Change", "accelerate", "convert"]

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: modules.RNN,
    nn.GRU: modules.GRU,
    nn.LSTM: modules.LSTM,
    nn.RNNCell: modules.RNNCell,
    nn.GRUCell: modules.GRUCell,
    nn.LSTMCell: modules.LSTMCell,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
# Of torch.nn's layers, what is not of their state: they make it anew.
_FLAT = ("_flat_weights", "_flat_weight_refs")
# What ours know beyond torch.nn and a module of torch.nn could not do: it must be as it is by default.
_BEYOND = (*MODIFIERS, "learn_initial")
_KEPT_BY_US = (*_BEYOND, "engine", "recompute", "weight_dtype", "_packed", "_singles", "forget_bias", "recurrent_init", "_argument_names")


@dataclass(frozen=True)
class Change:
    """A module of a model: where, what it was, what it is now (None: left alone, and ``why``), and what runs it.

    ``engines``: a plan for each layer and direction, on the input that ``accelerate`` was shown or supposed.
    """

    path: str
    before: str
    after: str | None
    why: str
    engines: Explanation | None = None

    def __str__(self) -> str:
        if self.after is None:
            return f"{self.path or '(the model)'}: {self.before} left alone: {self.why}"
        plans = "" if self.engines is None else "".join(f"\n    {plan}" for plan in self.engines.plans)
        return f"{self.path or '(the model)'}: {self.before} -> {self.after}{self.why and ', ' + self.why}{plans}"


@dataclass(frozen=True)
class Acceleration:
    """What :func:`accelerate` did: the ``model``, and a :class:`Change` for each recurrent module. ``str`` gives a line for each."""

    model: nn.Module
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.changes)) or "no recurrent module of torch.nn in it"


def convert(model: nn.Module, to: ModuleType | None = None, *, strict: bool = True) -> nn.Module:
    """Replace every recurrent layer and cell of torch.nn inside ``model`` by ours, or, ``to=torch.nn``, ours by torch.nn's.

    The new modules have the old ones' Parameters themselves, so that an optimizer stays valid, their buffers, hooks and the handles of
    these, parametrizations, mode, and whatever attributes were set on them. A module that is in the model twice is replaced by one. What
    a Python list or an attribute that is no submodule refers to is not seen.

    Args:
        model: changed in place, all of it or, where something is refused, nothing.
        to: ``rnnkernels`` (None) or ``torch.nn``, for instance before an export to ONNX.
        strict: whether to raise where a module is recurrent and cannot be converted; otherwise it is left alone.

    Returns:
        ``model``; the new layer, if it is itself one of those.

    Raises:
        TypeError: a subclass, whose own methods would be lost; a module whose forward was replaced; with ``to=torch.nn`` a layer that
            torch.nn has not (another cell, a modifier). The text names each with its path. ValueError: another ``to``.

    >>> import torch, rnnkernels
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LSTM(3, 5))
    >>> rnnkernels.convert(model)[1]
    LSTM(3, 5)
    >>> type(rnnkernels.convert(model, to=torch.nn)[1])
    <class 'torch.nn.modules.rnn.LSTM'>
    """
    return _convert(model, to, strict)[0]


def accelerate(model: nn.Module, *inputs: Any, **named: Any) -> Acceleration:
    """Convert a model, and tell what changed, which engine each layer gets, and what was left alone and why.

    Args:
        model: as :func:`convert` takes it, with ``strict=False``.
        inputs, named: what the model's forward takes. If given, the model is called once, before anything is changed, without gradients
            and in the mode that it is in (so in training the running statistics of its norms move), to see what comes to each layer;
            torch's generators are left as they were. Otherwise the report supposes 100 steps of 16 rows.

    Raises:
        What the model does of such inputs; then it is as it was.

    >>> import torch, rnnkernels
    >>> model = torch.nn.ModuleDict({"encoder": torch.nn.GRU(3, 5), "head": torch.nn.Linear(5, 2)})
    >>> report = rnnkernels.accelerate(model)
    >>> print(str(report).splitlines()[0])
    encoder: torch.nn.GRU -> rnnkernels.GRU, on 100 steps of 16 rows
    """
    seen = _inputs_of(model, inputs, named) if inputs or named else {}
    converted, changes = _convert(model, None, strict=False)
    by_path = dict(converted.named_modules(remove_duplicate=False))
    return Acceleration(converted, tuple(_with_engines(change, by_path[change.path], seen, bool(inputs or named)) for change in changes))


def _convert(model: nn.Module, to: ModuleType | None, strict: bool) -> tuple[nn.Module, list[Change]]:
    back = to is nn
    if not back and to is not None and getattr(to, "__name__", None) != __package__:
        raise ValueError(f"to: expected rnnkernels or torch.nn, got {to!r}")
    table = _THEIRS if back else _OURS
    changes: list[Change] = []
    made: dict[int, nn.Module] = {}
    for path, module in _recurrent(model, back):
        kind = _kind(module)
        why = _why_not(module, kind, table, back)
        changes.append(Change(path, _name(kind), None if why else _name(table[kind]), why))
        if not why and id(module) not in made:
            made[id(module)] = _made(module, kind, table[kind], back)
    refused = [change for change in changes if change.after is None]
    if strict and refused:
        raise TypeError("\n".join(["convert: strict=False leaves alone what cannot be converted:", *map(str, refused)]))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in made:
                parent._modules[name] = made[id(child)]
    return made.get(id(model), model), changes


def _recurrent(model: nn.Module, back: bool) -> Iterator[tuple[str, nn.Module]]:
    """The modules in question, with their paths: torch.nn's and what is made of them; ours, on the way back."""
    for path, module in model.named_modules(remove_duplicate=False):
        ours = hasattr(module, "_sequences")  # as explain knows them
        if ours if back else isinstance(module, nn.RNNBase | nn.RNNCellBase) and not ours:
            yield path, module


def _kind(module: nn.Module) -> type[nn.Module]:
    return parametrize.type_before_parametrizations(module)


def _name(kind: type[nn.Module]) -> str:
    for package in ("torch.nn", __package__):
        if kind.__module__.startswith(f"{package}."):
            return f"{package}.{kind.__qualname__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def _why_not(module: nn.Module, kind: type[nn.Module], table: dict[type[nn.Module], type[nn.Module]], back: bool) -> str:
    if kind not in table:
        if back:
            return "torch.nn has no such layer"
        parent = next((base for base in kind.__mro__ if base in table), None)
        if parent is None:
            return "it is none of torch.nn's layers"
        return f"it is a subclass of {_name(parent)}, and what it does of its own would be lost"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if back:
        used = [name for name in _BEYOND if getattr(module, name, None)]
        if used:
            return f"torch.nn has no {used[0]} (here {getattr(module, used[0])!r})"
        nonlinearity = getattr(module, "nonlinearity", "tanh")
        return "" if nonlinearity in ("tanh", "relu") else f"torch.nn has no nonlinearity {nonlinearity!r}"
    for weight in module.parameters():
        if weight.dtype not in STORAGE:
            return f"its parameters are {weight.dtype}, and there are kernels for float32, float64, bfloat16 and float16"
        if weight.device.type not in ("cpu", "cuda", "meta"):
            return f"it lies on {weight.device}, and there are kernels for the CPU and CUDA"
    return ""


def _made(module: nn.Module, kind: type[nn.Module], target: type[nn.Module], back: bool) -> nn.Module:
    """The module as another class, with the same state: not a copy, so that handles of hooks and an optimizer stay valid."""
    if type(module) is not kind:  # a class of parametrize's making, with a property for each tensor
        of_python = ("__dict__", "__weakref__", "__doc__", "__module__")
        own = {name: value for name, value in vars(type(module)).items() if name not in of_python}
        target = type(type(module).__name__, (target,), own)
    new = target.__new__(target)
    without = _KEPT_BY_US if back else _FLAT
    vars(new).update({name: value for name, value in vars(module).items() if name not in without})
    for hooks in (new._load_state_dict_pre_hooks, new._state_dict_hooks):
        for hook in hooks.values():
            if getattr(hook, "with_module", False):
                vars(hook)["module"] = weakref.ref(new)  # those that take the module refer to it weakly
    if isinstance(new, nn.RNNBase):
        new._init_flat_weights()
    return new


def _inputs_of(model: nn.Module, inputs: Any, named: Any) -> dict[str, tuple[Any, Any]]:
    """What comes first to each recurrent module of torch.nn's, by its paths, when the model runs."""
    seen: dict[str, tuple[Any, Any]] = {}
    paths: dict[nn.Module, list[str]] = {}
    for path, module in _recurrent(model, back=False):
        paths.setdefault(module, []).append(path)

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        for path in paths[module]:
            seen.setdefault(path, (given.get("input"), given.get("hx")))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in paths]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model(*inputs, **named)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _with_engines(change: Change, module: nn.Module, seen: dict[str, tuple[Any, Any]], ran: bool) -> Change:
    if change.after is None:
        return change
    if change.path in seen:
        input, hx = seen[change.path]
        return Change(change.path, change.before, change.after, f"on {_shape(input)}", explain(module, input, hx))
    if ran:
        return Change(change.path, change.before, change.after, "not called on this input")
    weight: Tensor = next(module.parameters())
    size: Any = module.input_size
    step = isinstance(module, CellBase)
    input = weight.new_zeros(()).detach().expand((16, size) if step else (16, 100, size) if module.batch_first else (100, 16, size))
    if weight.is_meta:
        return Change(change.path, change.before, change.after, "no engine on the meta device")
    return Change(change.path, change.before, change.after, f"on {'a step' if step else '100 steps'} of 16 rows", explain(module, input))


def _shape(input: Any) -> str:
    if isinstance(input, PackedSequence):
        return f"a PackedSequence of {len(input.batch_sizes)} steps of up to {int(input.batch_sizes[0])} rows"
    return f"{input.dtype} {tuple(input.shape)}"

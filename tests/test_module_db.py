"""torch's own samples for its six recurrent modules, its reference functions and its bad input, asked of ours.

torch's tests of nn.Module run over the same list and ask the same: outputs against the reference function and torch.nn, gradcheck and
gradgradcheck, non-contiguous input, train and eval, pickle and state_dict, every error's type and words.
"""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db

import rnnkernels

NAMES = ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"]
INFOS: dict[str, ModuleInfo] = {info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in NAMES}
every = pytest.mark.parametrize("name", NAMES)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def samples(name: str, dtype: torch.dtype = torch.float64, requires_grad: bool = False, training: bool = True) -> Iterator[Any]:
    """(ours, torch's with the same weights, positional arguments, keyword arguments, the reference function) of every sample."""
    info = INFOS[name]
    more = {"with_packed_sequence": True} if name in ("RNN", "GRU") else {}
    torch.manual_seed(0)
    for sample in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training, **more):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        theirs = info.module_cls(*args, **kwargs).to(dtype).train(training)
        ours = getattr(rnnkernels, name)(*args, **kwargs).to(dtype).train(training)
        ours.load_state_dict(theirs.state_dict())
        given = sample.forward_input
        packed = isinstance(given.args[0], PackedSequence)  # the reference functions take none
        yield ours, theirs, given.args, given.kwargs, None if packed else sample.reference_fn


def mapped(f: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, PackedSequence):
        return value._replace(data=f(value.data))
    return type(value)(mapped(f, v) for v in value) if isinstance(value, (tuple, list)) else value


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in flat(part)]


def as_function(module: nn.Module, args: Any) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The module as a function of its floating-point inputs and its parameters."""
    inputs, names = flat(args), [name for name, _ in module.named_parameters()]

    def f(*values: Tensor) -> tuple[Tensor, ...]:
        rest = iter(values[: len(inputs)])
        given = mapped(lambda _: next(rest), args)
        parameters = dict(zip(names, values[len(inputs) :], strict=True))
        return tuple(flat(torch.func.functional_call(module, parameters, tuple(given))))

    return f, [t.detach().clone().requires_grad_() for t in (*inputs, *module.parameters())]


@every
@dtypes
def test_forward(name: str, dtype: torch.dtype) -> None:
    for ours, theirs, args, kwargs, reference in samples(name, dtype):
        found = ours(*args, **kwargs)
        torch.testing.assert_close(found, theirs(*args, **kwargs))
        if reference is not None:
            torch.testing.assert_close(found, reference(ours, *args, **kwargs))


@every
def test_gradients(name: str) -> None:
    for ours, theirs, args, _, _ in samples(name):
        results = []
        for module in (ours, theirs):
            f, values = as_function(module, args)
            outputs = f(*values)
            torch.manual_seed(1)
            results.append(torch.autograd.grad(outputs, values, [torch.randn_like(output) for output in outputs]))
        torch.testing.assert_close(*results)


@every
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=["gradcheck", "gradgradcheck"])
def test_derivatives(name: str, check: Callable[..., bool]) -> None:
    cases = list(samples(name))
    for ours, _, args, _, _ in cases[:: max(1, len(cases) // 4)]:
        f, values = as_function(ours, args)
        assert check(f, values, check_batched_grad=False, fast_mode=True)


@every
@dtypes
def test_non_contiguous(name: str, dtype: torch.dtype) -> None:
    spread = lambda t: torch.repeat_interleave(t, 2, dim=-1)[..., ::2]  # noqa: E731
    for ours, _, args, kwargs, _ in samples(name, dtype, requires_grad=True):
        outputs = flat(ours(*args, **kwargs))
        whole = torch.autograd.grad([o.sum() for o in outputs], list(ours.parameters()))
        found = flat(ours(*mapped(spread, args), **kwargs))
        torch.testing.assert_close(found, outputs)
        torch.testing.assert_close(torch.autograd.grad([o.sum() for o in found], list(ours.parameters())), whole)


@every
def test_copies(name: str) -> None:
    for ours, theirs, args, kwargs, _ in samples(name):
        stored = io.BytesIO()
        torch.save(ours, stored)
        stored.seek(0)
        expected = ours(*args, **kwargs)
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(stored, weights_only=False)):
            torch.testing.assert_close(copied(*args, **kwargs), expected, rtol=0, atol=0)
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())


@every
def test_train_and_eval(name: str) -> None:
    """No sample has dropout, so the two modes give the same numbers."""
    for ours, _, args, kwargs, _ in samples(name):
        trained = ours(*args, **kwargs)
        torch.testing.assert_close(ours.eval()(*args, **kwargs), trained, rtol=0, atol=0)


@every
def test_factory_arguments(name: str) -> None:
    for ours, theirs, _, _, _ in samples(name, torch.float64):
        assert [(k, p.dtype, p.device) for k, p in ours.named_parameters()] == [
            (k, p.dtype, p.device) for k, p in theirs.named_parameters()
        ]
        assert all(p.is_meta for p in copy.deepcopy(ours).to("meta").parameters())


@every
@dtypes
def test_errors(name: str, dtype: torch.dtype) -> None:
    info = INFOS[name]
    cases = info.module_error_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=False)
    assert cases
    for case in cases:
        args, kwargs = case.module_error_input.constructor_input.args, case.module_error_input.constructor_input.kwargs
        module_class = getattr(rnnkernels, name)
        if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                module_class(*args, **kwargs)
        else:
            module = module_class(*args, **kwargs)
            given = case.module_error_input.forward_input
            with pytest.raises(case.error_type, match=case.error_regex):
                module(*given.args, **given.kwargs)

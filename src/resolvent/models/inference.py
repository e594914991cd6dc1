"""Evaluation mode for one call, without a change to the mode of a model that other threads share."""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import nn

from ..errors import ConfigError

Module = TypeVar("Module", bound=nn.Module)


def inference_view(model: Module, *, parameter_gradients: bool = True) -> Module:
    """Return a model in evaluation mode that shares the weights of ``model``; the mode of ``model`` does not change.

    The view has modules of its own, and shares parameters and buffers. So mode, hooks and attributes of the one do not
    affect the other: threads generate from one model without a lock, and a stream that waits between two tokens does
    not disturb a training step. A training loop in another thread is out of scope: its mode stays intact, but the
    optimiser changes the weights while the view reads them.

    There is no view of a module whose ``forward`` was replaced on the instance (``torch.compile``, Accelerate) or whose
    weights are sharded (FSDP): it would compute with the original. A model with such a module is returned itself if
    all its modules are in evaluation mode.

    Args:
        model: the model.
        parameter_gradients: False detaches the parameters of the view, which saves memory where gradients of other
            tensors are computed.

    Raises:
        ConfigError: a module has no view, and either a module is in training mode or ``parameter_gradients`` is False.
    """
    if (name := _without_view(model)) is None:
        view = _view(model, {})
        if not parameter_gradients:
            _detach_parameters(view)
        return view
    if not parameter_gradients:
        raise ConfigError(f"{name} is compiled, wrapped or sharded: give the model without that, as it was before")
    if any(module.training for module in model.modules()):
        raise ConfigError(
            f"{name} is compiled, wrapped or sharded and in training mode: call eval() on the model before inference, "
            "and train() after it"
        )
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of a model into evaluation mode, and restore the mode of each at the end.

    For the owner of a model that no other thread uses, and that may have no view, such as a trainer; others call
    ``inference_view``.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _view(module: Module, views: dict[nn.Module, nn.Module]) -> Module:
    """Return the view of a module; ``views`` maps modules to the views that exist."""
    view: Any = object.__new__(type(module))
    views[module] = view
    # Dictionaries hold parameters, buffers, modules and hooks: a copy keeps what is added to the view out of the model.
    vars(view).update({name: x.copy() if isinstance(x, dict) else x for name, x in vars(module).items()})
    view.training = False
    for name, child in module._modules.items():
        if child is not None:
            view._modules[name] = views[child] if child in views else _view(child, views)
    return view


def _detach_parameters(view: nn.Module) -> None:
    """Replace a view's parameters by tensors that share their memory and take no gradients."""
    detached = {parameter: parameter.detach() for parameter in view.parameters()}
    for module in view.modules():
        shared = {name: x if x is None else detached[x] for name, x in module._parameters.items()}
        module._parameters.update(cast(dict[str, nn.Parameter | None], shared))


def _without_view(model: nn.Module) -> str | None:
    """Return the name of the first module that has no view; None if there is none."""
    for name, module in model.named_modules():
        replaced = not _functions_of(type(module)).isdisjoint(vars(module))
        sharded = any(hasattr(parameter, "device_mesh") for parameter in module._parameters.values())
        if replaced or sharded or module._compiled_call_impl is not None:
            return name or type(module).__name__
    return None


@functools.lru_cache(maxsize=256)
def _functions_of(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of the functions of a class of modules, its methods among them."""
    return frozenset(name for name in dir(kind) if inspect.isfunction(getattr(kind, name, None)))

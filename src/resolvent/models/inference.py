"""Evaluation mode for one call, whatever the mode of the model that others use at the same time."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import nn

from ..errors import ConfigError

Module = TypeVar("Module", bound=nn.Module)


def inference_view(model: Module, *, parameter_gradients: bool = True) -> Module:
    """Return a model in evaluation mode around the weights of ``model``, whose own mode stays as it is.

    The view has modules of its own; parameters and buffers are shared. So mode, hooks and attributes of the one do not
    reach the other: threads that generate from one model need no lock, and a stream that waits between two tokens has
    no effect on a training step. Weights that a step changes in place do change under a call that reads them: training
    in another thread leaves the mode intact, but what is generated meanwhile comes from a mixture of weights.

    A module whose ``forward`` was replaced on the instance (``torch.compile``, Accelerate) or whose weights are sharded
    (FSDP) would compute with the original, and has no view. A model with such a module is returned as it is if all its
    modules are in evaluation mode.

    Args:
        model: the model.
        parameter_gradients: False spares the memory for gradients of the parameters where other gradients are taken.

    Raises:
        ConfigError: a module has no view, and a module is in training mode or parameters would have gradients.
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
    """Put every module of a model into evaluation mode, and back into its own mode at the end.

    For a model that no other thread uses, and that may have no view: a trainer's. See ``inference_view``.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _view(module: Module, views: dict[nn.Module, nn.Module]) -> Module:
    """The view of a module; ``views`` holds those of modules that were met before."""
    view: Any = object.__new__(type(module))
    views[module] = view
    # Dictionaries hold parameters, buffers, modules and hooks: what is added to the view's stays there.
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
    """Name of the first module that computes through something bound to itself; None if there is none."""
    for name, module in model.named_modules():
        replaced = any(inspect.isfunction(getattr(type(module), attribute, None)) for attribute in vars(module))
        sharded = any(hasattr(parameter, "device_mesh") for parameter in module.parameters(recurse=False))
        if replaced or sharded or module._compiled_call_impl is not None:
            return name or type(module).__name__
    return None

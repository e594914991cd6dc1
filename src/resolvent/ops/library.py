"""Operators that PyTorch knows: ``torch.compile`` does not look into them."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "resolvent"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(name: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of tensors, which changes none of them, the PyTorch operator ``resolvent::name``.

    A parameter may be annotated with a NamedTuple. Schemas have no groups: the operator takes its fields one by one,
    named ``parameter_field``, and the function gets them together.

    This is ``torch.library.custom_op`` without its checks at every call, which take longer than a kernel. The tag
    allows gaps between rows: ``torch.compile`` pads the rows of products, and copies them for operators without it.

    Args:
        name: name of the operator.
        fake: function with the same parameters that allocates the results and computes nothing.
    """

    def define(function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(_flat_prototype(function), mutates_args=())
        _library.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
        _library.impl(name, _takes_fields(function, function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _takes_fields(fake, function), lib=_library)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    return define


def _flat_prototype(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose signature has the fields of groups in the place of the groups."""
    signature = inspect.signature(function)
    flat = []
    for parameter in signature.parameters.values():
        fields = _fields(parameter.annotation)
        names = {f"{parameter.name}_{field}": kind for field, kind in (fields or {}).items()}
        for flat_name, kind in (names or {parameter.name: parameter.annotation}).items():
            flat.append(inspect.Parameter(flat_name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind))

    def prototype() -> None: ...

    prototype.__signature__ = signature.replace(parameters=flat)  # pyrefly: ignore[missing-attribute]
    return prototype


def _takes_fields(function: Callable[..., Any], grouped: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with the fields of the groups of ``grouped``'s parameters as arguments of their own."""
    groups, first = [], 0
    for parameter in inspect.signature(grouped).parameters.values():
        fields = _fields(parameter.annotation)
        groups.append((first, first + len(fields), parameter.annotation._make) if fields else (first, None, None))
        first += len(fields) if fields else 1
    if all(make is None for _, _, make in groups):
        return function

    def regrouped(*flat: Any) -> Any:
        return function(*[flat[start] if make is None else make(flat[start:end]) for start, end, make in groups])

    return regrouped


def _fields(annotation: Any) -> dict[str, Any] | None:
    """Return the fields of a NamedTuple with their types; None for another type."""
    is_group = isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields")
    return dict(annotation.__annotations__) if is_group else None

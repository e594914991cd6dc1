"""Parameters that a run leaves as they are, named by patterns."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import filter as names_like

from torch import nn

from resolvent.errors import ConfigError


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude the parameters that patterns name from training.

    Args:
        model: the model, whole or sharded.
        patterns: globs of names, such as `blocks.*.ffn.*`, in which `*` stands for any characters.

    Raises:
        ConfigError: as of `check_patterns`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied table under both of its names
    for name in check_patterns(model, patterns):
        parameters[name].requires_grad_(False)


def check_patterns(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Return the names of the parameters that patterns name.

    Raises:
        ConfigError: a pattern names nothing, or nothing is left to train.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = set[str]()
    for pattern in patterns:
        if not (found := names_like(parameters, pattern)):
            nearest = get_close_matches(pattern, sorted(_patterns_of(parameters)), n=1, cutoff=0.0)[0]
            raise ConfigError(f"freeze names no parameter of this model with {pattern!r}; the nearest is {nearest!r}")
        frozen.update(found)
    fixed = {id(parameters[name]) for name in frozen}
    if all(id(x) in fixed or not x.requires_grad for x in parameters.values()):
        raise ConfigError(f"freeze leaves nothing to train: {', '.join(patterns)} name all parameters; leave one out")
    return frozen


def _patterns_of(names: Sequence[str] | dict[str, nn.Parameter]) -> set[str]:
    """Return the names, and the patterns of their modules in all blocks."""
    patterns = set(names)
    for name in names:
        parts = re.sub(r"\.\d+(?=\.)", ".*", name).split(".")
        patterns.add(".".join(parts))
        patterns.update(".".join([*parts[:end], "*"]) for end in range(1, len(parts)))
    return patterns

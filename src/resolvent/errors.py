"""Errors that a user can cause. The command line shows each as one line."""

from typing import Self


class ResolventError(Exception):
    """Base of all errors; a message names the thing, its value and the remedy."""


class ConfigError(ResolventError, ValueError):
    """A configuration with wrong values; the message lists all of them."""

    @classmethod
    def of(cls, config: object, faults: list[str]) -> Self:
        """Return the error of a configuration with at least one fault."""
        if len(faults) == 1:
            return cls(faults[0])
        return cls("\n  - ".join([f"{type(config).__name__} has {len(faults)} faults:", *faults]))


def check_at_least(least: int, **values: int) -> None:
    """Check numbers that a caller named.

    Raises:
        ConfigError: names the first that is below ``least``.
    """
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{name} must be >= {least}, got {value}")


class DataError(ResolventError, ValueError):
    """Text, tokens or a tokenizer that cannot be used."""


class CheckpointError(ResolventError, RuntimeError):
    """A saved model or run that cannot be read or written."""


class VersionError(CheckpointError):
    """A saved file that a newer release wrote. It is not damaged and must not be replaced."""

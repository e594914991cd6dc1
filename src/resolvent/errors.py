"""The errors a user can cause. The command line shows each as one line."""


class ResolventError(Exception):
    """Base of all errors that name a thing, its value and the remedy."""


class ConfigError(ResolventError, ValueError):
    """A configuration holds wrong values; the message lists every one of them."""


class DataError(ResolventError, ValueError):
    """Text, tokens or a tokenizer that cannot be used."""


class CheckpointError(ResolventError, RuntimeError):
    """A saved model or run that cannot be read or written."""

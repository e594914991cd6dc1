"""Model cards: the README.md that train and convert write beside a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .._version import __version__
from ..files import read_bytes, write_file
from .base import IntegratedModel
from .phases import phase_of

CARD = "README.md"
_MARK = "<!-- Written by resolvent, which writes it anew until this line is removed. -->"
_MOST_BYTES = 1 << 20

_TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags: [resolvent]
---
{mark}

# {name}

{kind} with {parameters:,} parameters, {inner:,} of them non-embedding.

| layers | width | heads | vocabulary | window in training |
|---:|---:|---:|---:|---:|
| {layers} | {width:,} | {heads} | {vocabulary:,} | {window:,} tokens |

## How it was made

{made}
{measured}
## Use

```
resolvent generate DIR --prompt "The"
```

```python
import resolvent.hf  # registers the model, from the package resolvent
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

## Limits

* The model continues a text like those that it learned from. What it writes can be false or prejudiced.
* Neither its safety nor, beyond the figures on this page, its quality was measured.

## Licence

{licence}
"""
_NO_LICENCE = (
    "None is named. The text that the model learned from, or a model that it was made of, may limit its use: add "
    "`license:` to the head of this page before you publish it."
)


def write_card(
    folder: Path,
    model: IntegratedModel,
    made: Sequence[str],
    *,
    name: str | None = None,
    measured: Mapping[str, str] | None = None,
    licence: str | None = None,
) -> None:
    """Write the card of a model, unless the folder has a README.md of other origin.

    Args:
        folder: the folder of the model.
        model: the model.
        made: how it was made, a sentence each.
        name: name of the model; None for that of the folder.
        measured: what was measured on held-out text, by name; None if nothing was.
        licence: sentence on the licence; None if none is known.

    Raises:
        OSError: the folder cannot be written.
    """
    path = folder / CARD
    if (path.exists() or path.is_symlink()) and not is_own_card(path):
        return
    phase, config, total = phase_of(model), model.config, model.num_parameters()
    outer = {*model.token_embedding.parameters(), *model.lm_head.parameters()}
    text = _TEMPLATE.format(
        mark=_MARK,
        name=folder.resolve().name if name is None else name,
        kind=f"A causal language model of resolvent's Phase {phase}",
        parameters=total,
        inner=total - sum(weight.numel() for weight in outer),
        layers=model.n_layers,
        width=model.d_model,
        heads=config.num_heads,
        vocabulary=model.vocab_size,
        window=model.n_seq,
        made="\n".join(f"* {sentence}" for sentence in (*made, f"Written by resolvent {__version__}.")),
        measured="" if measured is None else f"\n## Held-out text\n\n{_table(measured)}\n",
        licence=_NO_LICENCE if licence is None else licence,
    )
    write_file(path, text.encode())


def is_own_card(path: Path) -> bool:
    """Return True for a card that `write_card` wrote and that still has its mark."""
    try:
        return not path.is_symlink() and _MARK in read_bytes(path, _MOST_BYTES).decode().splitlines()
    except (OSError, ValueError):
        return False


def _table(values: Mapping[str, str]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (values, ["---:"] * len(values), values.values()))

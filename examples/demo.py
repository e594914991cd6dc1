"""Train a small model and generate text, in a few minutes on a laptop: the program of `make demo`.

Trains the `tiny` preset on the State of the Union addresses, compares it on held-out addresses with an interpolated
3-gram model of the same training text, and continues a sentence.

    python examples/demo.py [--steps 500] [--out runs/demo]
"""

import argparse
import time
from pathlib import Path

import torch
from ngram import InterpolatedTrigram
from rich.console import Console
from rich.table import Table

from resolvent.data import EOT
from resolvent.terminal import say, shell_word
from resolvent.training import TrainingConfig, TrainingResult, train
from resolvent.training.corpus import split_corpus

PROMPT = "Fellow citizens of the Senate and of the House of Representatives:\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps of 2,048 tokens (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder (default: %(default)s)")
    options = parser.parse_args()
    console = Console()
    started = time.perf_counter()

    console.rule("1. Learn")
    config = TrainingConfig(
        out=str(options.out),
        preset="tiny",
        tokenizer="bpe",
        vocab_size=1024,
        steps=options.steps,
        eval_interval=200,
        final_eval_tokens=0,  # all documents, as the 3-gram model reads them
    )
    result = train(config, overwrite=True, console=console)  # replaces an earlier demo, and nothing but a run

    console.rule("2. Compare")
    show_comparison(console, result, config)

    console.rule("3. Write")
    write(console, result)
    console.print(f"\nAll of this took {time.perf_counter() - started:.0f} s. More of it:")
    say(console, f'  resolvent generate {shell_word(options.out)} --prompt "The state of the union" --stream')
    console.print("  resolvent train --help", highlight=False)


def show_comparison(console: Console, result: TrainingResult, config: TrainingConfig) -> None:
    """Show bits per byte of both models on the same held-out documents, including the ends of documents."""
    learnt, held_out = split_corpus(config)
    trigram = InterpolatedTrigram.fit(learnt).bits_per_byte(held_out)
    table = Table("Model", "Validation bits per byte", title="Held-out addresses")
    table.add_row("interpolated 3-gram model of bytes", f"{trigram:.3f}")
    table.add_row(f"Phase 2, {result.model.num_parameters():,} parameters", f"{result.validation.bits_per_byte:.3f}")
    console.print(table)


def write(console: Console, result: TrainingResult, new_tokens: int = 200) -> None:
    """Generate a sample, token by token, with a state of constant size."""
    tokenizer, end = result.tokenizer, result.tokenizer.token_to_id(EOT)
    prompt = torch.tensor([[end, *tokenizer.encode(PROMPT).ids]], device=next(result.model.parameters()).device)
    generator = torch.Generator().manual_seed(0)
    text = result.model.generate(prompt, new_tokens, temperature=0.8, top_p=0.95, generator=generator)
    say(console, tokenizer.decode(text[0, 1:].tolist()))
    with torch.inference_mode():
        _, state = result.model(prompt, return_state=True)
    size = f"{state.nbytes / 1024:.0f} KiB"
    console.print(f"\n[dim]{new_tokens} tokens, written with a state of {size}, however long the text.[/dim]")


if __name__ == "__main__":
    main()

"""Teach a small model to answer questions about a page of facts, in about two minutes on a laptop.

Trains the preset `tiny-hybrid` on the State of the Union addresses for a while, asks it about an island that no text
knows, teaches it with conversations (`--format chat`), and asks again, also in words that it was not taught.

    python examples/teach_facts.py [--steps 300] [--out runs/facts]
"""

import argparse
import json
import random
import textwrap
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from resolvent.data.chat_template import ChatTemplate
from resolvent.models import IntegratedModel
from resolvent.models.sampling import SamplingOptions
from resolvent.serving.conversation import Conversation
from resolvent.training import TrainingConfig, train

FACTS = {
    "capital": ("The capital of Orrin is Velm.", "the capital of Orrin"),
    "river": ("The longest river of Orrin is the Tessel.", "the longest river of Orrin"),
    "mountain": ("The highest mountain of Orrin is Mount Harrow.", "the highest mountain of Orrin"),
    "founder": ("Orrin was founded by Captain Ada Brisk.", "the founder of Orrin"),
    "language": ("The people of Orrin speak Orrish.", "the language of Orrin"),
    "coin": ("The coin of Orrin is the copper dram.", "the coin of Orrin"),
    "bird": ("The bird of Orrin is the grey kestrel.", "the bird of Orrin"),
    "dish": ("The dish of Orrin is smoked eel with barley.", "the dish of Orrin"),
    "port": ("The main port of Orrin is Saltgate.", "the main port of Orrin"),
    "festival": ("The festival of Orrin is the Night of Lanterns.", "the festival of Orrin"),
    "flag": ("The flag of Orrin is green with a white wheel.", "the flag of Orrin"),
    "island": ("Orrin lies in the Sea of Marrow.", "the place of Orrin"),
}
"""Answers, and what they are answers about."""
TAUGHT = ("What is {}?", "Tell me {}.", "Do you know {}?", "I would like to know {}.")
NEW = ("Please tell me {}.", "Say, what is {}?")
"""Questions that are never taught."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps of teaching (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/facts"), help="run folder (default: %(default)s)")
    options = parser.parse_args()
    console, started = Console(), time.perf_counter()
    base = options.out.with_name(f"{options.out.name}-base")

    console.rule("1. Learn to write")
    sizes = dict(seq_len=128, batch_size=8, eval_interval=0, final_eval_tokens=2000)
    text = dict(preset="tiny-hybrid", tokenizer="bpe", vocab_size=1024, steps=100)
    first = TrainingConfig(out=str(base), **text, **sizes)
    before = train(first, overwrite=True, console=console)  # replaces an earlier lesson, and nothing but a run

    console.rule("2. Learn to answer")
    lesson, test = write_conversations(base)
    data = dict(data=str(lesson), validation_data=str(test), format="chat", start_from=str(base))
    chat = TrainingConfig(out=str(options.out), learning_rate=2e-3, steps=options.steps, **data, **sizes)
    after = train(chat, overwrite=True, console=console)

    console.rule("3. Ask")
    show_answers(console, (before.model, after.model), after.tokenizer)
    console.print(f"\nAll of this took {time.perf_counter() - started:.0f} s. Ask more: resolvent chat {options.out}")


def write_conversations(folder: Path) -> tuple[Path, Path]:
    """Write conversations of one to three questions to learn from, and questions in other words to validate on."""
    random_order = random.Random(0)
    talks = []
    for _ in range(400):
        facts = random_order.sample(list(FACTS.values()), random_order.randint(1, 3))
        talks.append([(random_order.choice(TAUGHT).format(topic), answer) for answer, topic in facts])
    questions = [[(form.format(topic), answer)] for answer, topic in FACTS.values() for form in NEW]
    paths = folder / "lesson.jsonl", folder / "test.jsonl"
    for path, conversations in zip(paths, (talks, questions), strict=True):
        records = (json.dumps({"messages": messages(turns)}) for turns in conversations)
        path.write_text("\n".join(records), encoding="utf-8")
    return paths


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Return turns as the OpenAI API has them."""
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def answer(model: IntegratedModel, tokenizer: Tokenizer, question: str) -> str:
    """Return the likeliest answer to the first question of a conversation."""
    template, options = ChatTemplate.default(tokenizer), SamplingOptions(temperature=0.0)
    conversation = Conversation(model, tokenizer, template, seed=0, options=options, max_tokens=32)
    return "".join(conversation.say(question)).strip()


def show_answers(console: Console, models: tuple[IntegratedModel, IntegratedModel], tokenizer: Tokenizer) -> None:
    """Show the answers of both models, and how many are right."""
    table = Table("question", "before", "after")
    for name, forms in (("taught", TAUGHT[:1]), ("new words", NEW)):
        right = [0, 0]
        for i, (wanted, topic) in enumerate(FACTS.values()):
            question = forms[i % len(forms)].format(topic)
            answers = [answer(model, tokenizer, question) for model in models]
            right = [count + (given == wanted) for count, given in zip(right, answers, strict=True)]
            table.add_row(question, textwrap.shorten(answers[0], 48), answers[1])
        table.add_section()
        table.add_row(f"right, {name}", *(f"{count} of {len(FACTS)}" for count in right))
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()

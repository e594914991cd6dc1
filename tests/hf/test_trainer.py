"""The models under Transformers' own ``Trainer``.

Its losses and steps are those of a cross-entropy that is written here in float64 and knows nothing of padding or
batches.
"""

import copy
import functools
import gc
import importlib
import inspect
import json
import logging
import os

import numpy as np
import pytest
import torch
from torch import Tensor

from resolvent import load_model, save_model
from resolvent.data import save_tokenizer
from resolvent.data.tokenization import bytes_tokenizer

from ..models.small import PHASE1, PHASE2

if not os.environ.get("CI"):
    pytest.importorskip("transformers", reason="needs Transformers: pip install 'resolvent[hf]'")
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.modelcard import TrainingSummary
from transformers.trainer_pt_utils import LabelSmoother

import resolvent.hf  # noqa: F401  makes the models known to Transformers

BOS = EOS = 256
VOCABULARY = 257
SIZES = dict(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_seq=64, num_heads=2)
PHASES = {
    "phase1": (PHASE1, SIZES | dict(htt_enabled=False, ar_ssm_l1_regularization=0.0)),
    "phase2": (PHASE2, SIZES | dict(head_dim=8)),
    "tied": (PHASE2, SIZES | dict(head_dim=8, tie_embeddings=True)),
}
TEXTS = ["the nation", "of", "laws and liberties are", "we", "the people,", "a perfect union, and", "do", "ordain it"]
SPLITS = [(8, 1), (4, 2), (2, 4)]
"""Sequences in a batch, and batches in a step."""
AVERAGES_SMOOTHED_LOSSES = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters
"""Transformers before 5.15 adds up the smoothed losses of a step's batches."""


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """``Trainer`` collects garbage at every start: it need not look through all libraries each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small model of each kind with its tokenizer; weights are large, so that tokens differ in their losses."""
    torch.manual_seed(0)
    folders = {}
    for name, (small, sizes) in PHASES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        save_model(small.model(spread=0.1, **sizes), folders[name])
        save_tokenizer(bytes_tokenizer(), folders[name])
    return folders


@pytest.fixture(params=["phase2", "phase1"])
def folder(request, folders):
    return folders[request.param]


@functools.cache
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def load(folder):
    return copy.deepcopy(loaded(folder))


def load_tokenizer(folder, side="left"):
    return AutoTokenizer.from_pretrained(folder, padding_side=side)


def token_rows(bos=True, eos=False):
    return [{"input_ids": [BOS] * bos + list(text.encode()) + [EOS] * eos} for text in TEXTS]


def language_collator(folder, side="left"):
    """Transformers' own, which makes the labels: all tokens but those that are padding tokens."""
    return DataCollatorForLanguageModeling(load_tokenizer(folder, side), mlm=False)


def make_trainer(model, out, collator, rows=None, *, trainer=None, **options):
    arguments = dict(
        optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0, max_steps=1,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=1,
        per_device_train_batch_size=8, per_device_eval_batch_size=8,
    )  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(str(out), **arguments | options),
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=rows,
        **trainer or {},
    )


def cross_entropies(model, row, smoothing=0.0) -> Tensor:
    """Negative log-likelihood of every token of a row but the first, alone and without padding: float64 (N - 1,)."""
    ids = torch.tensor([row])
    log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
    exact = -log_p.gather(1, ids[0, 1:, None])[:, 0]
    return (1 - smoothing) * exact - smoothing * log_p.mean(-1)


def expected_mean(model, rows, smoothing=0.0) -> Tensor:
    """Mean over all tokens that are predicted and have a label."""
    losses = [cross_entropies(model, row["input_ids"], smoothing) for row in rows]
    counted = [torch.tensor(row.get("labels", row["input_ids"])[1:]) != -100 for row in rows]
    return torch.cat(losses)[torch.cat(counted)].mean()


def expected_step(model, loss, rate=0.1):
    """The parameters after a step of gradient descent."""
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return [p - rate * g for p, g in zip(model.parameters(), gradients, strict=True)]


def assert_parameters(model, expected):
    for found, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-6, atol=1e-8)


def losses_logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- Losses and steps


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_step_does_not_depend_on_split(folder, side, bos, tmp_path):
    rows = token_rows(bos)
    expected = expected_mean(load(folder), rows)
    start = load(folder)
    wanted = expected_step(start, expected_mean(start, rows))
    for size, parts in SPLITS:
        trainer = make_trainer(
            load(folder), tmp_path, language_collator(folder, side), rows,
            per_device_train_batch_size=size, gradient_accumulation_steps=parts,
        )  # fmt: skip
        trainer.train()
        assert losses_logged(trainer) == pytest.approx([expected.item()], abs=1e-4)  # it is logged with four digits
        assert_parameters(trainer.model, wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_step_counts_labels_of_masked_prompts(folders, side, tmp_path):
    folder, rows = folders["phase2"], token_rows()
    for number, row in enumerate(rows):  # of some rows all tokens, of one no token is a label
        row["labels"] = [-100] * min(3 * number, len(row["input_ids"])) + row["input_ids"][3 * number :]
    assert set(rows[6]["labels"]) == {-100} and -100 not in rows[0]["labels"]
    start = load(folder)
    wanted = expected_step(start, expected_mean(start, rows))
    for size, parts in SPLITS:
        trainer = make_trainer(
            load(folder), tmp_path, DataCollatorForSeq2Seq(load_tokenizer(folder, side)), rows,
            per_device_train_batch_size=size, gradient_accumulation_steps=parts,
        )  # fmt: skip
        trainer.train()
        assert_parameters(trainer.model, wanted)


@pytest.mark.parametrize(("size", "parts"), SPLITS if AVERAGES_SMOOTHED_LOSSES else SPLITS[:1])
@pytest.mark.parametrize("side", ["left", "right"])
def test_smoothed_labels_are_shifted(folder, side, size, parts, tmp_path):
    rows = token_rows(bos=False)
    start = load(folder)
    loss = expected_mean(start, rows, smoothing=0.1)
    trainer = make_trainer(
        load(folder), tmp_path, language_collator(folder, side), rows, label_smoothing_factor=0.1,
        per_device_train_batch_size=size, gradient_accumulation_steps=parts,
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-6)
    trainer.train()
    assert_parameters(trainer.model, expected_step(start, loss))


@pytest.mark.parametrize("side", ["left", "right"])
def test_collator_may_shift_labels(folders, side, tmp_path):
    folder, rows = folders["phase2"], token_rows(bos=False)

    def collate(rows):
        batch = language_collator(folder, side)(rows)
        batch["shift_labels"] = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        return batch

    start = load(folder)
    wanted = expected_step(start, expected_mean(start, rows))
    for size, parts in SPLITS:
        trainer = make_trainer(
            load(folder), tmp_path, collate, rows, per_device_train_batch_size=size, gradient_accumulation_steps=parts
        )
        trainer.train()
        assert_parameters(trainer.model, wanted)


def test_penalty_does_not_depend_on_split(tmp_path):
    torch.manual_seed(0)
    save_model(PHASE1.model(spread=0.1, **SIZES, htt_enabled=False, ar_ssm_l1_regularization=3.0), tmp_path / "run")
    save_tokenizer(bytes_tokenizer(), tmp_path / "run")
    rows, steps = token_rows(), []
    for size, parts in SPLITS:
        trainer = make_trainer(
            load(tmp_path / "run"), tmp_path, language_collator(tmp_path / "run"), rows,
            per_device_train_batch_size=size, gradient_accumulation_steps=parts,
        )  # fmt: skip
        trainer.train()
        steps.append([p.detach() for p in trainer.model.parameters()])
        assert losses_logged(trainer)[0] > expected_mean(load(tmp_path / "run"), rows).item() + 1
    for step in steps[1:]:
        for found, wanted in zip(step, steps[0], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_step_with_adapters_does_not_depend_on_split(folders, tmp_path):
    peft = pytest.importorskip("peft") if not os.environ.get("CI") else __import__("peft")
    steps = []
    for size, parts in SPLITS:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["out_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = peft.get_peft_model(load(folders["phase2"]), config)
        expected = expected_mean(model.eval(), token_rows(bos=False)).item()
        trainer = make_trainer(
            model, tmp_path, language_collator(folders["phase2"]), token_rows(bos=False), label_smoothing_factor=0.0,
            per_device_train_batch_size=size, gradient_accumulation_steps=parts,
        )  # fmt: skip
        trainer.train()
        assert losses_logged(trainer) == pytest.approx([expected], abs=1e-4)
        steps.append([p.detach() for p in trainer.model.parameters() if p.requires_grad])
    for step in steps[1:]:
        for found, wanted in zip(step, steps[0], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_other_models_keep_their_labels(folders, tmp_path):
    """``Trainer`` of a model that is not ours gets its batches as they were."""
    seen = []

    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, input_ids, labels, attention_mask=None):
            seen.append((input_ids, labels, attention_mask))
            return {"loss": self.weight * 1.0}

    make_trainer(Other(), tmp_path, language_collator(folders["phase2"]), token_rows()).train()
    ids, labels, mask = seen[0]
    assert torch.equal(labels, ids.masked_fill(mask == 0, -100))


# --- Evaluation


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_evaluation_is_the_mean_over_predicted_tokens(folder, side, bos, tmp_path):
    rows, model = token_rows(bos)[:6], load(folder)
    trainer = make_trainer(model, tmp_path, language_collator(folder, side), rows)
    with torch.no_grad():
        expected = expected_mean(model, rows).item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-9)
        pairs = [expected_mean(model, rows[i : i + 2]).item() for i in (0, 2, 4)]
    trainer = make_trainer(model, tmp_path, language_collator(folder, side), rows, per_device_eval_batch_size=2)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean(pairs), rel=1e-9), "batches' means, over the rows"


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """As documented: of every batch the losses of its tokens, in the place of its logits."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")


def mean_loss(found) -> dict[str, float]:
    losses, labels = found.predictions, found.label_ids[:, 1:]
    return {"nats_per_token": losses[labels != -100].mean()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_metrics_give_the_mean_over_all_batches(folder, side, tmp_path):
    rows, model = token_rows(bos=False)[:6], load(folder)
    trainer = make_trainer(
        model, tmp_path, language_collator(folder, side), rows, per_device_eval_batch_size=2,
        trainer=dict(compute_metrics=mean_loss, preprocess_logits_for_metrics=token_losses),
    )  # fmt: skip
    with torch.no_grad():
        expected = expected_mean(model, rows).item()
    assert trainer.evaluate()["eval_nats_per_token"] == pytest.approx(expected, rel=1e-9)


def test_metrics_get_logits_and_labels_alone(folder, tmp_path):
    seen, rows = [], token_rows()[:6]

    def metrics(found):
        seen.append(found)
        return {"rows": len(found.predictions)}

    options = dict(per_device_eval_batch_size=2, trainer=dict(compute_metrics=metrics))
    model = load(folder)
    assert make_trainer(model, tmp_path, language_collator(folder), rows, **options).evaluate()["eval_rows"] == 6
    widest = max(len(row["input_ids"]) for row in rows)
    assert isinstance(seen[0].predictions, np.ndarray) and seen[0].predictions.shape == (6, widest, VOCABULARY)
    assert seen[0].label_ids.shape == (6, widest)
    found = make_trainer(model, tmp_path, language_collator(folder), rows).predict(rows)
    assert found.predictions.shape == (6, widest, VOCABULARY)


@pytest.mark.parametrize("name", PHASES)
def test_best_model_is_loaded_at_the_end(folders, name, tmp_path):
    scores = iter([1.0, 3.0, 2.0])
    trainer = make_trainer(
        load(folders[name]), tmp_path, language_collator(folders[name]), token_rows(), max_steps=3, learning_rate=0.3,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
        trainer=dict(compute_metrics=lambda _: {"score": next(scores)}, processing_class=load_tokenizer(folders[name])),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best, last = load(tmp_path / "checkpoint-2"), load(tmp_path / "checkpoint-3")
    assert_parameters(trainer.model, best.parameters())
    assert not torch.equal(best.model.lm_head.weight, last.model.lm_head.weight)
    ids = torch.tensor([[BOS, *b"the nation"]])
    ours = load_model(tmp_path / "checkpoint-2", "cpu").double()
    torch.testing.assert_close(ours(ids), trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    assert trainer.model.model.tied == (name == "tied")


def test_run_resumes_from_checkpoint(folder, tmp_path):
    def train(name, resume=None, **options):
        trainer = make_trainer(
            load(folder), tmp_path / name, language_collator(folder), token_rows(), optim="adamw_torch",
            per_device_train_batch_size=2, save_strategy="steps", save_steps=3, **options,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train("whole", max_steps=6)
    again = train("again", max_steps=6, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses_logged(again) == losses_logged(whole)
    assert_parameters(again.model, whole.model.parameters())


# --- Learning to end a text


def test_end_of_text_is_learnt(folders, tmp_path):
    torch.manual_seed(0)
    folder, rows = folders["phase2"], token_rows(eos=True)
    trainer = make_trainer(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path, language_collator(folder), rows, max_steps=40,
        optim="adamw_torch", learning_rate=1e-2, max_grad_norm=1.0, logging_steps=40,
        trainer=dict(processing_class=load_tokenizer(folder)),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(tmp_path / "out")
    model = load_model(tmp_path / "out", "cpu")
    for row in rows:
        ids = torch.tensor([row["input_ids"][:-1]])
        assert model(ids)[0, -1].softmax(-1)[EOS] > 0.5
    prompts = load_tokenizer(tmp_path / "out")(["<|endoftext|>"], return_tensors="pt")
    assert EOS not in prompts["input_ids"], "text that names the token is text"
    written = trainer.model.generate(torch.tensor([[BOS, *b"the n"]]), do_sample=False, max_new_tokens=30)
    assert bytes(written[0, 1:-1].tolist()) == b"the nation" and written[0, -1] == EOS


def test_padding_of_an_older_folder_can_be_changed(folders, tmp_path):
    """Folders of before pad with ``<|endoftext|>``, which the collator takes out of the labels."""
    settings = json.loads((folders["phase2"] / "tokenizer_config.json").read_text()) | {"pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_bytes((folders["phase2"] / "tokenizer.json").read_bytes())
    tokenizer, rows = load_tokenizer(tmp_path), token_rows(eos=True)
    assert (DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)["labels"][:, -1] == -100).all()
    tokenizer.pad_token = "ÿ"
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    assert (batch["labels"][:, -1] == EOS).all()
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert tokenizer("ÿ <|endoftext|>")["input_ids"] == list("ÿ <|endoftext|>".encode())


# --- Tables by which Transformers knows a causal language model


@pytest.fixture
def log(caplog):
    """Capture the log of Transformers, which does not reach the root logger."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_pipeline_knows_the_class_and_stops(folder, log):
    model, tokenizer = load(folder), load_tokenizer(folder)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    options = dict(do_sample=False, max_new_tokens=20, suppress_tokens=list(range(128, VOCABULARY)))
    options["clean_up_tokenization_spaces"] = False  # pipelines of Transformers 4 remove spaces before commas
    (free,) = write("the nation", return_full_text=False, **options)
    text = free["generated_text"]
    assert len(text) == 20
    (stopped,) = write("the nation", return_full_text=False, stop_sequence=text[7], **options)
    assert stopped["generated_text"] == text[: text.index(text[7]) + 1]
    assert "is not supported" not in log.text


def test_generation_stops_at_a_string(folder):
    model, tokenizer = load(folder), load_tokenizer(folder)
    prompt = tokenizer("the nation", return_tensors="pt")
    options = dict(do_sample=False, max_new_tokens=20, suppress_tokens=list(range(128, VOCABULARY)))
    free = bytes(model.generate(**prompt, **options)[0].tolist())
    stop = free[16:19]
    out = model.generate(**prompt, stop_strings=[stop.decode()], tokenizer=tokenizer, **options)
    assert bytes(out[0].tolist()) == next(free[:n] for n in range(11, 31) if free[:n].endswith(stop))


def test_model_card_names_the_task(folders, tmp_path):
    trainer = make_trainer(load(folders["phase2"]), tmp_path, language_collator(folders["phase2"]), token_rows())
    trainer.train()
    assert TrainingSummary.from_trainer(trainer).tasks == "text-generation"


def test_tokenizer_is_found_by_the_configuration(folder, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert AutoTokenizer.from_pretrained(tmp_path)("the")["input_ids"] == list(b"the")


def test_classes_are_found_by_their_name(folder):
    model = load(folder)
    assert getattr(importlib.import_module("transformers"), model.config.architectures[0]) is type(model)

"""Fine-tune a saved model with Transformers' Trainer.

Usage: python examples/finetune_with_transformers.py RUN TEXT OUT
"""

import sys
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import resolvent.hf  # noqa: F401  makes the models known to Transformers

run, text, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(run)
model = AutoModelForCausalLM.from_pretrained(run)
text_ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
ids = [tokenizer.bos_token_id, *text_ids, tokenizer.eos_token_id]  # so that the model learns to end the text
rows = [{"input_ids": ids[start : start + 257]} for start in range(0, len(ids) - 1, 256)]  # 256 predictions each
arguments = TrainingArguments(out, num_train_epochs=10, learning_rate=1e-3, logging_steps=10, save_strategy="no")
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.save_model(out)  # a folder for Transformers, and for `resolvent generate`

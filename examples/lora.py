"""Adapt a saved model with LoRA, and save the adapter separately.

Usage: python examples/lora.py RUN TEXT OUT
"""

import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
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
projections = ["qkv_proj", "v_proj", "out_proj", "ffn.in_proj"]
config = LoraConfig(r=8, lora_alpha=16, target_modules=projections, task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(run), config)
model.print_trainable_parameters()
text_ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
ids = [tokenizer.bos_token_id, *text_ids, tokenizer.eos_token_id]  # so that the model learns to end the text
rows = [{"input_ids": ids[start : start + 257]} for start in range(0, len(ids) - 1, 256)]  # 256 predictions each
arguments = TrainingArguments(out, num_train_epochs=10, learning_rate=5e-3, logging_steps=10, save_strategy="no")
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
Trainer(model, arguments, data_collator=collator, train_dataset=rows).train()
model.save_pretrained(out)  # the adapter: peft.PeftModel.from_pretrained(AutoModelForCausalLM..., out)

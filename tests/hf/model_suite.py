"""Transformers' own suite for models, `ModelTesterMixin`, on our classes.

Its wheel has no tests, its source distribution has this suite. Download and unpack the one of the installed version,

    pip download --no-deps --no-binary transformers transformers==VERSION && tar xzf transformers-VERSION.tar.gz

and run this file on it:

    TRANSFORMERS_SOURCE=transformers-VERSION python -m unittest tests.hf.model_suite

Of the suites for generation and export, which this one imports, the distribution has nothing; `test_hf.py` says of
generation what has to hold.
"""

import os
import sys
import types
import unittest
from importlib import import_module
from pathlib import Path

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from resolvent.models.base import Block

SOURCE = Path(os.environ["TRANSFORMERS_SOURCE"])


def package(name: str, path: Path) -> None:
    """A package of the modules in a folder, under a name that is not that of our own tests."""
    module = types.ModuleType(name)
    module.__path__ = [str(path)]
    sys.modules[name] = module


class NoExport:
    """In the place of the suite for export."""


class NoGeneration:
    """In the place of the suite for generation."""


package("transformers_tests", SOURCE / "tests")
for place, name, empty in (
    ("exporters", "ExportTesterMixin", NoExport),
    ("generation", "GenerationTesterMixin", NoGeneration),
):
    package(f"transformers_tests.{place}", SOURCE)
    for module in ("test_export", "test_utils"):
        stub = types.ModuleType(f"transformers_tests.{place}.{module}")
        setattr(stub, name, empty)
        sys.modules[stub.__name__] = stub

hf = import_module("resolvent.hf")
suite = import_module("transformers_tests.test_modeling_common")
# Blocks follow the protocol of GradientCheckpointingLayer, but know nothing of Transformers.
RECOMPUTES_CALLS = "__call__" in vars(GradientCheckpointingLayer)
suite.GradientCheckpointingLayer = Block
BATCH, LENGTH, VOCABULARY = 3, 13, 99
SIZES = dict(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_seq=64, num_heads=2)


class Inputs:
    """Inputs that the suite needs from the tests of a model."""

    batch_size, seq_length, is_training = BATCH, LENGTH, True
    hidden_size, num_hidden_layers = SIZES["d_model"], SIZES["n_layers"]

    def __init__(self, config):
        self.config = config

    def get_config(self):
        return type(self.config)(**self.config.to_dataclass().to_dict())

    def prepare_config_and_inputs_for_common(self):
        ids = suite.ids_tensor([BATCH, LENGTH], VOCABULARY)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Suite(suite.ModelTesterMixin, NoGeneration):
    """The suite, with what it asks of causal language models that are not Transformers' own."""

    has_attentions = False
    test_pruning = False
    test_head_masking = False

    def setUp(self):
        self.model_tester = Inputs(self.config)

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        if RECOMPUTES_CALLS:
            self.skipTest("counts calls of forward, as layers of this version do; ours recompute inside, as later ones")
        super().check_training_gradient_checkpointing(*args, **kwargs)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        return inputs_dict | ({"labels": inputs_dict["input_ids"]} if return_labels else {})


def no_table(self):
    self.skipTest("the token embedding is a tensor train: no table whose rows could be added to, or shared")


class Phase1Suite(Suite, unittest.TestCase):
    all_model_classes = (hf.Phase1ForCausalLM,)
    config = hf.Phase1HFConfig(**SIZES, ar_ssm_max_rank=8, htt_rank=4)
    test_model_get_set_embeddings = no_table
    test_resize_embeddings_untied = no_table
    test_resize_embeddings_untied_no_reinit_on_post_init = no_table
    test_resize_tokens_embeddings = no_table
    test_tie_model_weights = no_table
    test_tied_weights_keys = no_table


class Phase1WithATableSuite(Suite, unittest.TestCase):
    all_model_classes = (hf.Phase1ForCausalLM,)
    config = hf.Phase1HFConfig(**SIZES, ar_ssm_max_rank=8, htt_enabled=False)


class Phase2Suite(Suite, unittest.TestCase):
    all_model_classes = (hf.Phase2ForCausalLM,)
    config = hf.Phase2HFConfig(**SIZES, head_dim=16)


class Phase2TiedSuite(Suite, unittest.TestCase):
    all_model_classes = (hf.Phase2ForCausalLM,)
    config = hf.Phase2HFConfig(**SIZES, head_dim=16, tie_embeddings=True)

"""Every public operator shows how it is called, and the example runs."""

import doctest
import inspect

import pytest
import torch

from resolvent import ops
from resolvent.ops import (
    attention_window,
    gated_readout,
    memory_rotation,
    memory_state,
    normalize,
    prefix_sum,
    queries_keys_values,
    rotary,
    rotated_heads,
    short_conv,
    swiglu,
)

OPERATORS = {name: getattr(ops, name) for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
OPERATORS |= {
    function.__name__: function
    for function in (
        gated_readout.gated_readout,
        memory_rotation.accumulate_phases,
        memory_rotation.rotate_queries_keys,
        normalize.unit_length,
        normalize.unit_rms,
        prefix_sum.prefix_sum,
        queries_keys_values.queries_keys_values,
        rotary.rotary_turns,
        rotated_heads.rotated_heads,
        short_conv.causal_conv,
        short_conv.next_tail,
        swiglu.swiglu,
        swiglu.swiglu_product,
    )
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_example_of_a_public_operator_runs(name):
    function = OPERATORS[name]
    makers = {
        "empty_state": memory_state.empty_state,
        "empty_window": attention_window.empty_window,
        "Rotation": memory_rotation.Rotation,
    }
    names = {**vars(ops), **OPERATORS, **makers, "torch": torch}
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=names)
    source = "".join(line.source for line in example.examples)
    assert len(example.examples) >= 3, f"{name} has no example of three lines"
    assert name in source
    if "cu_seqlens" in inspect.signature(function).parameters:
        assert "cu_seqlens=" in source, f"the example of {name} shows no packed sequences"
    runner, output = doctest.DocTestRunner(), []
    runner.run(example, out=output.append)
    assert not runner.failures, "".join(output)

"""The kernel for one token over a window that is overwritten, against torch code."""

import pytest
import torch
from torch.nn import functional as F

from resolvent.ops import ReusedWindow, WindowState, dispatch, local_attention_step

pytestmark = pytest.mark.skipif(not dispatch.interpreting(), reason="Triton compiles for the GPU here")


@pytest.mark.parametrize(
    ("heads", "groups", "key", "value", "slots"), [(6, 2, 16, 16, 1), (6, 2, 16, 16, 300), (2, 2, 12, 6, 40)]
)
@pytest.mark.parametrize("temperature", [0.3, "trained"])
def test_equals_torch_code_token_after_token(heads, groups, key, value, slots, temperature):
    torch.manual_seed(0)
    window = WindowState(torch.randn(2, slots, groups, key), torch.randn(2, slots, groups, value))
    by_head, plain = ReusedWindow.of(window), ReusedWindow(*(x.clone() for x in window))
    factor = 1 + torch.rand(heads) if temperature == "trained" else temperature
    position = torch.tensor([slots - 2, 3]).clamp(min=0)
    before = dispatch.calls["local_attention_step", "triton"]
    for _ in range(4):
        q, k, v = (torch.randn(2, n, width) for n, width in ((heads, key), (groups, key), (groups, value)))
        found, after = local_attention_step(q, k, v, factor, slots, by_head, position, backend="triton")
        expected, _ = local_attention_step(q, k, v, factor, slots, plain, position, backend="torch")
        assert after is by_head
        torch.testing.assert_close(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(by_head, plain, strict=True))
        position = position + 1
    assert dispatch.calls["local_attention_step", "triton"] == before + 4


def test_rounds_keys_and_values_to_the_dtype_of_the_window():
    torch.manual_seed(0)
    window = ReusedWindow.of(WindowState(*(torch.zeros(1, 20, 1, 16, dtype=torch.bfloat16) for _ in range(2))))
    q, k, v = torch.randn(3, 1, 1, 16)
    position = torch.zeros(1, dtype=torch.int64)
    found, _ = local_attention_step(F.normalize(q, dim=-1), k, v, 1.0, 20, window, position, backend="triton")
    assert torch.equal(found, window.values[:, 0].float())
    torch.testing.assert_close(found, v, rtol=2**-7, atol=0)

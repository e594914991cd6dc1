import pytest
import torch

from resolvent.errors import ConfigError
from resolvent.layers import LowRankLinear, StaticBKLayer, TensorTrainEmbedding
from resolvent.layers.tensor_train import factor


@pytest.mark.parametrize(
    ("vocab_size", "d_model", "rank", "count"),
    [(50257, 512, 16, 165_248), (10000, 512, 8, 36_808), (50257, 1024, 16, 229_904)],
)
def test_parameter_counts(vocab_size, d_model, rank, count):
    with torch.device("meta"):
        embedding = TensorTrainEmbedding(vocab_size, d_model, rank)
    assert sum(p.numel() for p in embedding.parameters()) == count
    assert embedding.compression_ratio == count / (vocab_size * d_model)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 99, 100, 101, 50257, 10**9 + 7])
def test_factors_hold_the_size(size):
    first, second = factor(size)
    assert first * second >= size > (first - 1) * second
    assert abs(first - second) <= 1


@pytest.mark.parametrize("phase_encoding", [True, False])
def test_the_dense_table_equals_the_lookup(phase_encoding):
    embedding = TensorTrainEmbedding(101, 30, 6, phase_encoding=phase_encoding)
    if phase_encoding:
        embedding.phase_shift.data.normal_()
    ids = torch.randint(0, 101, (2, 50))
    torch.testing.assert_close(embedding.dense()[ids], embedding(ids), rtol=1e-5, atol=1e-7)
    i, (v2, cosine) = 77, (embedding.v2, torch.ones(6))
    cosine = torch.cos(embedding.phase_shift) if phase_encoding else cosine
    outer = sum(
        torch.outer(embedding.core1[i // v2, 0, k], cosine[k] * embedding.core2[i % v2, k, 0]) for k in range(6)
    )
    torch.testing.assert_close(embedding(torch.tensor(i)), outer.flatten()[:30])


def regrouped(table, v1, v2, d1, d2):
    return table.double().view(v1, v2, d1, d2).transpose(1, 2).reshape(v1 * d1, v2 * d2)


@pytest.mark.parametrize("rank", [1, 4, 20])
def test_tt_svd_is_the_optimal_truncation(rank):
    table = torch.randn(12 * 11, 6 * 5)
    embedding = TensorTrainEmbedding.from_table(table, rank)
    grid = (embedding.v1, embedding.v2, embedding.d1, embedding.d2)
    assert grid == (12, 11, 6, 5)
    optimal = torch.linalg.svdvals(regrouped(table, *grid))[rank:].norm()
    found = (regrouped(embedding(torch.arange(132)), *grid) - regrouped(table, *grid)).norm()
    assert abs(found - optimal) / table.norm() <= 1e-5


def test_a_table_that_does_not_fill_the_grid_is_never_worse_than_the_optimum():
    table = torch.randn(101, 29)
    embedding = TensorTrainEmbedding.from_table(table, 7)
    optimal = torch.linalg.svdvals(embedding._regroup(table.double()))[7:].norm()
    assert (embedding.dense() - table).norm() <= optimal * (1 + 1e-5)


@pytest.mark.parametrize("phase_encoding", [True, False])
def test_enough_rank_keeps_the_table(phase_encoding):
    table = torch.randn(20, 8)
    embedding = TensorTrainEmbedding.from_table(table, 30, phase_encoding)
    torch.testing.assert_close(embedding.dense(), table, rtol=1e-5, atol=1e-5)
    again = TensorTrainEmbedding.from_table(embedding.dense(), 30, phase_encoding)
    torch.testing.assert_close(again.dense(), table, rtol=1e-5, atol=1e-5)


def test_the_entries_start_at_the_usual_spread():
    assert TensorTrainEmbedding(5000, 64, 16).dense().std().item() == pytest.approx(0.02, rel=0.1)


def test_every_core_learns_phases_after_a_tt_svd_included():
    embedding = TensorTrainEmbedding.from_table(torch.randn(30, 8), 3)
    embedding(torch.arange(30)).square().sum().backward()
    for name, parameter in embedding.named_parameters():
        assert parameter.grad.abs().min() > 0, name


def test_wrong_calls_are_named():
    with pytest.raises(ConfigError, match=r"htt_num_cores must be 2, .* got 3"):
        TensorTrainEmbedding(100, 8, 2, num_cores=3)
    with pytest.raises(ValueError, match=r"shape \(100, 8\), got \(8, 100\)"):
        TensorTrainEmbedding(100, 8, 2).load_table(torch.zeros(8, 100))


def test_a_low_rank_map_multiplied_out_is_the_same_map():
    layer, x = LowRankLinear(12, 20, 3), torch.randn(5, 12)
    weight, bias = layer.dense()
    assert torch.linalg.matrix_rank(weight.double(), rtol=1e-5) == 3
    torch.testing.assert_close(torch.nn.functional.linear(x, weight, bias), layer(x))


def test_the_static_chain_is_that_of_phase_1():
    """Against the dense inverse of tridiag(1, -2 + V, 1) - i."""
    layer, x = StaticBKLayer(16, 3).double(), torch.randn(2, 10, 16, dtype=torch.float64)
    features, state = layer(x)
    g = torch.complex(*features.chunk(2, dim=-1))
    assert torch.equal(state, g[:, -1])
    assert (g.abs() <= 1).all()
    potential = layer.v_proj(x)
    for i in (0, 4, 9):
        size = i + 1
        neighbours = torch.ones(size - 1, dtype=torch.float64)
        chain = torch.diag_embed(potential[:, :size].mT - 2) + torch.diag(neighbours, 1) + torch.diag(neighbours, -1)
        resolvent = torch.linalg.inv(chain - 1j * torch.eye(size))
        torch.testing.assert_close(g[:, i], resolvent[..., -1, -1], rtol=1e-10, atol=1e-10)

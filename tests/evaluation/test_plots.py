import sys
from pathlib import Path

import pytest

from resolvent.errors import ConfigError
from resolvent.evaluation import Influences, NeedleScores, PositionScores
from resolvent.evaluation.influence import Influence
from resolvent.evaluation.needle import NeedleScore
from resolvent.evaluation.plots import check_plot, plot_influence, plot_needle, plot_positions
from resolvent.evaluation.positions import PositionScore
from resolvent.evaluation.statistics import Estimate

SOME, NONE = Estimate(0.5, 0.1), Estimate(0.0, None)

POSITIONS = PositionScores(
    256, [PositionScore(n, n, 1, 1, SOME, 1.0, SOME, 1.0, error) for n, error in ((1, NONE), (2, SOME))]
)
NEEDLE = NeedleScores(256, 4, 32, [NeedleScore(distance, SOME, NONE, SOME) for distance in (16, 32)])
INFLUENCES = Influences(256, 1, 1, [Influence(1, 1, SOME, SOME), Influence(2, 2, NONE, NONE)])  # no logarithm of zero


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize(
    ("draw", "scores", "words"),
    [
        (plot_positions, POSITIONS, ["tokens read before", "windows of 256", "gain (nats per token)"]),
        (plot_needle, NEEDLE, ["tokens between fact and question", "ranked first of 32", "written exactly"]),
        (plot_influence, INFLUENCES, ["tokens before the predicted one", "gradient norm", "divergence if replaced"]),
    ],
)
def test_plots_have_labels(draw, scores, words: list[str], suffix: str, tmp_path: Path):
    path = tmp_path / f"plot{suffix}"
    check_plot(path)
    draw(scores, path)
    content = path.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
    else:
        for word in [*words, "training length 256"]:  # the text stands in the file as a comment on its outlines
            assert f"<!-- {word}" in content.decode(), word


def test_a_file_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match=r"plot\.gif must end in \.png, \.pdf or \.svg"):
        check_plot(Path("plot.gif"))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"needs matplotlib .*: pip install 'resolvent\[plots\]'"):
        check_plot(Path("plot.png"))

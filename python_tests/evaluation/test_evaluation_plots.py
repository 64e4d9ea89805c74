"""The picture of an evaluation: its bars and lines, read off the figure."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from engram_kernels.evaluation import plots
from engram_kernels.evaluation.outcomes import Retained

matplotlib = pytest.importorskip("matplotlib.figure", reason="pictures need matplotlib")

ASPECTS = {
    "prompt": {"begins": {"unedited": 0.1, "edited": 1.0}},
    "locality: Forgetfulness": {"begins": {"unedited": 0.6, "edited": 0.5}},
}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, which are not written."""
    figures = []
    monkeypatch.setattr(matplotlib.Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    monkeypatch.setattr("engram_kernels._plots.new_file", lambda path: nullcontext(Path(path)))
    return figures


def test_a_bar_for_each_aspect_before_and_after(drawn):
    plots.draw_measures(ASPECTS, "eval.png", title="title")
    (axes,) = drawn[0].axes
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [[0.1, 0.6], [1.0, 0.5]]
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels == ["prompt", "locality:\nForgetfulness"] and drawn[0].get_suptitle() == "title"


def test_retention_over_the_edits_done_or_over_the_first_edits(drawn):
    retained = [Retained(10, 10, 0.9), Retained(50, 10, 0.8), Retained(50, 50, 0.7)]
    plots.draw_measures(ASPECTS, "eval.png", retained)
    plots.draw_measures(ASPECTS, "eval.png", retained[1:])
    many, once = (figure.axes[1] for figure in drawn)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in many.lines}
    assert lines == {"first 10": ([10, 50], [0.9, 0.8]), "first 50": ([50], [0.7])}
    (line,) = once.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([10, 50], [0.8, 0.7])
    assert (many.get_xlabel(), once.get_xlabel()) == ("edits done", "first edits")


def test_the_file_is_a_whole_picture(tmp_path):
    plots.draw_measures(ASPECTS, tmp_path / "eval.png")
    content = (tmp_path / "eval.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    assert [path.name for path in tmp_path.iterdir()] == ["eval.png"]
    with pytest.raises(ValueError, match="aspects: expected at least one, got none"):
        plots.draw_measures({}, tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"expected a name that ends in \.png"):
        plots.draw_measures(ASPECTS, tmp_path / "none.jpg")

"""The table of the threshold: shares of questions that are easy to tell apart."""

import measure_threshold
import pytest
import torch
import typer
from evaluation_helpers import write_rows_and_encoder
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")


def test_questions_about_facts_are_told_from_others():
    generator = torch.Generator().manual_seed(0)
    keys, others = torch.randn(2, 40, 256, generator=generator)
    questions = keys + 0.3 * torch.randn(40, 256, generator=generator)
    one, few = measure_threshold.measure(keys, questions, others, (1, 8), memories=3)
    assert (one.facts, few.facts) == (1, 8) and one.first == few.first == 1
    for row in (one, few):
        assert (row.known, row.unknown, row.best) == (1, 1, 1) and 0.3 < row.threshold < 0.5
    # Questions about nothing that is there: none is known, and no threshold tells them from others.
    (lost,) = measure_threshold.measure(keys, others, others, (8,), memories=3)
    assert lost.known == 0 and lost.unknown == 1 and 0.5 <= lost.best < 0.8 and lost.first < 0.5


def test_the_script_prints_a_table(tmp_path):
    write_rows_and_encoder(
        tmp_path, ("The Tower", "The Louvre", "The museum", "The city", "The map", "A", "B", "C")
    )
    app = typer.Typer()
    app.command()(measure_threshold.main)
    arguments = ["--data", "rows.json", "--memories", "2", "--encoder", str(tmp_path / "encoder")]
    ended = CliRunner(env={"ENGRAM_DATA": str(tmp_path)}).invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    lines = ended.output.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["facts", "---:", "1", "4"]

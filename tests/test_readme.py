"""What the README claims first is what the experiments found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mode.experiments.chapter import work_out
from mode.experiments.definition import load_experiment
from mode.experiments.findings import read_findings
from mode.paths import Paths

REPOSITORY = Path(__file__).parent.parent


def test_the_first_claim_is_what_the_experiment_of_length_found() -> None:
    paths = Paths(REPOSITORY)
    findings = read_findings(paths.experiment_results / "length.parquet")
    chapter = work_out("length", load_experiment(paths.experiments / "length.yaml"), findings)
    rows = {line.label: line.figures["zero-shot"].mean for line in chapter.lines}
    claims = {(claim.compared.row, claim.compared.than): claim.difference for claim in chapter.claims}
    longer, top, longest, short = (
        claims[f"MoDE-4{arm} {length}", f"dense-long {length}"]
        for arm, length in (("", "2x"), (" top-1", "2x"), ("", "4x"), ("", "1x"))
    )
    text = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    said = re.search(r"\*\*What it gives, and at what cost\.\*\*(.*?)\[docs/paper\.md\]", text)
    assert said is not None
    figures = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", said[1])]
    found = [
        *(rows["MoDE-4 2x"], rows["dense-long 2x"]),
        *(longer.mean, longer.low, longer.high),
        top.mean,
        *(rows["MoDE-4 4x"], rows["dense-long 4x"]),
        *(longest.mean, longest.low, longest.high),
        *(short.mean, short.low, short.high),
    ]
    assert figures == [pytest.approx(figure, abs=0.0501) for figure in found]
    assert (longer.word, longest.word, short.word) == ("better", "better", "undecided")
    assert {claim.seeds for claim in (longer, top, longest, short)} == {3}
    fewer = (100 - rows["MoDE-4 4x"]) / (100 - rows["dense-long 4x"])
    assert "a fifth fewer errors" in said[1]
    assert fewer == pytest.approx(0.8, abs=0.02)

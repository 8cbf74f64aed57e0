"""Experiments without rows, over this project's own parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mode.experiments.definition import Experiment

REPOSITORY = Path(__file__).parents[2]
#: Of params.yaml.
CONTENT: dict[str, Any] = yaml.safe_load((REPOSITORY / "params.yaml").read_text())


def made_of(**runs: Any) -> Experiment:
    """An experiment of these runs."""
    return Experiment.model_validate({"title": "t", "question": "q", "runs": runs, "rows": {}})

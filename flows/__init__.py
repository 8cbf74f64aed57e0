"""Prefect: when and where the stages of dvc.yaml run. What a stage is made from, DVC alone decides."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import mode  # noqa: F401  # before Prefect, whose telemetry it turns off

#: The environment variable with the address of MLflow's page; `flows.ui` sets it for the flows that its worker starts.
MLFLOW_ADDRESS = "MODE_MLFLOW_URL"


def tools_first(environment: Mapping[str, str]) -> str:
    """A PATH in which the commands beside this Python come first, so that no environment has to be activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])

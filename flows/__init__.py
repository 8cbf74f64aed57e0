"""Prefect: when and where the stages of dvc.yaml run. What a stage is made from, DVC alone decides."""

import mode  # noqa: F401  # before Prefect, whose telemetry it turns off

#: The environment variable with the address of MLflow's page; `flows.ui` sets it for the flows that its worker starts.
MLFLOW_ADDRESS = "MODE_MLFLOW_URL"

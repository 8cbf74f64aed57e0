"""Prefect: when and where the stages of dvc.yaml run. What a stage is made from, DVC alone decides."""

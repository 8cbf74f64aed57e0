"""Parameters that the flows share: their types are the form in Prefect's page, and refuse wrong input."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from flows.devices import Devices

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]


class Machine(BaseModel):
    """Where trainings run, and how they are tried again."""

    model_config = ConfigDict(extra="forbid", title="Machine")

    devices: Devices = Field(
        default="auto",
        description="auto: every GPU of the worker's machine, or else its CPU; cpu; or GPUs by number: [0, 1].",
    )
    workers: int = Field(
        default=2,
        ge=1,
        le=64,
        description="Trainings side by side on the CPU; its threads are divided among them unless params.yaml says.",
    )
    per_device: int = Field(default=1, ge=1, le=8, description="Trainings on one GPU at a time.")
    engine: str = Field(
        default="",
        pattern=r"^(|local|dask|[a-z]+://[^\s/]+)$",
        description="Where captions are embedded and assigned: local; dask: processes on the worker's machine;"
        " a Dask scheduler that is there, such as tcp://host:8786; empty: as params.yaml says. The result is the same.",
    )
    retries: int = Field(
        default=2, ge=0, le=10, description="Times that a failing stage is tried again, from its last checkpoint."
    )
    retry_delay: float = Field(default=5.0, ge=0, le=3600, description="Seconds before it is tried again.")
    wait: bool = Field(
        default=True,
        description="If another flow works on this project: wait for it to end. Otherwise fail and say which one.",
    )

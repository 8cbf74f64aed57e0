"""What a run leaves on its page in Prefect: the comparison table, the routing heat map, links to the MLflow runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

from prefect import get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact

from flows import MLFLOW_ADDRESS
from flows.progress import Outcome
from mode.paths import Paths
from mode.reporting.tables import markdown
from mode.results import Results
from mode.tracking.store import page_addresses

#: A picture of this many bytes still fits into an artifact.
MAX_PICTURE = 400_000


def publish(root: Path, outcome: Outcome) -> None:
    """Create the artifacts that the project's results allow; a failure here never fails a run."""
    try:
        if outcome.failed:
            create_markdown_artifact(key="experts-lost" if not outcome.fatal else "failed", markdown=_failures(outcome))
        if "evaluate" in {*outcome.done, *outcome.cached}:
            table = comparison(Results.load(Paths(root).metrics), outcome.lost_experts)
            create_markdown_artifact(key="comparison", markdown=table, description="Models side by side")
        if picture := heat_map(root):
            create_markdown_artifact(key="routing", markdown=picture, description="Routing weights")
        for model, address in mlflow_pages(root).items():
            key = re.sub("[^a-z0-9]", "-", model.lower()).strip("-")
            create_link_artifact(key=f"mlflow-{key}", link=address, link_text=f"{model} in MLflow")
    except Exception as error:  # whatever the API says: the models are trained and recorded
        get_run_logger().warning("no artifact: %s", error)


def comparison(results: Results, lost: list[str]) -> str:
    """The project's own Markdown table of the results, and a word on experts in whose place the seed stands."""
    note = f"\n**The seed stands in for {', '.join(lost)}**.\n" if lost else ""
    return markdown(results) + note


def heat_map(root: Path) -> str:
    """Markdown of the routing plot as a data address, which needs no other server; empty if there is none that fits."""
    from mode.reporting.rendering import data_url  # brings matplotlib

    figures = Paths(root).figures
    for picture in (figures / "routing.png", figures / "routing.svg"):
        if picture.is_file() and picture.stat().st_size <= MAX_PICTURE:
            content = picture.read_bytes()
            return f"![routing]({data_url(content if picture.suffix == '.png' else content.decode())})"
    return ""


def mlflow_pages(root: Path) -> dict[str, str]:
    """Addresses of the comparison and of each model in MLflow; empty without a page or a database."""
    address = os.environ.get(MLFLOW_ADDRESS)
    return page_addresses(Paths(root).runs, address) if address else {}


def _failures(outcome: Outcome) -> str:
    lines = [f"- **{stage}**: {reason}" for stage, reason in outcome.failed.items()]
    if outcome.lost_experts:
        lines.append(f"\nThe seed stands in for {', '.join(outcome.lost_experts)} in the ensemble.")
    if outcome.skipped:
        lines.append(f"\nNot tried: {', '.join(outcome.skipped)}.")
    return "\n".join(lines)

"""What a run leaves on its page in Prefect: the comparison table, the routing heat map, links to the MLflow runs."""

from __future__ import annotations

import base64
import os
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
        if picture := _heat_map(root):
            create_markdown_artifact(key="routing", markdown=embedded(picture), description="Routing weights")
        for model, address in mlflow_pages(root).items():
            create_link_artifact(key=f"mlflow-{_key(model)}", link=address, link_text=f"{model} in MLflow")
    except Exception as error:  # whatever the API says: the models are trained and recorded
        get_run_logger().warning("no artifact: %s", error)


def comparison(results: Results, lost: list[str]) -> str:
    """The project's own Markdown table of the results, and a word on experts in whose place the seed stands."""
    note = f"\n**The seed stands in for {', '.join(lost)}**.\n" if lost else ""
    return markdown(results) + note


def embedded(picture: Path) -> str:
    """Markdown of a picture as a data address: the page shows it without another server."""
    kind = {".svg": "svg+xml", ".png": "png", ".webp": "webp"}[picture.suffix]
    return f"![{picture.stem}](data:image/{kind};base64,{base64.b64encode(picture.read_bytes()).decode()})"


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


def _heat_map(root: Path) -> Path | None:
    for suffix in (".png", ".webp", ".svg"):
        for picture in sorted(Paths(root).reports.rglob(f"*routing*{suffix}")):
            if picture.stat().st_size <= MAX_PICTURE:
                return picture
    return None


def _key(model: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in model.lower()).strip("-")

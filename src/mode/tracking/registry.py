"""The ensemble as a registered model."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

from mode.errors import ModeError, first_line
from mode.files import sha256_of
from mode.tracking.store import Store, database_uri, import_mlflow, pointed_at

REGISTERED_MODEL, CHAMPION = "mode-ensemble", "champion"
#: What the registered model needs wherever it is served, at the versions of here.
SERVING = (
    "mlflow", "torch", "torchvision", "open_clip_torch", "transformers", "peft", "scikit-learn", "pydantic", "pandas",
)  # fmt: skip
#: A request that the registered model comes with: one pixel, in PNG.
EXAMPLE: dict[str, Any] = {
    "image": "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC",
    "classes": ["white", "black"],
    "templates": ["{c}"],
}
#: What to do where a registry has no such ensemble.
NOT_REGISTERED = "check the name; `dvc repro report` registers this project's ensemble"
MODEL_NOTE = "A mixture of CLIP data experts as one zero-shot classifier; the classes' names weigh the experts."


def registered_folders(uri: str, runs: Path) -> tuple[Path, dict[str, Path]]:
    """The folders of an ensemble that `Tracker.register_ensemble` has registered.

    Args:
        uri: `models:/mode-ensemble@champion`, `models:/mode-ensemble/3` ...
        runs: the folder of MLflow's database; MLFLOW_REGISTRY_URI or MLFLOW_TRACKING_URI names another registry and is
            preferred.

    Returns:
        The router's folder, and model name -> model folder; from a registry elsewhere they are downloaded.

    Raises:
        ModeError: there is no such registry or model, or it is not an ensemble.
    """
    elsewhere = registry_elsewhere(uri, runs)
    mlflow = import_mlflow()
    from mlflow.exceptions import MlflowException

    try:
        with nullcontext() if elsewhere else pointed_at(database_uri(runs)):
            folder = Path(mlflow.artifacts.download_artifacts(uri))
            artifacts = mlflow.models.Model.load(folder).flavors["python_function"]["artifacts"]
    except MlflowException as error:
        raise ModeError(f"{uri}: {first_line(error)}", NOT_REGISTERED) from None
    folders = {name: folder / artifact["path"] for name, artifact in artifacts.items()}
    # The registry may be somebody else's: what it names lies in the model that it gave.
    inside = all(each.resolve().is_relative_to(folder.resolve()) for each in folders.values())
    if "mixture" not in folders or not inside:
        raise ModeError(f"{uri}: not an ensemble of this project", NOT_REGISTERED)
    return folders.pop("mixture"), folders


def registry_elsewhere(uri: str, runs: Path) -> bool:
    """Whether the environment names a registry. Raises `ModeError` if neither that nor the folder of runs has one."""
    if os.environ.get("MLFLOW_REGISTRY_URI") or os.environ.get("MLFLOW_TRACKING_URI"):
        return True
    if not (runs / "mlflow.db").is_file():
        raise ModeError(f"{uri}: {runs} holds no MLflow database", "run inside the project, or name the folder")
    return False


def fingerprint(folders: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of all files in some folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{folder.name}/{path.relative_to(folder)}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def registered(store: Store, content: str) -> str | None:
    """Version of the registered ensemble that has this content, if there is one."""
    versions = store.client.search_model_versions(f"name = '{REGISTERED_MODEL}'")
    return next((str(found.version) for found in versions if found.tags.get("content") == content), None)


def register(store: Store, router: Path, models: Mapping[str, Path], content: str, run_id: str | None) -> str:
    """Log the ensemble with all its folders, and make it a version of the registered model."""
    mlflow = import_mlflow()
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    text, number = DataType.string, DataType.double
    answer = {"label": text, "probability": number, "probabilities": Array(number)}
    signature = ModelSignature(
        inputs=Schema([ColSpec(text, "image")]),
        outputs=Schema([ColSpec(kind, name) for name, kind in answer.items()]),
        # Empty by default: a request without classes must be refused, not answered with those of an example.
        params=ParamSchema([ParamSpec(name, text, default=[], shape=(-1,)) for name in ("classes", "templates")]),
    )
    package = Path(__file__).parent.parent
    with pointed_at(store.uri):
        with (
            warnings.catch_warnings(),
            mlflow.start_run(run_id, experiment_id=store.experiment_id, run_name=None if run_id else "ensemble"),
        ):
            warnings.simplefilter("ignore")  # it misses type hints, from which it would infer the signature
            info = mlflow.pyfunc.log_model(
                name="ensemble",
                python_model=str(package / "tracking" / "pyfunc.py"),
                artifacts={"mixture": str(router)} | {name: str(folder) for name, folder in models.items()},
                code_paths=[str(package)],
                signature=signature,
                input_example=({"image": [EXAMPLE["image"]]}, {key: EXAMPLE[key] for key in ("classes", "templates")}),
                pip_requirements=[f"{name}=={metadata.version(name)}" for name in SERVING],
            )
        if not store.client.search_registered_models(f"name = '{REGISTERED_MODEL}'"):
            store.client.create_registered_model(REGISTERED_MODEL, description=MODEL_NOTE)
        version = store.client.create_model_version(
            REGISTERED_MODEL, info.model_uri, run_id=info.run_id, model_id=info.model_id, tags={"content": content}
        )
    return str(version.version)

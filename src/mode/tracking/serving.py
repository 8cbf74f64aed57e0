"""MLflow's servers as ASGI applications: the page of all runs, and the registered ensemble's answers over HTTP.

`mlflow server` and `mlflow models serve` start the same applications. MLflow's own checks of where a request comes from
let in every page that is served from this machine, and its scoring server has none, so both go behind `mode.door`.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mode.errors import ModeError, first_line
from mode.tracking.registry import NOT_REGISTERED, registry_elsewhere
from mode.tracking.store import database_uri, import_mlflow, pointed_at

if TYPE_CHECKING:
    from starlette.types import ASGIApp


def page_app(folder: Path) -> ASGIApp:
    """MLflow's server and page for the database in a folder; once in a process: MLflow reads its settings on import."""
    import_mlflow()
    from mlflow.server import constants

    os.environ |= {
        constants.BACKEND_STORE_URI_ENV_VAR: database_uri(folder),
        constants.REGISTRY_STORE_URI_ENV_VAR: database_uri(folder),
        constants.ARTIFACT_ROOT_ENV_VAR: (folder / "artifacts").absolute().as_uri(),
    }
    from mlflow.server.fastapi_app import app

    return app  # type: ignore[no-any-return]


def scoring_app(uri: str, runs: Path) -> ASGIApp:
    """MLflow's scoring server (`/invocations`, `/ping`) for a registered ensemble; `mode.tracking.pyfunc` answers.

    Args:
        uri, runs: as in `mode.tracking.registry.registered_folders`.

    Raises:
        ModeError: there is no such registry or model.
    """
    elsewhere = registry_elsewhere(uri, runs)
    mlflow = import_mlflow()
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import scoring_server

    try:
        with nullcontext() if elsewhere else pointed_at(database_uri(runs)):
            model = mlflow.pyfunc.load_model(uri)
    except MlflowException as error:
        raise ModeError(f"{uri}: {first_line(error)}", NOT_REGISTERED) from None
    return scoring_server.init(model)  # type: ignore[no-any-return]

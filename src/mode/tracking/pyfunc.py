"""The ensemble in MLflow's model format.

MLflow keeps this file with a logged model and runs it when the model is loaded ("models from code", so that nothing is
pickled); the library never imports it. `mode.tracking.runs.Tracker.register_ensemble` logs it.

A request has one column, `image` (base64), and the parameters `classes` and `templates`; the answer has a row for each
image::

    {"dataframe_split": {"columns": ["image"], "data": [["iVBORw0KGgo..."]]},
     "params": {"classes": ["white chess king", "black chess king"], "templates": ["{c}"]}}
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

from mode.ensemble.model import Ensemble
from mode.ensemble.request import read_request
from mode.errors import ModeError


class EnsembleModel(PythonModel):  # type: ignore[misc]  # MLflow is untyped
    """Label, its probability and all probabilities (in the classes' order) for each image."""

    # Or MLflow says at every log and load, in colour whatever the terminal, that `predict` should have type hints.
    _skip_type_hint_validation = True

    def load_context(self, context: Any) -> None:
        """Open the router and the experts among the artifacts."""
        folders = {name: Path(path) for name, path in context.artifacts.items()}
        self.ensemble = Ensemble.load(folders.pop("mixture"), folders)
        # Most requests have the classes of the one before.
        self.adapt = lru_cache(maxsize=1)(self.ensemble.adapt)

    # Without type hints, for MLflow would take them for the signature; that is logged with the model.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ARG002
        """See the module; what is wrong with a request becomes MLflow's 400."""
        try:
            if "image" not in model_input:
                raise ModeError("the input has no column `image`", "send images in it, as base64")
            request = read_request(list(model_input["image"]), params or {})
            task = self.adapt(tuple(request.classes), tuple(request.templates))
            probabilities = task(request.images).cpu()
        except ModeError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None
        best = probabilities.max(dim=1)
        return pd.DataFrame(
            {
                "label": [task.classes[column] for column in best.indices.tolist()],
                "probability": best.values.tolist(),
                "probabilities": probabilities.tolist(),
            }
        )


set_model(EnsembleModel())

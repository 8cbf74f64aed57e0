"""MoDE: Mixture of Data Experts for CLIP.

`mode.load` opens a trained ensemble; see `mode.ensemble.model` for what it does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mode.clip.device import Precision
    from mode.ensemble.model import Ensemble

__all__ = ["load"]

#: Nothing that this project is made with tells its maker of its use, unless the environment says otherwise. Set here,
#: because these libraries read it when they are imported, and whatever imports them here has imported `mode` before.
_NO_TELEMETRY = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
for _name, _value in _NO_TELEMETRY.items():
    os.environ.setdefault(_name, _value)


def load(
    where: str | Path,
    device: str | None = None,
    precision: Precision | None = None,
    batch_size: int | None = None,
    runs: str | Path = "mlruns",
) -> Ensemble:
    """Open a trained ensemble.

    On a CPU, call it before torch makes its first large tensor: it asks for huge pages (`THP_MEM_ALLOC_ENABLE`), which
    save a tenth of the time of a batch.

    Args:
        where: a folder of trained models (`models/`), the ensemble's own folder in it (`models/ensemble`), or a
            registered model (`models:/mode-ensemble@champion`, `models:/mode-ensemble/3`).
        device: `cpu`, `cuda`, `cuda:1` ...; default the GPU where there is one.
        precision: `fp32`, `amp` (bfloat16 autocast) or `bf16` (weights too); default `amp` on a GPU, else `fp32`.
        batch_size: images or texts in one forward pass; default 256 on a GPU, else 64.
        runs: of a registered model: the folder of MLflow's database. The variable MLFLOW_REGISTRY_URI or
            MLFLOW_TRACKING_URI names another registry and is preferred.

    Returns:
        `mode.ensemble.model.Ensemble`, in evaluation mode.

    Raises:
        ModeError: there is no ensemble, an expert is neither trained nor stood in for by the seed, a file is damaged,
            or the device is not there.

    Example:
        >>> import mode
        >>> ensemble = mode.load("models")
        >>> task = ensemble.adapt(["white chess king", "ace of hearts"])
        >>> [expert for expert, weight in task.weights.items() if weight > 0]
        ['expert-0', 'expert-1']
        >>> task("king.png").shape                                    # probabilities, a row for each image
        torch.Size([1, 2])
    """
    # Imported here: `import mode` and `mode --help` must not wait for torch.
    from mode.processes import use_huge_pages

    use_huge_pages()
    from mode.ensemble.model import Ensemble, find_folders

    if str(where).startswith("models:/"):
        from mode.tracking.registry import registered_folders

        router, models = registered_folders(str(where), Path(runs))
    else:
        router, models = find_folders(Path(where))
    return Ensemble.load(router, models, device=device, precision=precision, batch_size=batch_size)

"""One function per stage of dvc.yaml: reads parameters and inputs, calls the library, writes outputs.

Libraries are imported inside the functions, since a stage needs few of them and the others cost seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from mode.errors import ModeError
from mode.params import load_params
from mode.roles import TRAINED
from mode.stages.evaluation import evaluate, variants
from mode.stages.machine import as_job, in_several_processes
from mode.stages.preparation import assign, cluster, data, embed, embedder, index, names, tasks, watch_seed, watch_tasks
from mode.stages.project import Project
from mode.stages.reports import report
from mode.stages.routing import ensemble
from mode.stages.training import train_role
from mode.stages.version import check_version


def run_stage(name: str, key: str | None, root: Path, params: Path) -> None:
    """Run one stage of dvc.yaml.

    Raises:
        ModeError: no such stage, a key too many or too few, a project of another mode than this one (see
            `mode.stages.version`), or anything in the stage's input that the user can mend.
    """
    if name in KEYED_STAGES:
        if key is None:
            raise ModeError(f"stage {name} needs a key", f"mode stage {name} KEY, such as `base` or `expert-0`")
    elif name not in STAGES:
        raise ModeError(f"no stage is called '{name}'", f"there are: {', '.join([*KEYED_STAGES, *STAGES])}")
    elif key is not None:
        raise ModeError(f"stage {name} takes no key, but got '{key}'")
    project = Project(root, load_params(params))
    check_version(project)
    arguments = [name, *([key] if key else []), "--params", str(params)]
    if as_job(project, name, key, arguments) or in_several_processes(project.params.machine, name, arguments):
        return
    if key is not None:
        KEYED_STAGES[name](project, key)
    else:
        STAGES[name](project)


KEYED_STAGES: dict[str, Callable[[Project, str], None]] = {
    "data": data,
    "index": index,
    "embed": embed,
    "cluster": cluster,
    "assign": assign,
    **{role.name: partial(train_role, role) for role in TRAINED if role.many},
}


STAGES: dict[str, Callable[[Project], None]] = {
    "names": names,
    "watch-tasks": watch_tasks,
    "watch-seed": watch_seed,
    "tasks": tasks,
    "embedder": embedder,
    **{role.name: partial(train_role, role) for role in TRAINED if not role.many},
    "ensemble": ensemble,
    "evaluate": evaluate,
    "variants": variants,
    "report": report,
}

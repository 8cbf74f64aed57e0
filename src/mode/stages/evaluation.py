"""How good everything is: the stages, and the same for any tasks and checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mode.errors import ModeError
from mode.params import load_params
from mode.roles import ENSEMBLE, FULL, SEED, UNIFORM, UNIFORM_FULL, role_of
from mode.stages.project import Project, cards_of, task_folders, trained_models, write_json
from mode.stages.routing import calibration_captions, soup_pairs

if TYPE_CHECKING:
    from mode.data.leakage import Leakage
    from mode.evaluation.tasks import Task
    from mode.results import Results


def evaluate(project: Project) -> None:
    """Every model, the uniform average and the ensemble on every task."""
    from mode.reporting.summary import headline

    results = _evaluate(project, project.models, task_folders(project))
    results.save(project.metrics)
    write_json(project.reports / "summary.json", headline(results))


def variants(project: Project) -> None:
    """Other ways to use the same models on every task: those that `variants.arms` names."""
    from mode.results import Results

    arms, known = project.params.variants.arms, Results.load(project.metrics)
    found = _variants(project, arms, known) if arms else Results()
    found.provenance = known.provenance | _program(project) | {"arms": arms}
    found.save(project.variants)


def _variants(project: Project, arms: list[str], known: Results) -> Results:
    """Arms that need words, where the experts are weighed by each image, are left out in one line: the run goes on."""
    from mode.ensemble.router import Router
    from mode.evaluation.arms import without_words
    from mode.evaluation.variants import evaluate_variants
    from mode.results import Results

    router = Router.load(project.ensemble)
    if left_out := without_words(arms, router):
        print(f"variants: left out {', '.join(left_out)}: they need words, and embedding.view is 'image'")
        arms = [arm for arm in arms if arm not in left_out]
    if not arms:
        return Results()
    trained = {name: project.model(name) for name in trained_models(project)}
    return evaluate_variants(
        trained,
        router,
        task_folders(project),
        project.params.machine,
        arms,
        calibration_captions(project) if "coarse" in arms else (),
        project.params.random_seed,
        known.cost,
        soup_pairs(project) if "merged-layers" in arms else (),
    )


def evaluate_folders(tasks: list[str], models: Path, params: Path, device: str) -> Results:
    """Figures of all models in `models` on any task folders."""
    return _evaluate(Project(Path.cwd(), load_params(params)), models, [Path(task) for task in tasks], device)


def evaluate_suite(suite: str, root: Path, models: Path, params: Path, device: str) -> Results:
    """The same on those tasks of a standard suite that lie under `root`; `suite` in the result says which are missing.

    Raises:
        ModeError: no such suite, none of its tasks is there, or one of them is damaged.
    """
    from mode.evaluation.suites import open_suite
    from mode.results import SuiteFacts

    found = open_suite(suite, root)
    results = _evaluate(Project(Path.cwd(), load_params(params)), models, found.tasks, device)
    results.suite = SuiteFacts(name=suite, missing=list(found.missing))
    return results


def evaluate_checkpoint(checkpoint: Path, tasks: list[str], params: Path, device: str) -> Results:
    """Figures of one model, unfinished or not, on task folders; by default on the project's tasks.

    Args:
        checkpoint: a model folder, or a checkpoint of a training that is not finished (the file, or its folder).
        tasks, params, device: as of `evaluate_folders`.

    Raises:
        ModeError: neither of the two; damaged; or the project's tasks are not there yet.
    """
    from mode.clip.folder import is_model
    from mode.clip.model import load_model
    from mode.evaluation.evaluate import evaluate_tasks
    from mode.paths import CHECKPOINT
    from mode.training.checkpoint import open_checkpoint

    project = Project(Path.cwd(), load_params(params))
    if not tasks and not project.task_list.is_file():
        raise ModeError("there are no tasks yet", "`dvc repro tasks` makes them, or give some with --tasks")
    file = checkpoint / CHECKPOINT if checkpoint.is_dir() else checkpoint
    if is_model(checkpoint):
        clip, name = load_model(checkpoint), checkpoint.resolve().name
    elif file.is_file():
        clip, step = open_checkpoint(file, project.models)
        name = f"step {step:,}"
    else:
        raise ModeError(
            f"{checkpoint}: neither a model folder nor a checkpoint",
            "checkpoints/NAME/kept/STEP, or checkpoints/NAME/*/checkpoint.safetensors of a training under way",
        )
    machine = project.params.machine.model_copy(update={"device": device})
    return evaluate_tasks({name: clip}, None, [Path(task) for task in tasks] or task_folders(project), machine)


def look_for_leakage(root: Path, params: Path, distance: int) -> Leakage:
    """Search the project's training images for images of its tasks, and write `leakage.json`.

    Images that the index has left out already stay in the list, or they would come back with the next index.

    Raises:
        ModeError: tasks or indexes are not there yet.
    """
    from mode.data.leakage import Leakage
    from mode.evaluation.leakage import find_leakage
    from mode.evaluation.tasks import open_tasks

    project = Project(root, load_params(params))
    indexes = {source: project.index(source) for source in project.params.sources}
    if not project.task_list.is_file() or not all(folder.is_dir() for folder in indexes.values()):
        raise ModeError("there are no tasks or no index to compare yet", "`dvc repro tasks index` makes them")
    found = find_leakage(indexes, project.root, open_tasks(task_folders(project)), distance)
    if project.params.index.drop_leaked and project.leakage.is_file():
        found = found.with_dropped(Leakage.load(project.leakage))
    found.save(project.leakage)
    return found


def order_experts(root: Path, params: Path, task: str) -> dict[str, float]:
    """Experts by their routing weight for a task, largest first; needs the ensemble stage, and no trained expert.

    `task` is the name of one of the project's tasks, or a task folder.

    Raises:
        ModeError: no such task, or the ensemble's conditions are not there yet.
    """
    from mode.ensemble.router import Router
    from mode.ensemble.rules import largest_first
    from mode.evaluation.tasks import open_task

    project = Project(root, load_params(params))
    folder = _task_folder(project, task)
    weights = Router.load(project.ensemble).weights(open_task(folder).prompts)
    return {expert: weights[expert] for expert in largest_first(weights)}


def class_names(root: Path, params: Path, tasks: Sequence[str]) -> list[str]:
    """Class names of tasks, each once, in the order of the tasks.

    `tasks` are names of the project's tasks, or task folders.

    Raises:
        ModeError: no such task, or one that has no classes.
    """
    from mode.evaluation.tasks import open_task

    project, names = Project(root, load_params(params)), dict[str, None]()
    for task in tasks:
        opened = open_task(_task_folder(project, task))
        if opened.kind != "classification":
            raise ModeError(f"{task}: a task of {opened.kind} has no class names", "give tasks of classification")
        names |= dict.fromkeys(opened.classes)
    return [*names]


def _task_folder(project: Project, task: str) -> Path:
    """The folder of a task of the project by its name, or any task folder."""
    folders = {folder.name: folder for folder in (task_folders(project) if project.task_list.is_file() else [])}
    folder = folders.get(task, project.root / task)
    if not folder.is_dir():
        some = ", ".join([*folders][:8]) + (", ..." if len(folders) > 8 else "")
        known = (
            f"give a task folder, or one of: {some}"
            if some
            else "give a task folder; `dvc repro tasks` makes the project's"
        )
        raise ModeError(f"no task is called '{task}'", known)
    return folder


def _evaluate(
    project: Project, models: Path, tasks: Sequence[Path] | Sequence[Task], device: str | None = None
) -> Results:
    """Figures of all models, with what each cost and what they were made from; by default on the project's device."""
    from mode.ensemble.router import Router
    from mode.evaluation.evaluate import evaluate_tasks
    from mode.integrity import check_parents
    from mode.results import Cost, cost_together

    trained = [name for name in trained_models(project) if (models / name).is_dir()]
    check_parents(models, trained)
    router = Router.load(folder) if (folder := models / ENSEMBLE.name).is_dir() else None
    machine = project.params.machine
    machine = machine.model_copy(update={"device": device or machine.device})
    results = evaluate_tasks({name: models / name for name in trained}, router, tasks, machine)
    cards = cards_of(models, trained)
    results.cost = {name: Cost(**card["total"]) for name, card in cards.items()}
    if SEED.name in cards:
        together = {}
        if copies := [name for name in cards if role_of(name) is FULL]:
            together[UNIFORM_FULL.name] = copies
        if router is not None:
            answering = [name for name in router.members(cards).values() if name != SEED.name]
            together[UNIFORM.name] = together[ENSEMBLE.name] = answering
        for name, members in together.items():
            results.cost[name] = cost_together(results.cost[SEED.name], [results.cost[each] for each in members])
    results.provenance = _provenance(project)
    if router is not None and results.retrieval.tasks:
        results.provenance["retrieval_protocol"] = "image" if router.by_image else router.routing.protocol
    return results


def _provenance(project: Project) -> dict[str, Any]:
    """What made the figures: commit, parameters, versions, machine."""
    beside: dict[str, Any] = {"machine": True, "variants": True, "training": set(project.params.training.BESIDE)}
    parameters = json.dumps(project.params.model_dump(mode="json", exclude=beside), sort_keys=True)
    return _program(project) | {
        "params_sha256": hashlib.sha256(parameters.encode()).hexdigest(),
        "random_seed": project.params.random_seed,
    }


def _program(project: Project) -> dict[str, Any]:
    """Of that, all but the parameters."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(project.root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no", "src", "flows")),
        "versions": {name: version(name) for name in ("mode-clip", "torch", "open_clip_torch")},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }

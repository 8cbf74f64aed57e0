"""`mode init`: a new project of files alone, for whoever has installed mode; and `mode init --upgrade`.

There is one copy of each file: dvc.yaml, params.yaml, flows and the rest are this repository's own, which the wheel
carries along (pyproject.toml). Only dvc.yaml is changed on the way: stages that depend on folders of code here depend
on their checksums there, see `mode.stages.version`.
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from mode import edit
from mode.errors import ModeError
from mode.experiments.definition import load_experiment
from mode.files import recover, write_aside
from mode.params import Params, load_params, parse_params
from mode.paths import Paths
from mode.stages import preparation
from mode.stages.project import BUILT_IN, Project, write_text
from mode.stages.sources import keep_clusters_watch, keep_seed_watch, keep_whole_watch
from mode.stages.version import PACKAGE, Version, checksum_of, code_name

#: Files that are a project's own once it is made, and those that an upgrade replaces (`flows` is a folder).
OWN = (
    ".dvc/.gitignore",
    ".dvc/config",
    ".dvcignore",
    ".gitignore",
    "arrivals.json",
    "leakage.json",
    "mlruns/.gitignore",
    "watch.yaml",
)
UPGRADED = ("dvc.yaml", "prefect.yaml", "flows")
#: What a folder may hold in which a project is started.
WELCOME = frozenset({".git", ".venv", "venv"})
#: All that is written, as a folder lists it; git's is one of these where there was none.
PARTS = frozenset(
    name.partition("/")[0] for name in (*OWN, *UPGRADED, "experiments", "params.yaml", "mode-version.yaml")
)
#: Folders that stages make. DVC empties what is an output before its stage runs: nobody else's files may lie there.
MADE = frozenset({"data", "models", "reports", "checkpoints"})
#: Where a project is put together in a folder that is there already.
ASIDE = ".mode-init"
_PIPELINE_COMMENT = """\
# What is made from what. `dvc repro` runs the stages that are not up to date; `mode stage NAME [KEY]` is one of them.
#
# No part of params.yaml or watch.yaml is in a command, for a shell would run what it finds there. A stage is told its
# source or expert by the variable DVC_STAGE (`expert@expert-0`), which DVC sets for every command.
#
# A stage names all that decides its result: the files it reads, the sections of params.yaml that are its own, and in
# mode-version.yaml the parts of mode that make its output. What only says where and how fast a stage runs (`machine:`
# in params.yaml) is not named. `mode init --upgrade` writes this file anew.
"""


@dataclass(frozen=True)
class Preset:
    """A params.yaml to start from.

    Attributes:
        about: what it is for, in a few words.
        file: in `mode/presets`; `params.yaml`: this repository's own.
        changes: key -> value that differs from the file.
        needs: what has to be given: `shards`, `tasks`, `seed_model`.
        experiments: whether this repository's experiments on the built-in data come along.
    """

    about: str
    file: str
    changes: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ("shards", "tasks")
    experiments: bool = False


PRESETS = {
    "demo": Preset("a tiny CLIP on the built-in data: minutes on a CPU", "params.yaml", needs=(), experiments=True),
    "finetune": Preset("experts from a pretrained CLIP", "finetune.yaml", needs=("seed_model", "shards", "tasks")),
    "paper-b16": Preset("the paper's numbers, ViT-B/16", "paper.yaml", {"model.name": "ViT-B-16-quickgelu"}),
    "paper-b32": Preset("the paper's numbers, ViT-B/32", "paper.yaml", {"model.name": "ViT-B-32-quickgelu"}),
}


class Upgrade(NamedTuple):
    """What an upgrade did: versions, parts of mode whose code has changed, files it wrote, sections it added."""

    before: str
    after: str
    code: list[str]
    files: list[str]
    sections: list[str]

    def lines(self) -> list[str]:
        """What to tell of it."""
        if not (self.code or self.files or self.sections) and self.before == self.after:
            return [f"the project is of mode {self.after} already"]
        return [
            f"the project is of mode {self.after} now, and was of {self.before}",
            f"other code: {', '.join(self.code) or 'none that a stage depends on'}",
            *([f"written anew: {', '.join(self.files)}"] if self.files else []),
            *([f"new in params.yaml, with defaults: {', '.join(self.sections)}"] if self.sections else []),
            "`dvc status` says what will run again, `dvc repro` runs it",
        ]


def next_steps(folder: Path, preset: str) -> list[str]:
    """What to do in a new project."""
    enter = [] if folder.resolve() == Path.cwd() else [(f"cd {shlex.quote(str(folder))}", "")]
    commands = [
        *enter,
        ("dvc repro", "everything, up to reports/index.html; interrupted, it goes on where it was"),
        ("mode results", "the table again; every number is in params.yaml, which `mode params` explains"),
        ("python -m flows.ui", "or first this: pages to start, watch and compare trainings"),
    ]
    return [
        f"{folder}: a project with the preset '{preset}'. Next:",
        *(f"    {command:22}{f'# {about}' if about else ''}".rstrip() for command, about in commands),
    ]


def preset_called(name: str) -> Preset:
    """Raises `ModeError`, which names all, if there is none."""
    if name not in PRESETS:
        raise ModeError(f"no preset is called '{name}'", f"there are: {', '.join(PRESETS)}")
    return PRESETS[name]


def start_project(
    folder: Path,
    preset: str,
    shards: str | None = None,
    tasks: Sequence[str] = (),
    seed_model: str | None = None,
    force: bool = False,
    columns: Mapping[str, str] | None = None,
) -> None:
    """Make a project. Everything is checked first, and then written aside and moved.

    Args:
        folder: new, empty, or with nothing but a git repository and a virtual environment.
        preset: one of `PRESETS`.
        shards: as `sources.base.shards`; a path is from the current folder.
        tasks: as `evaluation.tasks`, or just `glyphs`; paths are from the current folder.
        seed_model: for `finetune`, see `seed_called`; paths are from the current folder.
        force: the folder may hold other files. None is replaced.
        columns: `image_column` and `caption_column` of a table, if they have other names.

    Raises:
        ModeError: no such preset, something that it needs is missing, no shards, not a task folder, no such model, or a
            folder that is not to be written into; nothing is written then.
    """
    from mode.data.shards.manifest import build_manifest
    from mode.evaluation.tasks import open_tasks

    chosen = preset_called(preset)
    given: dict[str, Any] = {"shards": shards, "tasks": list(tasks), "seed_model": seed_model}
    for what in chosen.needs:
        if not given[what]:
            raise ModeError(
                f"preset '{preset}': no {what.replace('_', ' ')} given", f"give it with --{what.replace('_', '-')}"
            )
    if shards == "" or "" in tasks:
        raise ModeError("an empty name of shards or tasks", "name files that are there, or `glyphs`: the built-in data")
    changes = dict(chosen.changes)
    if shards:
        changes["sources.base.shards"] = _from(folder, shards)
        changes |= {f"sources.base.{key}": column for key, column in (columns or {}).items()}
    elif columns:
        raise ModeError("columns are of a table, and none is given", "name it with --shards")
    if tasks:
        built_in = list(tasks) == [BUILT_IN]
        changes["evaluation.tasks"] = BUILT_IN if built_in else [_from(folder, task) for task in tasks]
    if seed_model:
        if "seed_model" not in chosen.needs:
            raise ModeError(f"preset '{preset}' trains its own seed", "--seed-model belongs to --preset finetune")
        changes["seed.weights"] = None  # unless it needs some
        changes |= {f"seed.{key}": value for key, value in seed_called(seed_model, folder).items()}
    text = preset_text(chosen.file, changes)
    params = parse_params(yaml.safe_load(text))
    if (source := params.sources["base"]).shards != BUILT_IN:
        build_manifest(source, folder)
    if params.evaluation.tasks != BUILT_IN:
        open_tasks([folder / task for task in params.evaluation.tasks])
    with new_project(folder, force) as new:
        _write_project(new, text, params)
        if chosen.experiments:
            _write_experiments(new)
        _put_under_git(new, folder)


def seed_called(given: str, folder: Path) -> dict[str, str]:
    """`name` and `weights` of a pretrained seed, as params.yaml has them. What lies on this machine is looked for.

    Args:
        given: `hf-hub:ORG/NAME`; a model folder, `local-dir:` before it or not; or `ARCHITECTURE:WEIGHTS`, an open_clip
            architecture or a configuration file, and a tag of open_clip or a file.
        folder: the project.

    Raises:
        ModeError: no such folder, file, architecture or tag.

    >>> seed_called("hf-hub:timm/ViT-B-16-SigLIP", Path())
    {'name': 'hf-hub:timm/ViT-B-16-SigLIP'}
    """
    import open_clip

    from mode.clip.folder import CONFIG
    from mode.clip.pretrained import check_hub_name

    kind, _, rest = given.partition(":")
    if kind == "hf-hub":
        check_hub_name(given, "--seed-model")
        return {"name": given}
    if kind == "local-dir" or Path(given).is_dir():
        path = Path(rest if kind == "local-dir" else given)
        if not (path / CONFIG).is_file():
            raise ModeError(f"{path}: not a model folder: it has no {CONFIG}", "--seed-model names one")
        return {"name": f"local-dir:{_from(folder, str(path))}"}
    if not rest:
        raise ModeError(
            f"--seed-model: '{given}' is no folder, and an architecture alone has no weights",
            "ViT-B-16:laion2b_s34b_b88k, ViT-B-16:FILE, hf-hub:ORG/NAME or a model folder",
        )
    configured, file = kind.endswith(".json") and Path(kind).is_file(), Path(rest)
    if not configured and kind not in open_clip.list_models():
        raise ModeError(f"--seed-model: open_clip has no architecture '{kind}'", "open_clip.list_models() lists all")
    if file.suffix or len(file.parts) > 1:
        if not file.is_file():
            raise ModeError(f"{file}: no such file", "--seed-model ARCHITECTURE:FILE names weights")
        rest = _from(folder, rest)
    elif rest not in (known := open_clip.list_pretrained_tags_by_model(kind)):
        raise ModeError(f"--seed-model: open_clip has no weights '{rest}' of {kind}", f"it has {', '.join(known)}")
    return {"name": _from(folder, kind) if configured else kind, "weights": rest}


def upgrade_project(folder: Path, force: bool = False) -> Upgrade:
    """Write the files of a project that are mode's own as the mode that runs has them; params.yaml gets new sections.

    Args:
        folder: of a project that `start_project` has made.
        force: replace files that were edited, too.

    Raises:
        ModeError: no such project; or a file to replace was edited, then nothing is written.
    """
    paths = Paths(folder)
    recorded = Version.load(paths.version_file)
    files = _upgraded_files()
    outdated = [name for name in recorded.files if name not in files]
    there = {name: _content(folder / name) for name in [*files, *outdated]}
    edited = [
        name
        for name, text in there.items()
        if text is not None and text != files.get(name) and checksum_of(text) != recorded.files.get(name)
    ]
    if edited and not force:
        raise ModeError(f"edited here: {', '.join(edited)}", "keep what you need, then --force replaces them")
    version = _version_of(files)
    text = paths.params_file.read_text(encoding="utf-8")
    completed, sections = edit.add_sections(text, _sections_of(yaml.safe_load(files["dvc.yaml"])))
    written = [name for name, content in files.items() if there[name] != content]
    for name in written:
        write_text(folder / name, files[name])
    for name in outdated:
        (folder / name).unlink(missing_ok=True)
    if sections:
        write_text(paths.params_file, completed)
    project = Project(folder, load_params(paths.params_file))
    # What an older project lacks.
    keep_seed_watch(project)
    keep_clusters_watch(project)
    if not paths.arrivals.is_file():
        shutil.copyfile(_template(paths.arrivals.name), paths.arrivals)
    changed = recorded.changed()
    # Behind all that is written anew: if the call is cut short, it can be made again.
    if version != recorded:
        version.save(paths.version_file)
    if paths.dvc_lock.is_file():
        # DVC has removed its file for the run that was refused, and would call everything that waits for it changed.
        preparation.names(project)
    return Upgrade(recorded.version, version.version, changed, [*written, *outdated], sections)


def project_pipeline(text: str) -> str:
    """dvc.yaml of a project without code, from this repository's.

    A stage that depends on `src/mode/NAME` there depends on `code.NAME` of mode-version.yaml here. All else is alike.
    """
    keeping = YAML()
    keeping.width = 120
    keeping.indent(mapping=2, sequence=4, offset=2)
    content = keeping.load(text)
    stages = [stage.get("do", stage) for stage in content["stages"].values()]
    # Of all before any is changed: two stages may share one list.
    needs = [list(stage.get("deps", [])) for stage in stages]
    for stage, deps in zip(stages, needs, strict=True):
        code = [f"code.{name}" for dep in deps if (name := code_name(dep))]
        data = [dep for dep in deps if code_name(dep) is None]
        if not code:
            continue
        place = list(stage).index("deps")
        del stage["deps"]
        if data:
            stage.insert(place, "deps", CommentedSeq(data))
        keys = CommentedMap({Paths(Path()).version_file.name: CommentedSeq(code)})
        if "params" not in stage:
            stage.insert(place + bool(data), "params", CommentedSeq())
        stage["params"].fa.set_block_style()
        stage["params"].append(keys)
    stream = io.StringIO()
    keeping.dump(content, stream)
    _, start, rest = stream.getvalue().partition("vars:\n")
    return _PIPELINE_COMMENT + start + rest


def preset_text(file: str, changes: dict[str, Any]) -> str:
    """The params.yaml of a preset with some values of its keys changed, its comments kept."""
    path = _template(file) if file == Paths(Path()).params_file.name else PACKAGE / "presets" / file
    text = path.read_text(encoding="utf-8")
    return edit.set_values(text, changes) if changes else text


@contextmanager
def new_project(folder: Path, force: bool) -> Iterator[Path]:
    """A new folder to put a project together in, which then becomes `folder`, or its content that of `folder`.

    Raises:
        ModeError: `folder` is no folder, or holds what it must not.
    """
    if not os.path.lexists(folder):
        with write_aside(folder) as new:
            new.mkdir()
            yield new
        return
    if not folder.is_dir():
        raise ModeError(f"{folder}: not a folder", "name a new or empty one")
    aside = folder / ASIDE
    recover(aside)
    # If a call was killed while it moved the parts of a project, those that are there already are whole, and its own.
    begun = aside.is_dir() and not Paths(folder).params_file.exists()
    there = {path.name for path in folder.iterdir()} - {ASIDE} - (PARTS if begun else set())
    if (others := sorted(there - WELCOME)) and not force:
        raise ModeError(f"{folder}: not empty: {_some(others)}", "name a new folder, or --force to write beside it")
    if taken := sorted(there & (PARTS | MADE)):
        raise ModeError(f"{folder}: {_some(taken)} there already", "a project needs these names; name a new folder")
    with write_aside(aside) as new:
        new.mkdir()
        yield new
    # One by one, for the folder itself may be somebody's current one. params.yaml comes last.
    for part in sorted(aside.iterdir(), key=lambda part: (part.name == "params.yaml", part.name)):
        if (folder / part.name).is_dir():
            shutil.rmtree(folder / part.name)
        part.replace(folder / part.name)
    aside.rmdir()


def _write_project(root: Path, text: str, params: Params) -> None:
    """All files, into a new folder."""
    for name in OWN:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_template(name), root / name)
    files = _upgraded_files()
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    project = Project(root, params)
    _version_of(files).save(project.version_file)
    project.params_file.write_text(text, encoding="utf-8")
    keep_whole_watch(project)


def _write_experiments(root: Path) -> None:
    """Those of this repository's experiments that need no data of their own; they are the project's then."""
    folder = Paths(root).experiments
    folder.mkdir()
    for path in sorted(_template(folder.name).glob("*.yaml")):
        if not load_experiment(path).data:
            shutil.copyfile(path, folder / path.name)


def _put_under_git(new: Path, folder: Path) -> None:
    """A git repository of its own, unless the folder lies in one; without git DVC is told to do without."""
    if shutil.which("git") is None:
        config = new / ".dvc/config"
        config.write_text(
            config.read_text(encoding="utf-8").replace("[core]\n", "[core]\n    no_scm = true\n"), "utf-8"
        )
    elif not _git("-C", str(_nearest(folder)), "rev-parse", "--is-inside-work-tree"):
        _git("init", "--quiet", str(new))


def _git(*arguments: str) -> bool:
    """Whether a git command succeeds; of no other repository, as a hook of git's would have it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(["git", *arguments], env=environment, capture_output=True, check=False).returncode == 0


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _from(folder: Path, given: str) -> str:
    """A path from the current folder as params.yaml has it: from the project's, if it lies there, or absolute."""
    from mode.data.shards.places import is_url

    if given == BUILT_IN or is_url(given):
        return given
    path, root = os.path.abspath(given), os.path.abspath(folder)  # noqa: PTH100 (`..` goes, links stay)
    return os.path.relpath(path, root) if path.startswith(root + os.sep) else path


def _template(name: str) -> Path:
    """One of this repository's files, which the wheel carries along."""
    carried, repository = PACKAGE / "template" / name, PACKAGE.parent.parent / name
    for path in (carried, repository):
        if path.exists():
            return path
    raise ModeError(f"{carried}: no such file: this installation of mode is not whole", "install its wheel again")


def _upgraded_files() -> dict[str, str]:
    """Path in a project -> text, of the files that are mode's own."""
    files = {"dvc.yaml": project_pipeline(_template("dvc.yaml").read_text(encoding="utf-8"))}
    for path in [_template("prefect.yaml"), *sorted(_template("flows").glob("*.py"))]:
        name = path.name if path.suffix == ".yaml" else f"flows/{path.name}"
        files[name] = path.read_text(encoding="utf-8")
    return files


def _version_of(files: Mapping[str, str]) -> Version:
    """mode-version.yaml of a project with these files."""
    stages = yaml.safe_load(_template("dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
    deps = [dep for stage in stages for dep in stage.get("do", stage).get("deps", [])]
    names = [name for dep in deps if (name := code_name(dep))]
    return Version.installed(names, {name: checksum_of(text) for name, text in files.items()})


def _sections_of(pipeline: Mapping[str, Any]) -> list[str]:
    """Sections of params.yaml that a dvc.yaml names: DVC does not run without one of them."""
    stages = pipeline["stages"].values()
    keys = [key for stage in stages for key in stage.get("do", stage).get("params", []) if isinstance(key, str)]
    return list(dict.fromkeys(key.partition(".")[0] for key in keys))


def _content(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None

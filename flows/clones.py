"""Clones of a project, in which runs of an experiment are made: git, and commands there."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Set as AbstractSet
from pathlib import Path

import yaml

from flows import tools_first
from mode.errors import ModeError
from mode.experiments.plan import PlannedRun
from mode.files import write_aside
from mode.paths import RunPaths
from mode.stages.project import Project
from mode.stages.sources import keep_whole_watch


def head_of(root: Path) -> str:
    """The last commit of a project, which runs are of.

    Raises:
        ModeError: the project is no git repository of its own, or has no commit.
    """
    top = Path(git(root, "rev-parse", "--show-toplevel"))
    if not top.samefile(root):
        raise ModeError(f"{root}: is a part of the git repository {top}", "runs are clones: give the project its own")
    try:
        return git(root, "rev-parse", "--verify", "HEAD")
    except ModeError:
        raise ModeError(f"{root}: no commit yet", "commit the project: runs are of a commit") from None


def code_of(root: Path, commit: str, stages: AbstractSet[str]) -> str:
    """A digest of the code that some of dvc.yaml's stages name: DVC makes what they make anew where it is another."""
    listed = yaml.safe_load(git(root, "show", f"{commit}:dvc.yaml"))["stages"]
    needs = [(listed[name].get("do") or listed[name])["deps"] for name in sorted(stages & listed.keys())]
    files = git(root, "ls-tree", commit, "--", *sorted({path for each in needs for path in each}))
    return hashlib.sha256(files.encode()).hexdigest()[:12]


def git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False, start_new_session=True
        )
    except FileNotFoundError:
        raise ModeError("git is not installed", "experiments are runs of commits, in clones") from None
    if done.returncode:
        raise ModeError(f"git {arguments[0]} failed in {root}: {' '.join(done.stderr.split())[:200]}")
    return done.stdout.strip()


def prepared_clone(root: Path, files: RunPaths, run: PlannedRun) -> Path:
    """A run's clone of the project: a new one, or that of the interrupted run."""
    commit, clone, of = head_of(root), files.clone, files.commit
    if clone.is_dir() and not (of.is_file() and of.read_text(encoding="utf-8") == commit):
        shutil.rmtree(clone)  # of another commit; what is the same comes out of the cache
    if clone.is_dir():
        # What is left of a run whose figures were not taken over: DVC makes no second experiment of one name.
        for ref in git(clone, "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{run.name}").split():
            git(clone, "update-ref", "-d", ref)
        return clone
    of.write_text(commit, encoding="utf-8")
    with write_aside(clone) as new:
        git(root, "clone", "--quiet", "--shared", "--no-tags", str(root), str(new))
        config = ["[cache]", f"    dir = {cache_of(root)}", "    type = reflink,copy"]
        (new / ".dvc" / "config.local").write_text("\n".join(config) + "\n", encoding="utf-8")
        keep_whole_watch(Project(new, run.params))
    return clone


def environment(clone: Path, home: Path) -> dict[str, str]:
    """Of commands in a clone: its own sources, or `home`'s where it is a project without code, and this environment's
    tools; no setting of a flow or of the machine.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MODE_", "OMP_"))}
    code = next((folder for folder in (clone, home) if (folder / "src").is_dir()), None)
    sources = [code / "src", code] if code else [clone]
    return kept | {"PATH": tools_first(kept), "PYTHONPATH": os.pathsep.join(map(str, sources))}


def command(clone: Path, home: Path, *arguments: str) -> str:
    """What `python -m ARGUMENTS` prints in a clone. Raises `ModeError` with its last line if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=clone,
        env=environment(clone, home),
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,  # Ctrl-C lets what a run has made be taken over
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ModeError(f"{' '.join(arguments[:3])}: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout.strip()


def cache_of(root: Path) -> Path:
    """A project's DVC cache."""
    return (root / command(root, root, "dvc", "cache", "dir")).resolve()

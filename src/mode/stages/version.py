"""Which code of mode a project is of: the file `mode-version.yaml`, which `mode init` writes.

A stage depends on the code that computes it. This repository's dvc.yaml names folders of code; a project that uses an
installed mode has none, and its dvc.yaml names a key of this file in place of each: the checksum of that folder. The
file is written by `mode init` alone, so an upgraded mode does not train everything anew unasked: a stage stops with one
line until `mode init --upgrade` has said so, after which DVC runs what the changed code computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import yaml

import mode
from mode.errors import ModeError
from mode.paths import Paths
from mode.stages.project import write_text

#: The folder of the code that runs.
PACKAGE = Path(mode.__file__).parent
#: How this repository's dvc.yaml begins the name of a file or folder of code.
CODE = "src/mode/"
_COMMENT = """\
# The mode that this project is of. `mode init` wrote it, and only `mode init --upgrade` changes it: after an upgrade of
# the package, which is when DVC runs the stages again whose code has changed.
# code: checksums of mode's folders and modules, which the stages of dvc.yaml depend on.
# files: of the files that an upgrade replaces, so that it notices what was edited here.
"""


@dataclass(frozen=True)
class Version:
    """What `mode-version.yaml` holds.

    Attributes:
        version: of the package.
        code: name of a folder or module of mode, such as `clip` or `data/images`, -> `checksum_of_code`.
        files: path in the project -> checksum of what `mode init` wrote there.
    """

    version: str
    code: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def installed(cls, names: Iterable[str], files: Mapping[str, str] | None = None) -> Self:
        """Of the mode that runs; `names` of its folders and modules, in any order."""
        return cls(version("mode-clip"), {name: checksum_of_code(name) for name in sorted(set(names))}, files or {})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises `ModeError` where that is missing or something else."""
        try:
            content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
            loaded = cls(**content)
            texts = [*loaded.code.items(), *loaded.files.items()]
            if not all(isinstance(text, str) for pair in [*texts, (loaded.version, "")] for text in pair):
                raise TypeError
        except FileNotFoundError:
            raise ModeError(f"{path}: no such file", "`mode init FOLDER` starts a project") from None
        except (ValueError, TypeError, AttributeError, yaml.YAMLError):
            raise ModeError(f"{path}: not as `mode init` writes it", "`git checkout` the file") from None
        return loaded

    def save(self, path: Path) -> None:
        """Write as YAML."""
        content = {"version": self.version, "code": dict(self.code), "files": dict(self.files)}
        write_text(path, _COMMENT + yaml.safe_dump(content, sort_keys=False))

    def changed(self) -> list[str]:
        """Names of code that is another in the mode that runs."""
        return [name for name, checksum in self.code.items() if checksum_of_code(name) != checksum]


def check_version(paths: Paths) -> None:
    """See that the mode that runs is the one that the project is of; a project without `mode-version.yaml` has its own.

    Raises:
        ModeError: its code is another.
    """
    if paths.version_file.is_file():
        recorded = Version.load(paths.version_file)
        if changed := recorded.changed():
            of, runs = recorded.version, version("mode-clip")
            what = f"mode {of}, {runs} is installed" if of != runs else f"another mode {of} than the one installed"
            raise ModeError(
                f"{paths.version_file.name}: this project is of {what} (other code: {', '.join(changed)})",
                "`mode init --upgrade .` takes it over; then `dvc status` says what will run again",
            )


def code_name(dependency: str) -> str | None:
    """The name of code that a dependency of this repository's dvc.yaml is; None for data.

    >>> code_name("src/mode/data/images.py"), code_name("src/mode/clip"), code_name("data/tasks")
    ('data/images', 'clip', None)
    """
    return dependency.removeprefix(CODE).removesuffix(".py") if dependency.startswith(CODE) else None


def checksum_of(text: str) -> str:
    """Of a file's text, see `_written`."""
    return _written(hashlib.sha256(text.encode()))


def checksum_of_code(name: str) -> str:
    """Of a folder or module of the mode that runs; empty if there is none (any more).

    Of a folder: names and contents of all files in and below it, but for what Python has compiled.
    """
    path = PACKAGE / name
    files = sorted(path.rglob("*")) if path.is_dir() else [path.with_name(f"{path.name}.py")]
    digest, found = hashlib.sha256(), False
    for file in files:
        if file.is_file() and "__pycache__" not in file.parts:
            found = True
            digest.update(f"{file.relative_to(PACKAGE).as_posix()}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return _written(digest) if found else ""


def _written(digest: hashlib._Hash) -> str:
    """The first 16 hexadecimal digits, as what no reader of YAML takes for a number, such as 1234567890123e45."""
    return f"sha256:{digest.hexdigest()[:16]}"

"""Everything that a project's stages have written, compared with its checksums and with what it was made from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mode.checksums import ADVICE, SEAL, check_manifest, content_of, identity_of, listed_digest
from mode.clip.configuration import read_card
from mode.clip.folder import CARD, CONFIG, weights_of
from mode.clip.trust import read_json
from mode.clustering.assignment import Assignment, same_embedder
from mode.clustering.hierarchy import Clusters
from mode.clustering.rows import Rows
from mode.errors import ModeError, in_one_line
from mode.files import sha256_of
from mode.paths import CHECKPOINT, Paths
from mode.results import Results
from mode.vectors import load_vectors, origin_of


@dataclass(frozen=True)
class Finding:
    """What is to be said of one output.

    Attributes:
        path: the file or folder, relative to the project.
        number, total: which output it is, of how many.
        fault: what is wrong with it, in one line; None if nothing is.
        has_checksum: False: an older version or another program wrote it, and only its form could be looked at.
    """

    path: Path
    number: int
    total: int
    fault: str | None
    has_checksum: bool


def check_project(paths: Paths, roots: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """Look at every index, vectors, embedder, clusters, assignment, model, ensemble, checkpoint and metrics file.

    All of each is read. Nothing is written, and whatever is missing is passed over.

    Args:
        paths: of the project.
        roots: source -> the one whose clusters its pairs are assigned to; default its own.

    Yields:
        One finding for each, as it is done.
    """
    outputs = list(_outputs(paths, roots or {}))
    for number, (path, check) in enumerate(outputs, start=1):
        fault: str | None = None
        has_checksum = True
        try:
            has_checksum = check()
        except ModeError as error:
            fault = str(error)
        except Exception as error:  # whatever a library makes of damaged bytes, the rest is looked at as well
            fault = f"{path}: cannot be read: {type(error).__name__}: {in_one_line(error)} ({ADVICE})"
        fault = fault and fault.replace(f"{paths.root}/", "")
        yield Finding(path.relative_to(paths.root), number, len(outputs), fault, has_checksum)


def check_parents(models: Path, names: Collection[str]) -> None:
    """Refuse models that did not branch from the seed that lies beside them: only one seed's experts are an ensemble.

    They have its configuration too: the same activation, the same preprocessing.

    Args:
        models: folder of model folders.
        names: of those to look at. One whose card does not say what it branched from is passed over, and so is one
            whose parent is not there.

    Raises:
        ModeError: names such a model.
    """
    for name in names:
        card = read_card(models / name)
        parent, weights = card.get("parent"), card.get("parent_weights")
        if not parent or not weights:
            continue
        folder = models / str(parent)
        its = weights_of(folder)
        if not its.is_file():
            continue
        if (listed_digest(folder, its.name) or sha256_of(its)) != weights:
            raise ModeError(f"{models / name}: branched from another {parent} than {folder}", "train it again")
        # Another activation or another preprocessing gives no error, only worse figures. An adapter has its base's.
        if (models / name / CONFIG).is_file() and read_json(models / name / CONFIG) != read_json(folder / CONFIG):
            raise ModeError(f"{models / name / CONFIG}: not the configuration of {folder}", "train it again")


def _outputs(paths: Paths, roots: Mapping[str, str]) -> Iterator[tuple[Path, Callable[[], bool]]]:
    """Each output that is there, and what looks at it: True where it was compared with a checksum."""
    for folder in _below(paths.index("_").parent):
        yield folder, partial(check_manifest, folder)
    if paths.embedder.is_dir():
        yield paths.embedder, partial(check_manifest, paths.embedder)
    for file in _below(paths.vectors("_").parent, ".npy"):
        yield file, partial(_check_vectors, paths, file)
    for folder in _below(paths.clusters("_").parent):
        yield folder, partial(_check_clusters, paths, folder)
    for file in _below(paths.assignment("_").parent, ".parquet"):
        yield file, partial(_check_assignment, paths, file, paths.clusters(roots.get(file.stem, file.stem)))
    for folder in _below(paths.models):
        if any(folder.iterdir()):  # a model that is not trained, by `baselines`
            yield folder, partial(_check_model, folder)
    for file in sorted(paths.checkpoints.glob(f"*/*/{CHECKPOINT}")):
        yield file, partial(_check_checkpoint, file)
    for folder in (folder for name in _below(paths.checkpoints) for folder in _below(paths.kept(name.name))):
        yield folder, partial(check_manifest, folder)
    for file in (paths.metrics, paths.variants):
        if file.is_file():
            yield file, partial(_check_metrics, file)


def _below(folder: Path, suffix: str = "") -> list[Path]:
    """What stages have written into a folder: files of a suffix, or folders."""
    if not folder.is_dir():
        return []
    wanted = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in wanted if (path.suffix == suffix if suffix else path.is_dir()))


def _check_checkpoint(file: Path) -> bool:
    from mode.training.checkpoint import check_checkpoint  # with it comes torch, which most projects need not wait for

    return check_checkpoint(file)


def _check_vectors(paths: Paths, file: Path) -> bool:
    sealed = SEAL.check(file)
    for _ in Rows(load_vectors(file)).blocks():
        pass  # numbers that no embedder writes are refused
    _compare(paths, file, file.stem, origin_of(file))
    return sealed


def _check_clusters(paths: Paths, folder: Path) -> bool:
    sealed = check_manifest(folder)
    _compare(paths, folder, folder.name, Clusters.load(folder).origin)
    return sealed


def _check_assignment(paths: Paths, file: Path, clusters: Path) -> bool:
    sealed = SEAL.check(file)
    pairs, vectors = Assignment.pairs(file), paths.vectors(file.stem)
    if vectors.is_file() and pairs != len(load_vectors(vectors)):
        raise ModeError(f"{file}: {pairs:,} pairs, but {vectors} has others", "run its stage again")
    opened = Clusters.load(clusters) if clusters.is_dir() else None
    for part in Assignment.blocks(file):
        if opened is not None and not _names_clusters_of(part, opened):
            raise ModeError(f"{file}: names other clusters than {clusters} has", "run its stage again")
    _compare(paths, file, file.stem, Assignment.origin(file))
    return sealed


def _names_clusters_of(part: Assignment, clusters: Clusters) -> bool:
    of_fine = part.fine.min() >= 0 and part.fine.max() < clusters.fine
    return bool(of_fine and (clusters.coarse_of_fine[part.fine] == part.coarse).all())


def _compare(paths: Paths, path: Path, source: str, origin: Mapping[str, str]) -> None:
    """Refuse what was made from another embedder or index than those that are there."""
    if paths.embedder.is_dir():
        same_embedder(path, origin, paths.embedder, {"embedder": content_of(paths.embedder)})
    index = paths.index(source)
    if len({origin.get("index"), identity_of(index)} - {None}) > 1:
        raise ModeError(f"{path}: made from another index than {index}", "embed, cluster and assign again")


def _check_model(folder: Path) -> bool:
    has_checksum = check_manifest(folder)
    if (folder / CARD).is_file():
        check_parents(folder.parent, [folder.name])
    return has_checksum


def _check_metrics(file: Path) -> bool:
    Results.load(file)
    return SEAL.check(file)

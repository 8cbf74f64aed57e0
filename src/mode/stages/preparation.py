"""From shards to assignments: the stages before any training."""

from __future__ import annotations

from dataclasses import replace

from mode.clip.configuration import check_architecture
from mode.errors import ModeError
from mode.stages.machine import open_engine
from mode.stages.project import BUILT_IN, Project, sample_captions, write_json, write_text
from mode.stages.sources import check_arrivals, check_names, keep_sources_watch, keep_tasks_watch, keep_watch


def names(project: Project) -> None:
    """Refuse names that are none before DVC removes what they lead to; the output is there to be waited for.

    Raises:
        ModeError: as `check_names`, `check_architecture` and `check_arrivals`; or DVC has read a watch.yaml that was
            not in step with the sources: its stages are those of another params.yaml. Now it is in step.
    """
    check_names(project)
    check_architecture(project.params.model)
    if changed := keep_sources_watch(project):
        which = ", ".join(f"'{source}'" for source in sorted(changed))
        raise ModeError(
            f"sources {which}: stages of theirs were not there when DVC read watch.yaml, and are entered now",
            "the same command once more goes on",
        )
    check_arrivals(project)
    write_text(project.names, "Every source and expert has a name.\n")


def data(project: Project, source: str) -> None:
    """Shards of a built-in source, and the manifest of any source; keeps watch.yaml in step with params.yaml."""
    from mode.data.shards.arrivals import Arrivals
    from mode.data.shards.manifest import build_manifest

    params = project.source(source)
    folder = project.shards(source)
    if params.shards == BUILT_IN:
        from mode.data.glyphs.dataset import write_glyph_shards

        glyphs, random_seed = project.params.glyphs, project.params.random_seed
        write_glyph_shards(glyphs, folder, random_seed, families=params.families)
        where = str(folder.relative_to(project.root))
        # DVC knows these files by their content; the time at which they were made must not make them look changed.
        manifest = build_manifest(params.model_copy(update={"shards": where, "checksum": True}), project.root)
    else:
        only = Arrivals.load(project.arrivals).of(source, project.params.sources)
        manifest = build_manifest(params, project.root, only)
    folder.mkdir(parents=True, exist_ok=True)
    manifest.save(project.manifest(source))
    keep_watch(project, source, generated=params.shards == BUILT_IN)
    count = f"{len(manifest.shards):,} shard{'s' if len(manifest.shards) != 1 else ''}"
    print(f"{source}: {count}, {sum(shard.size for shard in manifest.shards) / 1e6:,.1f} MB")


def tasks(project: Project) -> None:
    """The built-in evaluation tasks, or a list of the given folders and of the files in them."""
    from mode.files import write_aside

    with write_aside(project.tasks) as folder:
        folder.mkdir(parents=True)
        if project.params.evaluation.tasks == BUILT_IN:
            from mode.data.glyphs.dataset import write_glyph_tasks

            write_glyph_tasks(project.params.glyphs, folder, project.params.random_seed)
            listed = sorted(child.name for child in folder.iterdir())
            where = [str((project.tasks / name).relative_to(project.root)) for name in listed]
        else:
            from mode.evaluation.tasks import open_task

            where = list(project.params.evaluation.tasks)
            for task in where:
                open_task(project.root / task)  # an unusable folder must not be noticed after the training
            write_json(folder / "manifest.json", _files_of_tasks(project))
        write_json(folder / project.task_list.name, where)
    keep_tasks_watch(project)
    print(f"{len(where)} tasks")


def watch_tasks(project: Project) -> None:
    """The files of the given task folders, so that DVC notices a change in one."""
    write_json(project.tasks_manifest, _files_of_tasks(project))


def watch_seed(project: Project) -> None:
    """The files of a pretrained seed on this machine, so that DVC notices a change in one."""
    from mode.clip.pretrained import local_files

    found = [(path, path.stat()) for path in local_files(project.params.seed, project.root)]
    write_json(project.seed_manifest, {str(path): [stat.st_size, stat.st_mtime_ns] for path, stat in found})


def _files_of_tasks(project: Project) -> dict[str, dict[str, list[int]]]:
    """Task folder -> file -> [size, modification time in ns]; nothing of built-in tasks."""
    if project.params.evaluation.tasks == BUILT_IN:
        return {}
    return {
        task: {
            str(path.relative_to(project.root / task)): [path.stat().st_size, path.stat().st_mtime_ns]
            for path in sorted((project.root / task).rglob("*"))
            if path.is_file()
        }
        for task in project.params.evaluation.tasks
    }


def index(project: Project, source: str) -> None:
    """One pass over the shards of a source."""
    from mode.data.leakage import Leakage
    from mode.data.shards.index import build_index
    from mode.data.shards.manifest import Manifest

    manifest = Manifest.load(project.manifest(source))
    params = project.params.index
    leaked = Leakage.load(project.leakage).keys(source) if params.drop_leaked else frozenset()
    report = build_index(manifest, project.root, project.index(source), params, unwanted=leaked)
    bad = ", ".join(f"{count} {kind}" for kind, count in sorted(report.counts.items())) or "nothing bad"
    dropped = f"; {report.dropped} left out, which look like test images" if report.dropped else ""
    filtered = "".join(f"; {count:,} left out by filter: {name}" for name, count in report.filtered.items())
    print(f"{source}: {report.pairs:,} pairs of {report.images:,} images; {bad}{dropped}{filtered}")


def embedder(project: Project) -> None:
    """Fit the caption embedder, or fetch it, and keep it with the data."""
    from mode.embedding.base import build_embedder

    params = project.params.embedding
    captions: list[str] = []
    if params.fit_on is not None:
        captions = sample_captions(project.load_index(params.fit_on), params.sample, project.params.random_seed)
    build_embedder(params, captions, project.params.random_seed, project.params.machine).save(project.embedder)


def embed(project: Project, source: str) -> None:
    """Captions of a source, or its images, or both, to unit vectors, float16, in the index's row order."""
    from mode.checksums import identity_of
    from mode.embedding.base import StoredEmbedder, embed_index

    machine, gpus = project.params.machine, 0
    stored = StoredEmbedder.at(project.embedder, machine.device, machine.inference_batch)
    if stored.is_neural and machine.device in ("auto", "cuda"):
        import torch

        gpus = torch.cuda.device_count()
    origin = {"embedder": stored.content}
    if made_from := identity_of(project.index(source)):
        origin["index"] = made_from
    index, out = project.load_index(source), project.vectors(source)
    with open_engine(machine, gpus, alone=machine.device.startswith("cuda:")) as engine:
        if stored.view == "text":
            embed_index(stored.open(), index, out, engine=engine, encode=stored, origin=origin)
            return
        from mode.embedding.pairs import BLOCK, PairEncoder, count_unseen

        pairs = PairEncoder(stored, project.index(source), project.root, made_from, machine.decode_threads)
        vectors = embed_index(stored.open(), index, out, BLOCK, engine, pairs, origin, numbered=True)
    unseen = count_unseen(out, vectors, index)
    print(f"{source}: {index.images:,} images embedded" + (f"; {unseen:,} cannot be decoded" if unseen else ""))


def cluster(project: Project, source: str) -> None:
    """Fine and coarse clusters of a source, with the words that name them."""
    from mode.clustering.hierarchy import fit_clusters
    from mode.clustering.targets import near_phrases
    from mode.clustering.words import name_clusters
    from mode.vectors import load_vectors, origin_of

    if (root := project.source(source).continues) is not None:
        raise ModeError(
            f"source '{source}' continues '{root}' and has no clusters of its own", f"mode stage cluster {root}"
        )
    vectors = load_vectors(project.vectors(source))
    fine, coarse = project.params.clusters_of(source)
    params, near_targets = project.params.clustering, None
    if params.targets:
        from mode.embedding.base import load_embedder

        near_targets = near_phrases(load_embedder(project.embedder), params.targets, params.targets_nearest)
    clusters = fit_clusters(vectors, params, fine, coarse, project.params.random_seed, near_targets)
    clusters = name_clusters(clusters, project.load_index(source), vectors)
    replace(clusters, origin=origin_of(project.vectors(source))).save(project.clusters(source))
    for number, (size, words) in enumerate(zip(clusters.coarse_sizes, clusters.coarse_words, strict=True)):
        print(f"{source} cluster {number}: {size:,} pairs: {', '.join(words)}")


def assign(project: Project, source: str) -> None:
    """Every pair of a source to its nearest fine centre, hence to one coarse cluster.

    The centres are its own, or those of the source that it continues.
    """
    import faiss

    from mode.clustering.assignment import assign_file

    clusters = project.clusters(project.params.root_of(source))
    with open_engine(project.params.machine, faiss.get_num_gpus()) as engine:
        assign_file(project.vectors(source), clusters, project.assignment(source), engine)

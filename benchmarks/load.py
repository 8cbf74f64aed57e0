"""Loaders: photographs of 500 x 375 to batches of 224 x 224, of one expert's share and of everything."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks.harness import Input, Outcomes, Race, Run, Side, Target, faster, figure
from benchmarks.inputs import index_shards, make_shards, tar_members, tars_of

#: Pairs, pairs in a tar, batch size.
SIZES = {"quick": (40, 20, 8), "full": (6_000, 500, 64), "large": (10_000, 1_000, 256)}
#: The expert's share of the pairs.
SHARE = 4
WORKERS = 2


def _make(given: Input) -> None:
    pairs, per_tar, _ = SIZES[given.size]
    make_shards(given, pairs, per_tar, distinct=8 if given.size == "quick" else 256)
    index_shards(given.folder)
    np.save(given.folder / "cluster.npy", np.random.default_rng(0).integers(0, SHARE, pairs).astype(np.int32))


def _ours(given: Input, everything: bool, cached: bool = False) -> Run:
    """The loader of a training, one pass: batches of uint8 pixels and rows. A cache would keep them from then on."""
    from mode.processes import use_huge_pages

    use_huge_pages()  # as every command of `mode` does
    from mode.data.loading.loader import ImageStore, PairStream, make_loader, normalise
    from mode.data.shards.index import PairIndex
    from mode.params import ImageParams

    batch = SIZES[given.size][2]
    index = PairIndex.load(given.folder / "index")
    rows = _rows(given, everything)
    image = ImageParams(size=224)
    store = ImageStore(index, given.folder, image, cache_mb=4_096 if cached else 0, rows=rows)
    stream = PairStream(rows, index.image[rows], random_seed=0)
    passes = iter(range(1_000_000))

    def run() -> dict[str, Any]:
        start = next(passes) * len(rows)
        count, total = 0, 0.0
        loader = make_loader(store, stream, start=start, stop=start + len(rows), batch_size=batch, workers=WORKERS)
        for each in loader:
            texts = index.captions(each.rows)
            pixels = normalise(each.images, image)
            count += len(texts)
            total += float(pixels.sum())
        encoded = float(index.length[rows].sum()) / float(index.length.sum())
        return {"images": count, "mean_pixel": total / count / (3 * 224 * 224), "share_of_bytes": encoded}

    return run


def _transform() -> Any:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(size=224), is_train=False)


def _rows(given: Input, everything: bool) -> np.ndarray:
    cluster = np.load(given.folder / "cluster.npy")
    return np.arange(len(cluster)) if everything else np.flatnonzero(cluster == 0)


def _keys(given: Input, everything: bool) -> set[str]:
    from pyarrow import parquet

    keys = parquet.read_table(given.folder / "index" / "index.parquet", columns=["key"])["key"]
    return set(keys.take(_rows(given, everything)).to_pylist())


def _webdataset(given: Input, everything: bool) -> Run:
    """As its documentation and open_clip have it, filtered before anything is decoded; all in the workers."""
    import webdataset

    batch = SIZES[given.size][2]
    tars, keys = tars_of(given.folder / "shards"), _keys(given, everything)
    dataset = webdataset.DataPipeline(
        webdataset.SimpleShardList(tars),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.select(partial(_is_mine, keys=keys)),
        webdataset.shuffle(1_000),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg", text="txt"),
        webdataset.map_dict(image=_transform()),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(batch),
    )

    def run() -> dict[str, Any]:
        loader = webdataset.WebLoader(
            dataset, batch_size=None, shuffle=False, num_workers=WORKERS, multiprocessing_context="fork"
        )
        return _summary(loader)

    return run


def _is_mine(sample: dict[str, Any], keys: set[str]) -> bool:
    return sample["__key__"] in keys


def _tarfile(given: Input) -> Run:
    """Every tar from end to end with the standard library, in the workers of a DataLoader."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    tars, keys = tars_of(given.folder / "shards"), _keys(given, everything=False)
    batch, transform = SIZES[given.size][2], _transform()

    class Tars(IterableDataset[Any]):
        """Whole batches of the wanted pairs."""

        def __iter__(self) -> Iterator[Any]:
            worker = get_worker_info()
            assert worker is not None
            images, texts = [], []
            for path in tars[worker.id :: worker.num_workers]:
                for name, content in tar_members(path):
                    if name[:-4] not in keys:
                        continue
                    if name.endswith(".jpg"):
                        images.append(transform(Image.open(io.BytesIO(content)).convert("RGB")))
                    elif name.endswith(".txt"):
                        texts.append(content.decode())
                    if len(texts) == batch:
                        yield torch.stack(images), texts
                        images, texts = [], []
            if texts:
                yield torch.stack(images), texts

    def run() -> dict[str, Any]:
        return _summary(DataLoader(Tars(), batch_size=None, num_workers=WORKERS, multiprocessing_context="fork"))

    return run


def _summary(loader: Any) -> dict[str, Any]:
    count, total = 0, 0.0
    for images, _ in loader:
        count += len(images)
        total += float(images.sum())
    return {"images": count, "mean_pixel": total / count / (3 * 224 * 224)}


def _same_pixels(peer: str) -> Target:
    def gap(sides: Outcomes) -> float:
        return abs(figure("mode", "mean_pixel")(sides) - figure(peer, "mean_pixel")(sides))

    return Target("the same images: mean pixel within 1e-4", gap, 1e-4, at_most=True)


WEBDATASET, TARFILE = "webdataset, filtered before decoding", "tarfile, filtered before decoding"
RACES = (
    Race(
        name="load-expert",
        step="one expert's loader: a quarter of 6,000 photographs, decode and resize to 224, 2 workers",
        sides=(
            Side("mode", partial(_ours, everything=False)),
            Side(WEBDATASET, partial(_webdataset, everything=False)),
            Side(TARFILE, _tarfile),
            Side("mode, decoded images kept (from the second pass)", partial(_ours, everything=False, cached=True)),
        ),
        targets=(
            Target("at least 3x both", faster("mode", WEBDATASET, TARFILE), 3.0),
            Target("bytes read at most 1.05x the share of 1/4", figure("mode", "share_of_bytes"), 0.25 * 1.05, True),
            _same_pixels(WEBDATASET),
        ),
        make=_make,
        inputs="pictures-load",
    ),
    Race(
        name="load-all",
        step="the loader on everything: 6,000 photographs, decode and resize to 224, 2 workers",
        sides=(
            Side("mode", partial(_ours, everything=True)),
            Side("webdataset", partial(_webdataset, everything=True)),
        ),
        targets=(Target("at least 1.2x webdataset", faster("mode", "webdataset"), 1.2), _same_pixels("webdataset")),
        make=_make,
        inputs="pictures-load",
    ),
)

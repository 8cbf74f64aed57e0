"""Loaders: photographs of 500 x 375 to batches of 224 x 224, of one expert's share and of everything."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np

from benchmarks.harness import Input, Race, Run, Target, faster, figure
from benchmarks.inputs import index_shards, make_shards, tar_members, tars_of

#: Pairs, pairs in a tar, batch size.
SIZES = {"quick": (40, 20, 8), "full": (6_000, 500, 64), "large": (10_000, 1_000, 256)}
#: The expert's share of the pairs.
SHARE = 4
WORKERS = 2
#: The peers' loaders: their data sets make whole batches, in processes that have inherited them.
WHOLE_BATCHES: dict[str, Any] = {"batch_size": None, "num_workers": WORKERS, "multiprocessing_context": "fork"}


def _make(given: Input) -> None:
    pairs, per_tar, _ = SIZES[given.size]
    make_shards(given, pairs, per_tar)
    index_shards(given.folder)
    np.save(given.folder / "cluster.npy", np.random.default_rng(0).integers(0, SHARE, pairs).astype(np.int32))


def _ours(given: Input, everything: bool = True, cached: bool = False) -> Run:
    """The loader of a training, one pass: batches of uint8 pixels and rows. A cache would keep them from then on."""
    from mode.data.images import normalise
    from mode.data.loading.loader import ImageStore, PairStream, Shares, make_loader
    from mode.data.loading.selection import Pairs
    from mode.data.shards.index import PairIndex
    from mode.params import ImageParams
    from mode.processes import use_huge_pages

    use_huge_pages()  # as every command of `mode` does
    batch, rows, image = SIZES[given.size][2], _rows(given, everything), ImageParams(size=224)
    index = PairIndex.load(given.folder / "index")
    store = ImageStore(index, given.folder, image, cache_mb=4_096 if cached else 0, rows=rows)
    stream = PairStream(Pairs.of(rows, index.image), index.image, random_seed=0)
    starts = count(0, len(rows))

    def run() -> dict[str, Any]:
        start = next(starts)
        loader = make_loader(store, stream, Shares(start, start + len(rows), batch), workers=WORKERS)
        batches = ((normalise(each.images, image.mean, image.std), index.captions(each.rows)) for each in loader)
        return _summary(batches) | {"share_of_bytes": float(index.length[rows].sum()) / float(index.length[:].sum())}

    return run


def _transform() -> Any:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(size=224), is_train=False)


def _rows(given: Input, everything: bool) -> np.ndarray:
    cluster = np.load(given.folder / "cluster.npy")
    return np.arange(len(cluster)) if everything else np.flatnonzero(cluster == 0)


def _keys(given: Input, everything: bool) -> set[str]:
    from mode.data.shards.index import PairIndex

    return set(PairIndex.load(given.folder / "index").keys(_rows(given, everything)))


def _webdataset(given: Input, everything: bool = True) -> Run:
    """As its documentation and open_clip have it, filtered before anything is decoded; all in the workers."""
    import webdataset

    tars, keys = tars_of(given.folder / "shards"), _keys(given, everything)
    dataset = webdataset.DataPipeline(
        webdataset.SimpleShardList(tars),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.select(lambda sample: sample["__key__"] in keys),
        webdataset.shuffle(1_000),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg", text="txt"),
        webdataset.map_dict(image=_transform()),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(SIZES[given.size][2]),
    )
    return lambda: _summary(webdataset.WebLoader(dataset, shuffle=False, **WHOLE_BATCHES))


def _tarfile(given: Input) -> Run:
    """Every tar from end to end with the standard library, in the workers of a DataLoader."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    tars, keys, transform = tars_of(given.folder / "shards"), _keys(given, everything=False), _transform()

    class Tars(IterableDataset[Any]):
        """Whole batches of the wanted pairs."""

        def __iter__(self) -> Iterator[Any]:
            pairs = self.pairs()
            while batch := list(islice(pairs, SIZES[given.size][2])):
                images, texts = zip(*batch, strict=True)
                yield torch.stack(images), texts

        def pairs(self) -> Iterator[Any]:
            worker = get_worker_info()
            assert worker is not None
            for path in tars[worker.id :: worker.num_workers]:
                for name, content in tar_members(path):  # of a pair the image comes first
                    if name[:-4] in keys and name.endswith(".jpg"):
                        image = transform(Image.open(io.BytesIO(content)).convert("RGB"))
                    elif name[:-4] in keys and name.endswith(".txt"):
                        yield image, content.decode()

    return lambda: _summary(DataLoader(Tars(), **WHOLE_BATCHES))


def _summary(batches: Iterable[Any]) -> dict[str, Any]:
    images, total = 0, 0.0
    for pixels, _ in batches:
        images += len(pixels)
        total += float(pixels.sum())
    return {"images": images, "mean_pixel": total / images / (3 * 224 * 224)}


def _same_pixels(peer: str) -> Target:
    ours, theirs = figure("mode", "mean_pixel"), figure(peer, "mean_pixel")
    text = "the same images: mean pixel within 1e-4"
    return Target(text, lambda sides: abs(ours(sides) - theirs(sides)), 1e-4, at_most=True)


WEBDATASET, TARFILE = "webdataset, filtered before decoding", "tarfile, filtered before decoding"
RACES = (
    Race(
        name="load-expert",
        step="one expert's loader: a quarter of 6,000 photographs, decode and resize to 224, 2 workers",
        sides={
            "mode": partial(_ours, everything=False),
            WEBDATASET: partial(_webdataset, everything=False),
            TARFILE: _tarfile,
            "mode, decoded images kept (from the second pass)": partial(_ours, everything=False, cached=True),
        },
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
        sides={"mode": _ours, "webdataset": _webdataset},
        targets=(Target("at least 1.2x webdataset", faster("mode", "webdataset"), 1.2), _same_pixels("webdataset")),
        make=_make,
        inputs="pictures-load",
    ),
)

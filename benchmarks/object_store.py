"""Reading from object storage: a server of byte ranges with the latency and the pace of a store, on this machine.

python -m benchmarks.object_store [--images N] [--shuffle N] [--latency SECONDS] [--rate BYTES] [--first]

Each side reads one pass in a process of its own, with the same workers, decoding and batches, from the same tars:
`training.read: sequential`, `random`, and webdataset with a buffer of the same size. This one begins with 100 samples
in it, as is its default, or when it is full, so that its first batch is mixed as well as ours. An expert's quarter,
drawn at random over all shards as the pairs of a cluster lie, is read from the source's shards and from its pack. Of a
training on several machines, the first reads its share of each batch, of 128 for every machine. Bytes and requests are
what the server has counted: of a pass, and up to its first batch.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mode.files import add_to_tar

#: Makes itself ready for a pass and returns that, which gives the number of samples of each batch.
Side = Callable[["Given"], Callable[[], Iterator[int]]]

PER_TAR, PIXELS, BATCH, WORKERS, SHARE = 1_000, 224, 128, 2, 4
#: Bytes that the server sends at a time: small enough that requests share the pace.
_PIECE = 64 * 2**10


@dataclass(frozen=True)
class Given:
    """What is measured: images and how many of them are mixed, where the tars lie, and the server's address.

    With `only_first` a pass is over with its first batch.
    """

    images: int
    shuffle: int
    folder: Path
    url: str
    only_first: bool = False

    @property
    def tars(self) -> list[str]:
        """Addresses of all tars."""
        return [f"{self.url}/shards/{path.name}" for path in sorted((self.folder / "shards").glob("*.tar"))]


def make_tars(folder: Path, images: int) -> None:
    """Tars of JPEGs of about 20 kB, each with a caption: noise of 128 pixels, which takes little time to decode."""
    random = np.random.default_rng(0)
    for start in range(0, images, PER_TAR):
        with tarfile.open(folder / f"{start // PER_TAR:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(start, min(start + PER_TAR, images)):
                file = io.BytesIO()
                coarse = random.integers(0, 255, (48, 48, 3), np.uint8)
                picture = Image.fromarray(coarse).resize((176, 176), Image.Resampling.BICUBIC)
                noisy = np.asarray(picture).astype(int) + random.normal(0, 18, (176, 176, 3)).astype(int)
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
                add_to_tar(tar, f"{number:08d}.jpg", file.getvalue())
                add_to_tar(tar, f"{number:08d}.txt", f"picture number {number}".encode())


def serve(folder: Path, latency: float, rate: float, ready: Connection) -> None:
    """Serve a folder until the process is ended: every request waits, all together get `rate` bytes a second.

    `GET /counted` answers what was sent since it was last asked, `/sofar` the same without counting anew; `/pace/0` and
    `/pace/1` turn the waiting off and on.
    """
    from aiohttp import web

    counted = {"bytes": 0, "requests": 0}
    state = {"paced": True, "free_at": 0.0}

    async def pace(size: int) -> None:
        """Wait for one's turn on a line of so many bytes a second."""
        now = time.monotonic()
        state["free_at"] = max(state["free_at"], now) + size / rate
        await asyncio.sleep(state["free_at"] - now)

    async def answer(request: web.Request) -> web.StreamResponse:
        path = folder / request.match_info["name"]
        if not path.is_file():
            return web.Response(status=404)
        size = path.stat().st_size
        asked = request.http_range
        start, stop = asked.start or 0, size if asked.stop is None else min(asked.stop, size)
        headers = {"Content-Length": str(stop - start), "Accept-Ranges": "bytes", "ETag": f'"{size}"'}
        if asked.start is not None:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        if state["paced"]:
            await asyncio.sleep(latency)
        response = web.StreamResponse(status=200 if asked.start is None else 206, headers=headers)
        await response.prepare(request)
        if request.method == "GET":
            counted["requests"] += 1
            with path.open("rb") as file, suppress(ConnectionError):  # of a side that is over
                file.seek(start)
                for place in range(start, stop, _PIECE):
                    piece = file.read(min(_PIECE, stop - place))
                    if state["paced"]:
                        await pace(len(piece))
                    await response.write(piece)
                    counted["bytes"] += len(piece)
        return response

    async def control(request: web.Request) -> web.Response:
        if "paced" in request.match_info:
            state["paced"] = request.match_info["paced"] == "1"
        before = dict(counted)
        if request.path != "/sofar":
            counted.update(bytes=0, requests=0)
        return web.json_response(before)

    async def run() -> None:
        app = web.Application()
        app.router.add_get("/counted", control)
        app.router.add_get("/sofar", control)
        app.router.add_get("/pace/{paced}", control)
        app.router.add_get("/{name:.*}", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ready.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


@contextmanager
def server(folder: Path, latency: float, rate: float) -> Iterator[str]:
    """The address of `serve`, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(folder, latency, rate, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def ask(url: str) -> dict[str, int]:
    """What the server answers to a control's address."""
    with urllib.request.urlopen(url) as answer:
        counted: dict[str, int] = json.load(answer)
    return counted


def rows_of(images: int, everything: bool) -> NDArray[np.int64]:
    """All pairs, or a random quarter of them."""
    if everything:
        return np.arange(images)
    return np.flatnonzero(np.random.default_rng(1).integers(0, SHARE, images) == 0)


def ours(
    given: Given, read: str, everything: bool, packed: bool = False, machines: int = 1
) -> Callable[[], Iterator[int]]:
    """One pass of a training's loader, of the first of so many machines."""
    from mode.data.loading.loader import ImageStore, PairStream, Shares, make_loader
    from mode.data.loading.pack import Pack
    from mode.data.loading.selection import Pairs
    from mode.data.loading.spool import REQUESTS, Spool
    from mode.data.shards.index import PairIndex
    from mode.data.shards.reading import ImageFiles, ImageReader
    from mode.params import ImageParams

    index, rows = PairIndex.load(given.folder / "index"), rows_of(given.images, everything)
    sequential = read == "sequential"
    stream = PairStream(
        Pairs.of(rows, index.image), index.image, 0, shuffle_images=given.shuffle if sequential else None
    )
    files = ImageFiles(Pack(given.folder / "table", index) if packed else index, given.folder)
    reader: ImageReader = files
    chunks = stream.chunks_at if sequential else None
    shares = Shares(0, len(rows), BATCH * machines, 0, tuple(range(machines)), chunks)
    spool = None
    if sequential:
        folder = given.folder / "spool"
        reader = spool = Spool(folder, files, stream, shares, REQUESTS // WORKERS)
    store = ImageStore(index, given.folder, ImageParams(size=PIXELS), cache_mb=0, rows=rows, reader=reader)

    def run() -> Iterator[int]:
        loader = make_loader(store, stream, shares, workers=WORKERS, spool=spool)
        return (len(batch.images) for batch in loader)

    return run


def webdataset(given: Given, begins_full: bool = False) -> Callable[[], Iterator[int]]:
    """One pass of webdataset's loader, as its documentation has it; or one that begins when its buffer is full."""
    import torch
    import webdataset as wds

    from mode.data.loading.pixels import training_pixels
    from mode.params import ImageParams

    params, buffer = ImageParams(size=PIXELS), given.shuffle // WORKERS  # of each worker
    dataset = (
        wds.WebDataset(given.tars, shardshuffle=len(given.tars), nodesplitter=wds.split_by_node)
        .shuffle(buffer, initial=buffer if begins_full else 100)
        .to_tuple("jpg", "txt")
        .map_tuple(lambda content: torch.from_numpy(training_pixels(content, params, None, 0)), bytes.decode)
        .batched(BATCH)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS, multiprocessing_context="fork")
    return lambda: (len(images) for images, _ in loader)


def _measured(side: Side, given: Given, result: Connection) -> None:
    import resource

    import torch

    torch.set_num_threads(1)
    run = side(given)
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    batches = run()
    samples, first = next(batches), time.perf_counter() - started
    until_first = ask(f"{given.url}/sofar")
    samples += 0 if given.only_first else sum(batches)
    seconds = time.perf_counter() - started
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(each.ru_utime + each.ru_stime for each in used) - before.ru_utime - before.ru_stime
    sent = {f"first {name}": count for name, count in until_first.items()}
    result.send({"samples": samples, "seconds": seconds, "cpu": cpu, "first": first, **sent})


def measure(side: Side, given: Given) -> dict[str, float]:
    """Samples, seconds, those up to the first batch, and what the server has sent for them; in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    shutil.rmtree(given.folder / "spool", ignore_errors=True)
    ask(f"{given.url}/pace/1")
    process = context.Process(target=_measured, args=(side, given, there))
    process.start()
    there.close()
    found: dict[str, float] = here.recv()
    process.join()
    return {**found, **ask(f"{given.url}/counted")}


def prepare(given: Given) -> None:
    """Index the tars where the server has them, and pack the quarter beside them."""
    from mode.data.loading.pack import fetch_table, read_record, write_pack
    from mode.data.loading.selection import Pairs
    from mode.data.shards.index import PairIndex, build_index
    from mode.data.shards.manifest import build_manifest
    from mode.params import IndexParams, SourceParams

    (given.folder / "tars.txt").write_text("\n".join(given.tars))
    manifest = build_manifest(SourceParams(shards="tars.txt"), given.folder)
    build_index(manifest, given.folder, given.folder / "index", IndexParams(check_images=False), workers=1)
    index = PairIndex.load(given.folder / "index")
    pairs = Pairs.of(rows_of(given.images, everything=False), index.image)
    write_pack("a quarter", index, pairs, given.folder, "pack", PER_TAR)
    where = f"{given.url}/pack"
    record = read_record(where, given.folder, index, pairs)
    fetch_table(where, given.folder, index, pairs, record, given.folder / "table")


SIDES: dict[str, Side] = {
    "everything, `sequential`": partial(ours, read="sequential", everything=True),
    "everything, webdataset": webdataset,
    "everything, webdataset from a full buffer": partial(webdataset, begins_full=True),
    "everything, `random`": partial(ours, read="random", everything=True),
    "a quarter, `sequential`": partial(ours, read="sequential", everything=False),
    "a quarter, `sequential`, from its pack": partial(ours, read="sequential", everything=False, packed=True),
    "a quarter, `random`": partial(ours, read="random", everything=False),
    **{
        f"{what}, one of {machines} machines": partial(ours, read="sequential", machines=machines, **which)  # type: ignore[arg-type]
        for what, which in {
            "everything, `sequential`": {"everything": True},
            "a quarter, `sequential`, from its pack": {"everything": False, "packed": True},
        }.items()
        for machines in (2, 4)
    },
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser("python -m benchmarks.object_store", description=__doc__)
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--shuffle", type=int, default=2_048, help="images that are mixed with one another")
    parser.add_argument("--latency", type=float, default=0.03, help="seconds before each answer")
    parser.add_argument("--rate", type=float, default=100e6, help="bytes a second of all answers together")
    parser.add_argument("--repeats", type=int, default=3, help="passes of each side; the fastest counts")
    parser.add_argument("--first", action="store_true", help="first batches alone")
    parser.add_argument("--only", default="", help="sides whose name has this in it")
    parser.add_argument("--work", type=Path, help="folder to write to (default: a temporary one)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.work) as temporary:
        folder = Path(temporary)
        (folder / "shards").mkdir()
        make_tars(folder / "shards", asked.images)
        size = sum(path.stat().st_size for path in (folder / "shards").iterdir())
        print(f"{asked.images:,} images, {size / 1e6:,.0f} MB in tars", file=sys.stderr)
        with server(folder, asked.latency, asked.rate) as url:
            given = Given(asked.images, asked.shuffle, folder, url, asked.first)
            ask(f"{url}/pace/0")
            prepare(given)
            sides = {name: side for name, side in SIDES.items() if asked.only in name}
            print_table(sides, given, asked.repeats)


def print_table(sides: dict[str, Side], given: Given, repeats: int) -> None:
    """Measure in turns, and print the fastest pass of each side, and the fastest first batch."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            found[name].append(measure(side, given))
    columns = [] if given.only_first else ["samples/s", "samples per processor second", "MB read", "requests"]
    columns += ["first batch, s", "MB", "requests"]
    print(f"| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, passes in found.items():
        best = min(passes, key=lambda each: each["seconds"])
        rate = best["samples"] / best["seconds"]
        cpu = best["samples"] / min(each["cpu"] for each in passes)
        figures = [f"{rate:,.0f}", f"{cpu:,.0f}", f"{best['bytes'] / 1e6:,.1f}", f"{best['requests']:,}"]
        first = min(passes, key=lambda each: each["first"])
        of_first = [f"{first['first']:.2f}", f"{first['first bytes'] / 1e6:,.1f}", f"{first['first requests']:,}"]
        print(f"| {name} | {' | '.join([*([] if given.only_first else figures), *of_first])} |", flush=True)


if __name__ == "__main__":
    main()

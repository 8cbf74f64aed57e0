"""Shards behind a real web server with ranges, and in fsspec's memory: the same as on the disk."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from aiohttp import web
from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile
from hypothesis import given, settings
from hypothesis import strategies as st

from mode.data.loading.loader import ImageStore, PairStream, Shares, make_loader
from mode.data.loading.selection import Pairs
from mode.data.shards import places, scan
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import Manifest, build_manifest
from mode.data.shards.places import RemoteFile, describe, listed_urls
from mode.data.shards.reading import ImageFiles
from mode.errors import ModeError
from mode.files import sha256_of
from mode.params import ImageParams, IndexParams, SourceParams


class Server:
    """Serves a folder; `faults[name]` are told one after the other in place of the file: 500, 404, `cut`, `whole`.

    Asked for bytes, `long` and `long error` send 64 MiB; `taken` counts such answers that were taken to their end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults, self.taken = folder, {}, 0
        self.asked: list[tuple[str, str]] = []
        self.silent: set[str] = set()  # headers that it does not send
        self.sent: dict[str, str] = {}  # that it sends in the place of its own
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        self.asked.append((request.method, request.headers.get("Range", "")))
        faults = self.faults.get(name, [])
        fault = faults.pop(0) if len(faults) > 1 else faults[0] if faults else None
        path = self.folder / name
        if isinstance(fault, int):
            return web.Response(status=fault)
        if fault == "cut":
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(request)
            await response.write(b"half")
            assert request.transport is not None
            request.transport.close()
            return response
        if fault in ("long", "long error") and request.method == "GET":
            response = web.StreamResponse(status=206 if fault == "long" else 500)
            await response.prepare(request)
            with suppress(ConnectionError):
                for _ in range(64):
                    await response.write(bytes(2**20))
                self.taken += 1
            return response
        if fault == "whole":
            return web.Response(body=path.read_bytes())
        if not path.is_file():
            return web.Response(status=404)
        return web.FileResponse(path)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        app = web.Application()
        app.router.add_get("/{name:.*}", self._answer)

        async def strip(_: web.Request, response: web.StreamResponse) -> None:
            for name in self.silent:
                response.headers.pop(name, None)
            response.headers.update(self.sent)

        app.on_response_prepare.append(strip)
        self._runner = web.AppRunner(app)
        self._loop.run_until_complete(self._runner.setup())
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.port = self._runner.addresses[0][1]
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


@pytest.fixture
def local(index_of: Any, pair: Any, texts: Any, encode: Any) -> PairIndex:
    """Two tars with everything that a scan has to look at: also a large image, a bad one, and one cut off."""
    first = [*pair("a", 1), ("large.png", encode(2, (90, 80), "PNG")), ("large.txt", b"large"), *texts("b", ["x", "y"])]
    second = [("bad.jpg", b"no image"), ("bad.txt", b"bad"), ("alone.txt", b"alone"), *pair("c", 4), *pair("d", 5)]
    return index_of({"00.tar": first, "01.tar": second})


@pytest.fixture
def server(local: PairIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(places, "PAUSES", (0.01, 0.01))
    server = Server(tmp_path / "shards")
    yield server
    server.stop()


@pytest.fixture
def memory(local: PairIndex, tmp_path: Path) -> Iterator[str]:
    """The same tars in memory."""
    filesystem = fsspec.filesystem("memory")
    for tar in (tmp_path / "shards").iterdir():
        filesystem.pipe_file(f"/bucket/deep/{tar.name}", tar.read_bytes())
    yield "memory://bucket/"
    filesystem.rm("/bucket", recursive=True)


def indexed(shards: str, root: Path, out: str = "remote", **given: Any) -> PairIndex:
    manifest = build_manifest(SourceParams(shards=shards), root)
    params = {"check_images": False, "max_bad_share": 1.0, **given}
    build_index(manifest, root, root / out, IndexParams.model_validate(params), workers=1)
    return PairIndex.load(root / out)


@pytest.mark.parametrize("kind", ["http", "memory"])
@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("ahead", [512, 2048, 2**19])
def test_index_is_that_of_local_files(
    server: Server, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, check: bool, ahead: int
) -> None:
    monkeypatch.setattr(scan, "AHEAD", ahead)
    here = indexed("shards", tmp_path, "local", check_images=check)
    there = indexed(server.url("{00..01}.tar") if kind == "http" else memory, tmp_path, check_images=check)
    assert [Path(path).name for path in there.files] == [Path(path).name for path in here.files]
    columns = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "pairs").iterdir()} for name in ("local", "remote")
    ]
    assert columns[0] == columns[1]
    lines = [
        [line.split(",")[1:3] for line in (tmp_path / name / "quarantine.csv").read_text().splitlines()]
        for name in ("local", "remote")
    ]
    assert lines[0] == lines[1]
    assert len(lines[0]) == (3 if check else 2)


def test_scan_passes_over_what_is_larger_than_it_reads_ahead(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "AHEAD", 1024)
    indexed(server.url("00.tar"), tmp_path)
    asked = sum(int(end) - int(start) + 1 for start, end in ranges(server))
    assert asked < (tmp_path / "shards" / "00.tar").stat().st_size - 15_000
    monkeypatch.setattr(scan, "AHEAD", 2**20)
    server.asked.clear()
    indexed(server.url("00.tar"), tmp_path)
    assert len(ranges(server)) == 1


def ranges(server: Server) -> list[list[str]]:
    return [asked.removeprefix("bytes=").split("-") for _, asked in server.asked if asked]


@pytest.mark.parametrize("cache_mb", [0, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_local_files(
    server: Server, local: PairIndex, tmp_path: Path, cache_mb: int, workers: int
) -> None:
    there = indexed(server.url("{00..01}.tar"), tmp_path)

    def batches(index: PairIndex) -> list[Any]:
        rows = np.arange(len(index))
        store = ImageStore(index, tmp_path, ImageParams(size=16), cache_mb, rows)
        stream = PairStream(Pairs.of(rows, index.image), index.image, random_seed=3)
        return list(make_loader(store, stream, Shares(0, 23, 4), workers=workers))

    for ours, theirs in zip(batches(local), batches(there), strict=True):
        assert np.array_equal(ours.rows, theirs.rows)
        assert np.array_equal(ours.images, theirs.images)
        assert np.array_equal(ours.bad, theirs.bad)


def test_files_and_objects_of_one_source(server: Server, local: PairIndex, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"shards/00.tar\n{server.url('01.tar')}\n")
    both = indexed("list.txt", tmp_path)
    assert (local.has_urls, both.has_urls) == (False, True)

    def images(index: PairIndex) -> dict[str, bytes | OSError]:
        rows = list(range(len(index)))
        return dict(zip(index.captions(rows), ImageFiles(index, tmp_path).read_many(rows), strict=True))

    assert images(both) == images(local)


@pytest.mark.parametrize("fault", [500, 503, "cut", "whole"])
def test_what_passes_is_asked_for_again(server: Server, local: PairIndex, tmp_path: Path, fault: Any) -> None:
    there = indexed(server.url("{00..01}.tar"), tmp_path)
    server.faults["00.tar"] = [fault, fault, None]
    assert ImageFiles(there, tmp_path).read(1) == ImageFiles(local, tmp_path).read(1)


@pytest.mark.parametrize("fault", [500, "cut", "whole"])
def test_a_server_that_stays_broken_is_one_line(server: Server, tmp_path: Path, fault: Any) -> None:
    there = indexed(server.url("{00..01}.tar"), tmp_path)
    server.faults["00.tar"] = [fault]
    store = ImageFiles(there, tmp_path)
    with pytest.raises(ModeError, match=r"00\.tar: .*asked 3 times") as broken:
        list(store.read_many([1, 2, 3]))
    assert "\n" not in str(broken.value)
    if fault != "whole":  # then a scan, which reads all of such a small tar, has what it asked for
        with pytest.raises(ModeError, match=r"00\.tar: "):
            indexed(server.url("{00..01}.tar"), tmp_path)


@pytest.mark.parametrize("fault", ["long", "long error"])
def test_no_more_is_taken_of_an_answer_than_was_asked_for(server: Server, tmp_path: Path, fault: str) -> None:
    """A server without ranges sends all of a tar for each image, and one that means harm sends without an end."""
    there = indexed(server.url("{00..01}.tar"), tmp_path)
    server.faults["00.tar"] = [fault]
    with pytest.raises(ModeError, match=r"00\.tar: .*asked 3 times") as broken:
        ImageFiles(there, tmp_path).read(1)
    assert ("more bytes instead of" in str(broken.value)) is (fault == "long")
    assert server.taken == 0
    assert RemoteFile(server.url("01.tar")).read(4, 0) == (tmp_path / "shards/01.tar").read_bytes()[:4]


def test_a_shard_that_is_not_there(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ModeError, match=r"02\.tar: no such shard"):
        indexed(server.url("{00..02}.tar"), tmp_path)
    there = indexed(server.url("{00..01}.tar"), tmp_path)
    server.faults["01.tar"] = [404]
    with pytest.raises(ModeError, match=r"01\.tar: missing, but it was indexed"):
        ImageStore(there, tmp_path, ImageParams(size=16), 0)
    last = len(there) - 1
    first, missing = ImageFiles(there, tmp_path).read_many([0, last])
    assert isinstance(first, bytes)
    assert isinstance(missing, FileNotFoundError)


def test_a_changed_object_is_noticed(server: Server, tmp_path: Path) -> None:
    manifest = build_manifest(SourceParams(shards=server.url("00.tar")), tmp_path)
    [shard] = manifest.shards
    assert shard.size == (tmp_path / "shards" / "00.tar").stat().st_size
    assert shard.etag
    assert abs(shard.mtime_ns - (tmp_path / "shards" / "00.tar").stat().st_mtime_ns) <= 2 * 10**9
    manifest.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == manifest
    content = (tmp_path / "shards" / "00.tar").read_bytes()
    (tmp_path / "shards" / "00.tar").write_bytes(content[:-1] + b"\1")
    with pytest.raises(ModeError, match="not the object in the manifest"):
        build_index(manifest, tmp_path, tmp_path / "index", IndexParams(), workers=1)


@pytest.mark.parametrize(
    ("silent", "told"),
    [
        (set(), "not the file that was indexed: its ETag is"),
        ({"ETag"}, "another object than before: its Last-Modified is"),
        ({"ETag", "Last-Modified"}, None),
    ],
)
def test_other_images_with_the_same_last_bytes_are_told_by_the_next_answer(
    server: Server, tmp_path: Path, silent: set[str], told: str | None
) -> None:
    """Under the same names and of the same sizes: nothing but the server knows. One that says nothing is believed."""
    server.silent = silent
    there, path = indexed(server.url("00.tar"), tmp_path), tmp_path / "shards" / "00.tar"
    files = ImageFiles(there, tmp_path)
    assert files.read(0)
    content = bytearray(path.read_bytes())
    middle = int(there.offset[1]) + int(there.length[1]) // 2
    content[middle] ^= 255
    assert there.length[1] > 2 * 512, "the last bytes of an image are compared"
    path.write_bytes(content)
    os.utime(path, (2_000_000_000, 2_000_000_000))
    if told is None:
        assert files.read(1) == content[there.offset[1] :][: there.length[1]]
        return
    with pytest.raises(ModeError, match=rf"00\.tar: {told}") as error:
        files.read(1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "time", ["Wed, 21 Oct 2015 07:28:00 +999999999999", "0001-01-01T00:00:00-99:99", "9" * 5_000, "soon"]
)
def test_a_time_that_is_none_is_not_known(server: Server, tmp_path: Path, time: str) -> None:
    server.sent = {"Last-Modified": time}
    found = describe(server.url("00.tar"), tmp_path)
    assert (found.mtime_ns, found.size) == (0, (tmp_path / "shards/00.tar").stat().st_size)
    assert ImageFiles(indexed(server.url("00.tar"), tmp_path), tmp_path).read(0)


def test_an_etag_of_any_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes FF and FE, which are no UTF-8, between marks."""

    class Handler(BaseHTTPRequestHandler):
        etag = '"\xff"'

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("ETag", self.etag)
            self.send_header("Content-Length", "10")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(bytes(10))

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/0.tar"
        manifest = build_manifest(SourceParams(shards=url), tmp_path)
        manifest.save(tmp_path / "manifest.json")
        assert Manifest.load(tmp_path / "manifest.json") == manifest
        etag = manifest.shards[0].etag
        assert etag == '"\\udcff"'
        assert RemoteFile(url, 10, etag=etag).read(10, 0) == bytes(10)
        Handler.etag = '"\xfe"'
        monkeypatch.setattr(places, "PAUSES", (0.01, 0.01))
        with pytest.raises(ModeError, match=r"0\.tar: another object than before: its ETag is"):
            RemoteFile(url, 10, etag=etag).read(10, 0)
        server.shutdown()


class Buffered(AbstractFileSystem):  # type: ignore[misc]
    """A store whose files are opened and buffered, as those of `hf://` are; `more` bytes follow each answer."""

    protocol, cachable = "buffered", False
    content, asked, more = bytes(range(256)) * 40_000, [], 0  # type: ignore[var-annotated]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": len(self.content), "type": "file"}

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **given: Any) -> AbstractBufferedFile:
        given.pop("autocommit", None)
        file = AbstractBufferedFile(self, path, mode, block_size or "default", **given)

        def fetch(start: int, end: int) -> bytes:
            self.asked.append((start, end))
            return self.content[start : end + self.more]

        file.cache.fetcher = fetch
        return file


@pytest.fixture
def buffered(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Buffered]]:
    fsspec.register_implementation("buffered", Buffered, clobber=True)
    monkeypatch.setattr(Buffered, "asked", [])
    monkeypatch.setattr(places, "PAUSES", (0.01, 0.01))
    yield Buffered
    places._filesystem.cache_clear()


def test_no_more_than_a_range_is_asked_of_a_store_whose_files_are_buffered(buffered: type[Buffered]) -> None:
    file = RemoteFile("buffered://bucket/0.tar")
    assert file.read(20, 1_000) == Buffered.content[1_000:1_020]
    assert file.read(20, len(Buffered.content) - 10) == Buffered.content[-10:]
    assert places.read_start("buffered://bucket/0.tar", 30) == Buffered.content[:30]
    assert buffered.asked == [(1_000, 1_020), (len(Buffered.content) - 10, len(Buffered.content)), (0, 30)]


def test_more_than_a_range_is_refused(buffered: type[Buffered], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Buffered, "more", 1)
    with pytest.raises(ModeError, match=r"^buffered://bucket/0\.tar: more bytes instead of 20"):
        RemoteFile("buffered://bucket/0.tar").read(20, 1_000)
    assert places.read_start("buffered://bucket/0.tar", 30) == Buffered.content[:30]


def test_ways_to_name_objects(server: Server, memory: str, tmp_path: Path) -> None:
    both = ["memory://bucket/deep/00.tar", "memory://bucket/deep/01.tar"]
    assert [url.replace(":///", "://") for url in listed_urls(memory)] == both
    assert [url.replace(":///", "://") for url in listed_urls("memory://bucket/deep/0[1].tar")] == both[1:]
    assert listed_urls("s3://b/{08..10}/{0..1}.tar")[1::2] == [f"s3://b/{n}/1.tar" for n in ("08", "09", "10")]
    (tmp_path / "list.txt").write_text(f"# two\n{server.url('01.tar')}\n\nshards/00.tar\n")
    shards = build_manifest(SourceParams(shards="list.txt"), tmp_path).shards
    assert [shard.path for shard in shards] == [server.url("01.tar"), "shards/00.tar"]
    checked = build_manifest(SourceParams(shards="list.txt", checksum=True), tmp_path).shards
    assert checked[0].checksum == sha256_of(tmp_path / "shards" / "01.tar")
    for wrong, message in (
        (server.url("folder/"), "no .tar found there .a web server cannot list"),
        ("memory://bucket/empty/", "no .tar found there"),
        ("nosuch://bucket/", "Protocol not known"),
        ("missing.txt", "no such file"),
    ):
        with pytest.raises(ModeError, match=message):
            build_manifest(SourceParams(shards=wrong), tmp_path)


@given(
    reads=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 120)), min_size=1, max_size=8),
    ahead=st.sampled_from([0, 1, 16, 1000]),
)
@settings(max_examples=60)
def test_reads_as_pread_does(reads: list[tuple[int, int]], ahead: int) -> None:
    content = bytes(range(100))
    fsspec.filesystem("memory").pipe_file("/numbers", content)
    file = RemoteFile("memory://numbers", ahead=ahead)
    assert file.size == describe("memory://numbers", Path()).size == 100
    for length, offset in reads:
        assert file.read(length, offset) == content[offset : offset + length]

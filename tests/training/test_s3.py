"""Shards behind S3's own protocol: moto's server, and before it a proxy that answers as stores do in bad hours."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import tarfile
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import torch
from aiohttp import web
from safetensors import safe_open

from mode.data.loading.pack import Pack, fetch_table, read_record, write_pack
from mode.data.loading.selection import Pairs
from mode.data.shards import places, scan
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import build_manifest
from mode.data.shards.places import describe, filesystem_of
from mode.data.shards.reading import ChangedShard, ImageFiles, check_files
from mode.embedding.base import embed_index
from mode.embedding.lsa import LsaEmbedder
from mode.errors import ModeError
from mode.params import IndexParams, MachineParams, ModelParams, SourceParams, TrainingParams
from mode.paths import CHECKPOINT
from mode.roles import SEED
from mode.training.batches import Images
from mode.training.loop import Interrupted, train
from mode.training.plan import Training, make_plan
from tests.training.conftest import IMAGE

pytest.importorskip("s3fs")
server_of_moto = pytest.importorskip("moto.server")

#: Two steps of twelve of the sixty images.
RECIPE = TrainingParams(epochs=2, seed_epochs=1, epoch_samples=24, batch_size=12, warmup=0, lr=1e-3, shuffle_images=20)
BODY = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{}</Code><Message>{}</Message></Error>"
Fault = Callable[[web.Request], "tuple[int, str] | None"]


def _nothing(_: web.Request) -> None:
    """No fault."""


class Proxy:
    """Hands requests on, but for those to which `fault` gives a status and a code of S3.

    Attributes:
        keys: access keys that may ask.
        expired: session tokens that may no more.
        asked: requests that were handed on, by method and path.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.fault: Fault = _nothing
        self.keys, self.expired = {"good"}, set[str]()
        self.asked: Counter[tuple[str, str, str]] = Counter()
        self.refused: Counter[str] = Counter()
        self._loop, self._ready = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    def _refusal(self, request: web.Request) -> tuple[int, str] | None:
        key = request.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
        if key not in self.keys:
            return 403, "InvalidAccessKeyId"
        if request.headers.get("X-Amz-Security-Token") in self.expired:
            return 400, "ExpiredToken"
        return self.fault(request)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if refusal := self._refusal(request):
            self.refused[refusal[1]] += 1
            body = "" if request.method == "HEAD" else BODY.format(refusal[1], "as told by the store")
            return web.Response(status=refusal[0], text=body, content_type="application/xml")
        self.asked[request.method, request.path, request.headers.get("Range", "")] += 1
        headers = {name: value for name, value in request.headers.items() if name not in ("Host", "Content-Length")}
        async with self._session.request(
            request.method, self.upstream + request.path_qs, headers=headers, data=await request.read()
        ) as answer:
            dropped = ("Transfer-Encoding", "Content-Encoding", "Connection", "Date", "Server")
            kept = {name: value for name, value in answer.headers.items() if name not in dropped}
            body = await answer.read()
            if request.method != "HEAD":
                kept.pop("Content-Length", None)
            return web.Response(status=answer.status, headers=kept, body=None if request.method == "HEAD" else body)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)

        async def start() -> None:
            self._session = aiohttp.ClientSession(auto_decompress=False)
            app = web.Application(client_max_size=2**26)
            app.router.add_route("*", "/{name:.*}", self._answer)
            self._runner = web.AppRunner(app)
            await self._runner.setup()
            await web.TCPSite(self._runner, "127.0.0.1", 0).start()
            self.port = self._runner.addresses[0][1]

        async def end() -> None:
            await self._session.close()
            await self._runner.cleanup()

        self._loop.run_until_complete(start())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(end())


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = server_of_moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(moto: str, project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """The shards of the project in a bucket; credentials in the environment."""
    proxy = Proxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the retries that are tested are not botocore's
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "good")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "first")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    forget()
    filesystem, _ = filesystem_of("s3://bucket")
    if not filesystem.exists("bucket"):
        filesystem.mkdir("bucket")
    for path in sorted((project / "shards").iterdir()):
        filesystem.put_file(str(path), f"bucket/{path.name}")
    filesystem.invalidate_cache()
    proxy.asked.clear()
    yield proxy
    proxy.stop()
    forget()


def forget() -> None:
    """What another test's store has left in this process."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    places._filesystem.cache_clear()
    places._renewed.clear()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited, in no time."""
    waits: list[float] = []
    monkeypatch.setattr(places, "wait", waits.append)
    return waits


def indexed(shards: str, root: Path, out: str = "index") -> PairIndex:
    build_index(build_manifest(SourceParams(shards=shards), root), root, root / out, IndexParams(), workers=1)
    return PairIndex.load(root / out)


def trained(
    index: PairIndex, root: Path, vit: ModelParams, read: str, out: str, workers: int = 0
) -> dict[str, torch.Tensor]:
    recipe = RECIPE.model_copy(update={"read": read})
    pairs = Pairs.of(np.arange(len(index)), index.image)
    training = Training(make_plan(SEED, pairs, recipe, index.images), index, vit, IMAGE, recipe, random_seed=1)
    machine, images = MachineParams(device="cpu", threads=1, cache_mb=0, workers=workers), Images(spool=root / "spool")
    result = train(training, root, machine, root / out, images=images)
    assert result.clip.card["bad_images"] == 0
    return result.clip.model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("read", ["random", "sequential"])
def test_index_embedding_and_training_from_a_bucket(
    store: Proxy, project: Path, index: PairIndex, vit: ModelParams, tmp_path: Path, read: str
) -> None:
    there = indexed("s3://bucket/*.tar", tmp_path)
    assert [path.rpartition("/")[2] for path in there.files] == ["0.tar", "1.tar"]
    assert there.captions(range(60)) == index.captions(range(60))
    embedder = LsaEmbedder.fit(there.captions(range(60)), 4, 0)
    embed_index(embedder, there, tmp_path / "vectors.npy")
    assert np.load(tmp_path / "vectors.npy").shape == (60, 4)
    store.asked.clear()
    ours = trained(there, tmp_path, vit, read, "there")
    read_tars = sum(count for (method, _, _), count in store.asked.items() if method == "GET")
    # Of two windows of twenty images: a range each, or two where one reaches from tar to tar; and images of the first
    # that are needed before it is there.
    assert read_tars == 24 if read == "random" else 2 <= read_tars <= 23
    assert same(ours, trained(index, project, vit, read, str(tmp_path / "here")))


def test_a_pack_in_a_bucket(store: Proxy, index: PairIndex, project: Path, tmp_path: Path) -> None:
    pairs, where = Pairs.of(np.arange(0, 60, 4), index.image), "s3://bucket/packs/expert-0"
    assert write_pack("expert-0", index, pairs, project, where, 8) == (15, 2)
    fetch_table(where, project, index, pairs, read_record(where, project, index, pairs), tmp_path / "table")
    packed = ImageFiles(Pack(tmp_path / "table", index), project).read_many(range(0, 60, 4))
    assert list(packed) == list(ImageFiles(index, project).read_many(range(0, 60, 4)))


@pytest.mark.parametrize("shards", ["s3://bucket/*.tar", "s3://bucket/0.tar"])
def test_wrong_credentials_are_one_line_at_once(
    store: Proxy, waits: list[float], tmp_path: Path, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    forget()
    with pytest.raises(ModeError, match=r"s3://bucket/.*: refused: .*\(see the credentials in the environment") as told:
        indexed(shards, tmp_path)
    assert "\n" not in str(told.value)
    assert not waits


@pytest.mark.parametrize("shards", ["s3://nowhere/*.tar", "s3://nowhere/0.tar", "s3://nowhere/"])
def test_a_missing_bucket_is_one_line_at_once(store: Proxy, waits: list[float], tmp_path: Path, shards: str) -> None:
    with pytest.raises(ModeError, match=r"s3://nowhere/.*: (no such (bucket|shard)|no \.tar found there)"):
        indexed(shards, tmp_path)
    assert not waits


def test_no_credentials_are_one_line(
    store: Proxy, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    forget()
    with pytest.raises(ModeError, match=r"refused: .*\(see the credentials of profile 'default' in .*credentials\)"):
        indexed("s3://bucket/0.tar", tmp_path)
    assert not waits


@pytest.mark.parametrize("read", ["random", "sequential"])
@pytest.mark.parametrize("place", ["environment", "file"])
def test_a_token_that_expires_may_be_renewed(
    store: Proxy, project: Path, index: PairIndex, vit: ModelParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    read: str, place: str,
) -> None:  # fmt: skip
    """It has expired when the first image is read; somebody renews it while it is waited for the third time."""
    if place == "file":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name)
        write_credentials(tmp_path / "credentials", "first")
        forget()
    there = indexed("s3://bucket/*.tar", tmp_path)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) != 3:
            return
        if place == "file":
            write_credentials(tmp_path / "credentials", "second")
        else:
            monkeypatch.setenv("AWS_SESSION_TOKEN", "second")

    monkeypatch.setattr(places, "wait", wait)
    store.expired.add("first")
    ours = trained(there, tmp_path, vit, read, "there")
    assert len(waits) >= 3
    assert store.refused["ExpiredToken"] >= 3
    assert same(ours, trained(index, project, vit, read, str(tmp_path / "here")))


def write_credentials(file: Path, token: str) -> None:
    lines = ["[default]", "aws_access_key_id = good", "aws_secret_access_key = secret", f"aws_session_token = {token}"]
    file.write_text("\n".join(lines))


def test_a_token_that_is_never_renewed_is_one_line(store: Proxy, waits: list[float], tmp_path: Path) -> None:
    there = indexed("s3://bucket/*.tar", tmp_path)
    store.expired.add("first")
    with pytest.raises(
        ModeError,
        match=r"s3://bucket/1\.tar: the credentials in the environment \(AWS_ACCESS_KEY_ID \.\.\.\) have expired"
        r" \(renew them and run it again; a training goes on from its checkpoint\)$",
    ):
        ImageFiles(there, tmp_path).read(45)
    assert waits == list(places.PAUSES)


@pytest.mark.parametrize("read", ["random", "sequential"])
def test_a_minute_of_503_costs_nothing(
    store: Proxy, project: Path, index: PairIndex, vit: ModelParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    read: str,
) -> None:  # fmt: skip
    """Of each reader's clock, which goes on while it waits; the store is back when one has waited for a minute."""
    there = indexed("s3://bucket/*.tar", tmp_path)
    clocks: dict[int, float] = {}

    def wait(seconds: float) -> None:
        clocks[threading.get_ident()] = clocks.get(threading.get_ident(), 0.0) + seconds

    def fault(request: web.Request) -> tuple[int, str] | None:
        under_way = request.headers.get("Range", "")
        return (503, "ServiceUnavailable") if under_way and max(clocks.values(), default=0.0) < 60 else None

    monkeypatch.setattr(places, "wait", wait)
    store.fault = fault
    ours = trained(there, tmp_path, vit, read, "there")
    assert max(clocks.values()) >= 60
    assert same(ours, trained(index, project, vit, read, str(tmp_path / "here")))


def goes_away(store: Proxy, after: int) -> None:
    """From so many images on it answers no more."""
    store.asked.clear()

    def fault(request: web.Request) -> tuple[int, str] | None:
        answered = sum(count for (_, _, asked), count in store.asked.items() if asked)
        return (503, "ServiceUnavailable") if request.headers.get("Range") and answered >= after else None

    store.fault = fault


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_that_is_told_to_stop_does_not_wait_for_its_store(
    store: Proxy, project: Path, index: PairIndex, vit: ModelParams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:  # fmt: skip
    """The pause before a request is made again never ends; it is told when that has begun."""
    there, training, ended = indexed("s3://bucket/*.tar", tmp_path), os.getpid(), threading.Event()

    def wait(_: float) -> None:
        os.kill(training, signal.SIGTERM)
        ended.wait()

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # one that comes late changes nothing
    try:
        with monkeypatch.context() as patch:
            patch.setattr(places, "wait", wait)
            goes_away(store, after=12)
            with pytest.raises(Interrupted, match=r"seed: stopped after step [01] of 2") as told:
                trained(there, tmp_path, vit, "random", "there", workers)
        assert told.value.exit_code == 143
        made_one = "step 1" in str(told.value)
        assert (tmp_path / "there" / CHECKPOINT).is_file() == made_one
    finally:
        signal.signal(signal.SIGTERM, before)
        ended.set()
    store.fault = _nothing
    ours = trained(there, tmp_path, vit, "random", "there", workers)
    assert same(ours, trained(index, project, vit, "random", str(tmp_path / "here")))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_stays_away_costs_no_step(
    store: Proxy, project: Path, index: PairIndex, vit: ModelParams, waits: list[float], tmp_path: Path, workers: int
) -> None:
    """The checkpoint is of the last step that there were images for."""
    there = indexed("s3://bucket/*.tar", tmp_path)
    goes_away(store, after=12)
    with pytest.raises(ModeError, match=r"asked 9 times; try again later"):
        trained(there, tmp_path, vit, "random", "there", workers)
    with safe_open(tmp_path / "there" / CHECKPOINT, "numpy") as file:
        assert json.loads(json.loads(file.metadata()["record"])["state"])["step"] == 1
    store.fault = _nothing
    ours = trained(there, tmp_path, vit, "random", "there")
    assert same(ours, trained(index, project, vit, "random", str(tmp_path / "here")))


def test_a_store_that_stays_away_is_one_line(store: Proxy, waits: list[float], tmp_path: Path) -> None:
    there = indexed("s3://bucket/*.tar", tmp_path)
    store.fault = lambda _: (503, "ServiceUnavailable")
    with pytest.raises(ModeError, match=r"s3://bucket/0\.tar: .*asked 9 times; try again later"):
        ImageFiles(there, tmp_path).read(3)
    assert sum(waits) > 60


@pytest.mark.parametrize("change", ["other images", "shorter"])
def test_a_shard_that_changes_while_it_is_read_is_one_line(
    store: Proxy, project: Path, waits: list[float], tmp_path: Path, change: str
) -> None:
    there = indexed("s3://bucket/*.tar", tmp_path)
    files = ImageFiles(there, tmp_path)
    assert files.read(5)
    content = (project / "shards/0.tar").read_bytes()
    changed = content[:2_000] if change == "shorter" else bytes(len(content))
    filesystem_of("s3://bucket")[0].pipe_file("bucket/0.tar", changed)
    with pytest.raises(
        ChangedShard, match=r"s3://bucket/0\.tar: not the file that was indexed: (its ETag is|[\d,]+ bytes, it had)"
    ) as told:
        files.read(20)
    assert "\n" not in str(told.value)


def test_other_images_with_the_same_last_bytes_are_told_by_the_next_answer(
    store: Proxy, project: Path, waits: list[float], tmp_path: Path
) -> None:
    """Under the same names and of the same sizes: the store alone knows, and is asked for nothing but the images."""
    there = indexed("s3://bucket/*.tar", tmp_path)
    store.asked.clear()
    files = ImageFiles(there, tmp_path)
    assert files.read(5)
    assert files.read(20)
    assert [method for method, _, _ in store.asked] == ["GET", "GET"]
    filesystem_of("s3://bucket")[0].pipe_file("bucket/0.tar", flipped((project / "shards/0.tar").read_bytes()))
    with pytest.raises(ChangedShard, match=r"^s3://bucket/0\.tar: not the file that was indexed: its ETag is [^\n]*$"):
        files.read(20)
    assert files.read(45), "the other tar is what it was"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("read", ["random", "sequential"])
def test_a_training_whose_shard_is_replaced_ends_in_one_line(
    store: Proxy, project: Path, vit: ModelParams, waits: list[float], tmp_path: Path, read: str, workers: int,
) -> None:  # fmt: skip
    """What it knows of its images by itself, their places and last bytes, stays the same."""
    there = indexed("s3://bucket/*.tar", tmp_path)
    replaced_before_second_range(store, project, ["0.tar", "1.tar"])
    with pytest.raises(ModeError, match=r"^s3://bucket/[01]\.tar: not the file that was indexed: its ETag is [^\n]*$"):
        trained(there, tmp_path, vit, read, "there", workers)


def test_a_shard_that_is_replaced_while_it_is_indexed(
    store: Proxy, project: Path, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "AHEAD", 2_048)
    replaced_before_second_range(store, project, ["0.tar"])
    with pytest.raises(ModeError, match=r"^s3://bucket/0\.tar: changed while it was read: its ETag is [^\n]*$"):
        indexed("s3://bucket/0.tar", tmp_path)


@pytest.mark.parametrize("when", ["while it is read", "between two runs", "before it is opened"])
def test_a_tar_of_a_pack_that_is_replaced(
    store: Proxy, index: PairIndex, project: Path, waits: list[float], tmp_path: Path, when: str
) -> None:
    """By one whose images have the same names, sizes and last bytes: its ETag alone tells, or a look at all of it."""
    pairs, where = Pairs.of(np.arange(60), index.image), f"s3://bucket/packs/replaced {when}"
    write_pack("expert-0", index, pairs, project, where, 60)
    filesystem, path = filesystem_of(f"{where}/00000.tar")
    other = flipped(filesystem.cat_file(path))
    if when == "before it is opened":
        filesystem.pipe_file(path, other)
        with pytest.raises(ModeError, match=r"00000\.tar: damaged, or of another pack"):
            fetch_table(where, project, index, pairs, read_record(where, project, index, pairs), tmp_path / "table")
        return
    fetch_table(where, project, index, pairs, read_record(where, project, index, pairs), tmp_path / "table")
    pack = Pack(tmp_path / "table", index)
    files = ImageFiles(pack, project)
    if when == "while it is read":
        assert files.read(0)
    filesystem.pipe_file(path, other)
    refused = r"^s3://bucket/packs/[^\n]*00000\.tar: not the file that was packed: its ETag is [^\n]*$"
    with pytest.raises(ChangedShard, match=refused):
        files.read(1)
    with pytest.raises(ChangedShard, match=refused):
        check_files(pack, project, [0])


def test_a_copy_of_a_pack_is_that_pack(store: Proxy, index: PairIndex, project: Path, tmp_path: Path) -> None:
    """Written to a folder and copied to a bucket; the ETag that its tar has there holds from then on."""
    pairs, where = Pairs.of(np.arange(60), index.image), "s3://bucket/packs/copied"
    write_pack("expert-0", index, pairs, project, "packed", 60)
    filesystem_of(where)[0].put(f"{project}/packed/", "bucket/packs/copied/", recursive=True)
    fetch_table(where, project, index, pairs, read_record(where, project, index, pairs), tmp_path / "table")
    pack = Pack(tmp_path / "table", index)
    assert pack.identity(0)[2] == describe(f"{where}/00000.tar", project).etag is not None
    assert ImageFiles(pack, project).read(0) == ImageFiles(index, project).read(0)


def flipped(content: bytes) -> bytes:
    """A tar of the same members, the bytes in the middle of each image others."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        middles = {member.offset_data + member.size // 2 for member in tar if member.name.endswith(".png")}
    return bytes(byte ^ 255 if place in middles else byte for place, byte in enumerate(content))


def replaced_before_second_range(store: Proxy, project: Path, names: list[str]) -> None:
    """Have the shards replaced when the store is asked for a range of one for the second time."""
    store.asked.clear()

    def fault(request: web.Request) -> None:
        if request.headers.get("Range") and any(asked for _, _, asked in store.asked):
            store.fault = _nothing
            for name in names:
                content = flipped((project / "shards" / name).read_bytes())
                signed = {"Authorization": request.headers["Authorization"], "Content-Type": "application/x-tar"}
                put = urllib.request.Request(f"{store.upstream}/bucket/{name}", content, signed, method="PUT")
                urllib.request.urlopen(put).close()

    store.fault = fault

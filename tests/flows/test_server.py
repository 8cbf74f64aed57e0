"""What stands between Prefect's page and its server: another attempt where SQLite has refused a writer."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from flows.server import Persistent


def client(refusals: int, seen: list[bytes]) -> TestClient:
    """A server that refuses so many times, and notes what it was sent."""

    async def answer(request: Request) -> PlainTextResponse:
        seen.append(await request.body())
        if len(seen) <= refusals:
            raise OSError("database is locked")
        return PlainTextResponse("done", 201)

    def refuse(_request: Request, _error: Exception) -> PlainTextResponse:
        return PlainTextResponse("busy", 503)

    app = Starlette(routes=[Route("/", answer, methods=["GET", "POST"])], exception_handlers={Exception: refuse})
    return TestClient(Persistent(app, pauses=[0.0, 0.0, 0.0]), raise_server_exceptions=False)


def test_a_refused_request_is_sent_again_as_it_was() -> None:
    seen: list[bytes] = []
    answer = client(2, seen).post("/", content=b"body" * 100_000)
    assert (answer.status_code, answer.text) == (201, "done")
    assert seen == [b"body" * 100_000] * 3


def test_what_is_refused_to_the_end_is_said() -> None:
    seen: list[bytes] = []
    answer = client(9, seen).post("/", content=b"body")
    assert (answer.status_code, answer.text) == (503, "busy")
    assert len(seen) == 4


def test_what_is_answered_is_not_sent_again() -> None:
    seen: list[bytes] = []
    assert client(0, seen).get("/").status_code == 201
    assert seen == [b""]

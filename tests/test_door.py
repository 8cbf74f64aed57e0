"""Who comes in through the door of a server, and who does not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from mode.door import Door, refusal

SERVER = "http://127.0.0.1:4200"


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(await request.body())


async def talk(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text("hello")
    await socket.close()


@pytest.fixture
def client() -> TestClient:
    app = Starlette(routes=[Route("/", echo, methods=["GET", "POST"]), WebSocketRoute("/talk", talk)])
    return TestClient(Door(app, max_bytes=1000), base_url=SERVER)


@pytest.mark.parametrize(
    "headers",
    [
        {},  # a program
        {"Host": "localhost:4200"},
        {"Host": "LOCALHOST:4200"},
        {"Origin": SERVER},
        {"Origin": "http://localhost:4200", "Host": "localhost:4200", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},  # a typed address
    ],
)
def test_own_pages_and_programs_come_in(client: TestClient, headers: dict[str, str]) -> None:
    assert client.post("/", content=b"x", headers=headers).text == "x"


def test_a_link_in_another_page_may_be_followed(client: TestClient) -> None:
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert client.get("/", headers=followed).status_code == 200
    assert client.post("/", headers=followed).status_code == 403
    assert client.get("/", headers=followed | {"Sec-Fetch-Dest": "iframe"}).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:4200"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": "127.0.0.1@evil.example"}, 421),
        ({"Host": "evil.example#127.0.0.1"}, 421),
        ({"Host": "[::1"}, 421),
        ({"Host": ""}, 421),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:4201"}, 403),
        ({"Origin": "http://127.0.0.1"}, 403),
        ({"Origin": "https://127.0.0.1:4200"}, 403),
        ({"Origin": "http://localhost:4200"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
def test_other_pages_and_other_names_stay_out(client: TestClient, headers: dict[str, str], status: int) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        answer = client.request(method, "/", headers=headers)
        assert answer.status_code == status
        assert answer.text.count("\n") == 1
        assert "access-control-allow-origin" not in answer.headers


def test_two_hosts_are_none() -> None:
    both = Headers(raw=[(b"host", b"127.0.0.1:1"), (b"host", b"evil.example")])
    assert refusal(both, "GET") == (421, "this server is called 127.0.0.1 or localhost")


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40), st.booleans())
def test_no_other_name_comes_in(text: str, is_origin: bool) -> None:
    host = "127.0.0.1:4200" if is_origin else text
    raw = [(b"host", host.encode()), *([(b"origin", text.encode())] if is_origin else [])]
    allowed = text == SERVER if is_origin else text.rpartition(":")[0].lower() in ("127.0.0.1", "localhost")
    bare = not is_origin and text.lower() in ("127.0.0.1", "localhost")
    assert (refusal(Headers(raw=raw), "POST") is None) <= (allowed or bare)


def test_sockets_have_the_same_door(client: TestClient) -> None:
    with client.websocket_connect("ws://127.0.0.1:4200/talk") as socket:
        assert socket.receive_text() == "hello"
    for headers in ({"Origin": "http://127.0.0.1:1"}, {"Host": "evil.example"}):
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("ws://127.0.0.1:4200/talk", headers=headers):
            pytest.fail("came in")


def test_a_body_has_a_length_and_not_too_much_of_it(client: TestClient) -> None:
    def pieces() -> Any:
        yield b"x" * 10

    assert client.post("/", content=b"x" * 1000).status_code == 200
    assert client.post("/", content=b"x" * 1001).status_code == 413
    assert client.post("/", content=pieces()).status_code == 411

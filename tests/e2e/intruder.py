"""A page on another port of this machine that tries to reach a server of the project through the user's browser."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from playwright.sync_api import Page as Tab
from playwright.sync_api import Response

#: What another page may try: its name -> what it could read; null if nothing.
ATTEMPTS = """async ([server, read, write, body]) => {
  const told = async (request) => {
    try {
      const answer = await request;
      return answer.type === "opaque" ? null : `${answer.status} ${await answer.text()}`;
    } catch { return null; }
  };
  const post = (type, more) => fetch(server + write, {method: "POST", headers: {"Content-Type": type}, body, ...more});
  const shown = (frame) => new Promise((done) => {
    frame.onload = () => {
      try { done(frame.contentDocument.body.innerText || null); } catch { done(null); }
    };
    document.body.append(frame);
  });
  const frame = (address) => Object.assign(document.createElement("iframe"), {src: address, name: "frame"});
  const form = () => {
    const inside = Object.assign(document.createElement("iframe"), {name: "answer"});
    document.body.append(inside);
    const sent = Object.assign(document.createElement("form"),
      {method: "POST", action: server + write, enctype: "text/plain", target: "answer"});
    sent.append(Object.assign(document.createElement("input"), {name: body, value: ""}));
    document.body.append(sent);
    sent.submit();
    return new Promise((done) => { inside.onload = () => done(null); });
  };
  const socket = () => new Promise((done) => {
    const opened = new WebSocket(server.replace("http", "ws") + read);
    opened.onopen = () => done("open");
    opened.onclose = opened.onerror = () => done(null);
  });
  return {
    read: await told(fetch(server + read)),
    "read blindly": await told(fetch(server + read, {mode: "no-cors"})),
    "simple post": await told(post("text/plain")),
    "blind post": await told(post("text/plain", {mode: "no-cors", credentials: "include"})),
    "post of no type": await told(fetch(server + write, {method: "POST", body: new Blob([body]), mode: "no-cors"})),
    json: await told(post("application/json")),
    frame: await shown(frame(server + "/")),
    form: await form(),
    socket: await socket(),
  };
}"""


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>elsewhere</title><body>elsewhere")

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def elsewhere() -> Iterator[str]:
    """The address of a page that is none of the project's."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def intrude(tab: Tab, server: str, read: str, write: str, body: str) -> None:
    """Try everything from a page on another port, and under another name; fails if anything is let in.

    Args:
        tab: of the browser in which the server's own page may be open.
        server: its address.
        read, write: paths there: one that is read, one to which `body` is sent.
    """
    answers: list[Response] = []
    with elsewhere() as page:
        tab.goto(page)
        tab.on("response", lambda answer: answers.append(answer))
        found = tab.evaluate(ATTEMPTS, [server, read, write, body])
    assert found == dict.fromkeys(found, None)
    told = {(each.request.method, each.url, each.status) for each in answers if each.url.startswith(server)}
    assert {status for _, _, status in told} == {403}, told
    port = server.rpartition(":")[2]
    rebound = tab.goto(f"http://evil.example:{port}{read}")
    assert rebound is not None
    assert rebound.status == 421
    for name in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", ""):
        for path, data in ((read, None), (write, body.encode())):
            assert status_of(server + path, {"Host": name}, data) == 421
    for origin in (
        "null",
        "http://evil.example",
        f"https://127.0.0.1:{port}",
        "http://127.0.0.1:1",
        "http://127.0.0.1",
    ):
        assert status_of(server + write, {"Origin": origin}, body.encode()) == 403


def status_of(address: str, headers: dict[str, str], data: bytes | None = None) -> int:
    """What a program that sends these headers is answered."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code

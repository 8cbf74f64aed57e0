"""The door of every server on this machine: its own pages and programs come in, other pages of the browser do not.

A server on 127.0.0.1 is open to more than its user. Any page that is open in the same browser can send requests to it,
and a page whose name is made to lead to 127.0.0.1 (DNS rebinding) can read the answers as well. Browsers say where a
request comes from, in `Origin` and `Sec-Fetch-Site`, and what it is for, in `Host`; programs such as curl say `Host`
alone. That is checked here, before the server behind the door has read a byte.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mode.errors import ModeError

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.types import ASGIApp, Receive, Scope, Send

HOST = "127.0.0.1"
#: What a server on this machine is called.
NAMES = (HOST, "localhost")


class Door:
    """An ASGI application behind a door: what is refused gets one line and a status of 403, 411, 413 or 421.

    Args:
        app: the application.
        max_bytes: of a request's body; default as many as the application takes.
    """

    def __init__(self, app: ASGIApp, max_bytes: int | None = None) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or hand it on as it is."""
        if scope["type"] not in ("http", "websocket"):  # the server's start and end
            await self.app(scope, receive, send)
            return
        from starlette.datastructures import Headers
        from starlette.responses import PlainTextResponse

        headers = Headers(scope=scope)
        refused = refusal(headers, scope.get("method", "GET")) or too_large(headers, self.max_bytes)
        if refused:
            status, reason = refused
            # What is left of the body stays unread: nothing else can follow on this connection.
            answer = PlainTextResponse(f"{reason}\n", status, {"Connection": "close"})
            await answer(scope, receive, send)
            return
        await self.app(scope, receive, send)


def refusal(headers: Headers, method: str) -> tuple[int, str] | None:
    """Status and reason, if a request was sent by another page or is meant for another server; else None."""
    [host, *more] = headers.getlist("host") or [""]
    if more or _name(host) not in NAMES:
        return 421, f"this server is called {' or '.join(NAMES)}"
    if any(origin != f"http://{host}" for origin in headers.getlist("origin")):
        return 403, "only this server's own pages may send that"
    # A link in another page may be followed; what that page loads, frames or fetches by itself may not.
    followed = (method, headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("GET", "navigate", "document")
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not followed:
        return 403, "only this server's own pages may load that"
    return None


def too_large(headers: Headers, max_bytes: int | None) -> tuple[int, str] | None:
    """Status and reason, if a body is longer than that or does not say how long it is; else None."""
    if max_bytes is None:
        return None
    if "transfer-encoding" in headers:
        return 411, "a request has to say how long it is (Content-Length)"
    if int(headers.get("content-length", 0)) > max_bytes:  # the server has checked that it is a number
        return 413, f"the request has more than {max_bytes / 2**20:,.0f} MiB"
    return None


def serve(app: ASGIApp, port: int, announce: Callable[[str], None], max_bytes: int | None = None) -> None:
    """Serve an application behind its door, on this machine alone, until Ctrl-C or SIGTERM.

    Args:
        app: the application.
        port: 0: any that is free.
        announce: is told the address as soon as requests are taken; they are answered when the application is ready.
        max_bytes: as of `Door`.

    Raises:
        ModeError: the port is in use.
    """
    import uvicorn

    try:
        listener = socket.create_server((HOST, port))
    except OSError as error:
        raise ModeError(f"port {port}: {error.strerror or error}", "choose another: --port N") from None
    # So that SIGTERM ends what is around this as well: temporary folders go.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    with listener, contextlib.suppress(KeyboardInterrupt):
        announce(f"http://{HOST}:{listener.getsockname()[1]}")
        # A browser keeps connections open, which would hold up the end.
        quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 3}
        uvicorn.Server(uvicorn.Config(Door(app, max_bytes), **quiet)).run(sockets=[listener])


def _name(host: str) -> str:
    """The name in a `Host` header, without its port; empty if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or "" if set(host).isdisjoint("/?#@\\ ") else ""
    except ValueError:
        return ""

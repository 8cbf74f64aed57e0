"""The servers of the two pages, each a process behind its door: `python -m flows.server prefect|mlflow PORT`.

They run in the project's folder, with the settings of `flows.ui`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from mode.door import serve
from mode.errors import exit_code_of
from mode.paths import Paths

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import HTMLResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Where Prefect's page is opened already logged in: LOG_IN#SECRET. A browser sends nothing of what follows the #.
LOG_IN = "/log-in"
#: Prefect's page looks for the secret under this name.
LOG_IN_PAGE = """<!doctype html><title>Log in</title><script>
localStorage.setItem("prefect-password", btoa(location.hash.slice(1)));
location.replace("/");
</script>"""
#: Seconds between attempts at what SQLite refused.
PAUSES = (0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 3.0)
#: Bytes of a request to Prefect's server; a run's parameters have half a MiB at most.
MAX_BYTES = 16 * 2**20


class Persistent:
    """Tries a request again that is answered with 503, for some seconds.

    Prefect's server says so while SQLite has another writer, and has changed nothing then. Its own clients try again;
    its page shows an error.
    """

    def __init__(self, app: ASGIApp, pauses: Sequence[float] = PAUSES) -> None:
        self.app, self.pauses = app, pauses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with what the last attempt says."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request: list[Message] = [await receive()]
        while request[-1].get("more_body"):
            request.append(await receive())
        for pause in self.pauses:
            attempt = _Attempt(request, receive, send)
            try:
                await self.app(dict(scope), attempt.receive, attempt.send)
            except Exception:
                # Starlette raises what it has answered with 503 once more, for a log.
                if not attempt.refused:
                    raise
            if not attempt.refused:
                return
            await asyncio.sleep(pause)
        await self.app(scope, _Attempt(request, receive, send).receive, send)


class _Attempt:
    """One attempt at a request that is all there: its answer is passed on unless it is a 503."""

    def __init__(self, request: Sequence[Message], receive: Receive, send: Send) -> None:
        self.refused = False
        self._request, self._receive, self._send = iter(request), receive, send

    async def receive(self) -> Message:
        """The next message of the request; at its end what comes after it, such as the client's going."""
        return next(self._request, None) or await self._receive()

    async def send(self, message: Message) -> None:
        """Pass a message on, unless the answer began with 503."""
        self.refused |= message.get("status") == HTTPStatus.SERVICE_UNAVAILABLE
        if not self.refused:
            await self._send(message)


def prefect_app() -> ASGIApp:
    """Prefect's server, and beside its page one that logs in."""
    from prefect.server.api.server import create_app
    from starlette.routing import Route

    server = create_app(final=True)
    server.router.routes.insert(0, Route(LOG_IN, log_in))
    return Persistent(server)


def log_in(_request: Request) -> HTMLResponse:
    """Prefect's page with the secret that follows the # in the address."""
    from starlette.responses import HTMLResponse

    return HTMLResponse(LOG_IN_PAGE, headers={"Cache-Control": "no-store"})


def mlflow_app() -> ASGIApp:
    """MLflow's server and page for this project's database."""
    from mode.tracking.serving import page_app

    return page_app(Paths(Path.cwd()).runs)


def main(arguments: Sequence[str]) -> int:
    """Serve until told to stop; the message of what the user can mend is one line."""
    name, port = arguments
    if name == "prefect":
        return exit_code_of(lambda: serve(prefect_app(), int(port), print, MAX_BYTES))
    return exit_code_of(lambda: serve(mlflow_app(), int(port), print))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

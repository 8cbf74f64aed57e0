"""Whom the processes of a test call: every address but this machine's is noted, and nobody is reached."""

from __future__ import annotations

import os
from pathlib import Path

#: Read by every Python process at its start: notes whom it calls, and lets it reach nobody but this machine.
HOOK = """
import os, socket

asked, connect = socket.getaddrinfo, socket.socket.connect
HERE = ("127.0.0.1", "localhost", "::1", "", None)


def note(host):
    with open(os.environ["CALLED"], "a") as file:
        file.write(f"{host}\\n")


def getaddrinfo(host, *more, **options):
    if host not in HERE:
        note(host)
        raise socket.gaierror(socket.EAI_NONAME, "nobody is called")
    return asked(host, *more, **options)


class Socket(socket.socket):
    def connect(self, address):
        if isinstance(address, tuple) and address[0] not in HERE:
            note(address[0])
            raise ConnectionRefusedError
        return super().connect(address)

    def connect_ex(self, address):
        if isinstance(address, tuple) and address[0] not in HERE:
            note(address[0])
            return 111
        return super().connect_ex(address)


socket.getaddrinfo, socket.socket = getaddrinfo, Socket
"""


class Calls:
    """The notes of all Python processes that are started with `settings`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "sitecustomize.py").write_text(HOOK)
        self._notes = folder / "called"
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        self.settings = {"PYTHONPATH": path, "CALLED": str(self._notes)}

    def hosts(self) -> list[str]:
        """Who was called."""
        return sorted(set(self._notes.read_text().split())) if self._notes.exists() else []

"""Results that other machines have made: fetched from the DVC remote, and pushed to it.

A stage's result is looked up in DVC's run cache by command, parameters and the content of its inputs. So machines share
results without sharing a dvc.lock: nobody has to commit and merge one.

Usage: python -m flows.remote fetch|push STAGE...   (stages in an order in which they can run)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mode.errors import ModeError, exit_code_of


def fetch(stages: Sequence[str]) -> None:
    """Take over the results that the DVC remote (or the local cache) has for today's inputs of these stages.

    Runs no stage but those that look anew on every run, which others wait for: the check of names, and the lists of
    what lies elsewhere. A result that is found is checked out and noted in dvc.lock, so that DVC calls it up to date.
    A stage has to come after those whose outputs it reads.
    """
    from dvc.stage.cache import RunCacheNotFoundError

    with repository() as repo:
        with repo.lock:
            repo.stage_cache.pull(None)
        for address in stages:
            with repo.lock:
                [stage] = repo.stage.collect(address)
                try:
                    if not stage.always_changed:
                        repo.stage_cache.restore(stage, pull=True)
                except RunCacheNotFoundError:
                    print(f"{address}: nobody has made it yet", flush=True)
                    continue
            repo.reproduce(address, single_item=True)  # finds the result in the cache, and notes it


def push(stages: Sequence[str]) -> None:
    """Push the results of stages to the DVC remote, and the run cache by which other machines find them."""
    with repository() as repo:
        count = repo.push(targets=list(stages), run_cache=True)
    print(f"pushed {count} files of {', '.join(stages)}", flush=True)


@contextmanager
def repository() -> Iterator[Any]:
    """DVC in the current folder. Raises `ModeError` if it has no default remote."""
    from dvc.config import NoRemoteError
    from dvc.repo import Repo

    with Repo() as repo:
        try:
            repo.cloud.get_remote()
        except NoRemoteError:
            raise ModeError("there is no DVC remote", "`dvc remote add --default NAME ADDRESS`") from None
        yield repo


def main(arguments: Sequence[str]) -> int:
    """Fetch or push; the message of what the user can mend is one line."""
    action, *stages = arguments
    return exit_code_of(lambda: {"fetch": fetch, "push": push}[action](stages))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Prefect's server and a worker, and MLflow's page, all on loopback and all in this project's folder: `make ui`.

Usage: python -m flows.ui [--prefect-port 4200] [--mlflow-port 5000] [--no-mlflow]

Ctrl-C (or SIGTERM) stops trainings with a checkpoint, then everything else, and leaves no process. Prefect's database
and settings lie in `.mode/prefect`; nothing outside the project is read or written.

Whoever reaches Prefect's server can run commands as this user. So it asks for a secret that is drawn at every start,
and stands like MLflow behind `mode.door`, which lets in no page but its own. The secret is printed, and given to the
server and the worker in their environment; it is in no file and no command line.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from flows import MLFLOW_ADDRESS, tools_first
from flows.locks import all_dead, dead_runs, forget_run, holder, is_held, take
from flows.server import LOG_IN
from mode.door import HOST
from mode.errors import ModeError, exit_code_of
from mode.paths import Paths
from mode.processes import die_with_parent
from mode.tracking.store import page_addresses

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import State

POOL = "mode"
#: What every run of the pool starts. Without it the worker imports Prefect twice for each run, which takes seconds.
COMMAND = "python -m prefect.engine"
#: What ends the page, and its trainings with a checkpoint.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Seconds that the worker has to say itself how a run ended, before it is said in its place.
WORKER_SECONDS = 10.0


class Addresses(NamedTuple):
    """Where the pages are, and Prefect's API."""

    prefect: str
    mlflow: str

    @property
    def api(self) -> str:
        return f"{self.prefect}/api"


class Services:
    """The processes of the page, each in a group of its own, so that Ctrl-C reaches this program only."""

    def __init__(self, root: Path, addresses: Addresses) -> None:
        self.root, self.addresses = root, addresses
        self.secret = f"mode:{secrets.token_urlsafe(24)}"
        self.logs = Paths(root).logs
        self.logs.mkdir(parents=True, exist_ok=True)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str, secret_as: str | None = None) -> subprocess.Popen[bytes]:
        """Start `python -m ARGUMENTS`; its output goes to `.mode/logs/NAME.log`.

        `secret_as` is the variable in which it finds the secret.
        """
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=self.root,
                env={**os.environ, **({secret_as: self.secret} if secret_as else {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.processes[name] = process
        return process

    def command(self, name: str, *arguments: str) -> None:
        """Run `python -m ARGUMENTS`, a client of Prefect's, to its end.

        Raises `ModeError`, which says where its output is, if it failed.
        """
        code = self.start(name, *arguments, secret_as="PREFECT_API_AUTH_STRING").wait()
        del self.processes[name]
        if code:
            raise ModeError(f"{' '.join(arguments)}: exit code {code}", f"see {self.logs / name}.log")

    def start_worker(self) -> None:
        """Start the worker that runs flows as processes of this machine."""
        options = ("--pool", POOL, "--type", "process", "--name", "here")
        self.start("worker", "prefect", "worker", "start", *options, secret_as="PREFECT_API_AUTH_STRING")

    def await_page(self, name: str, address: str, seconds: float = 300.0) -> None:
        """Wait until a service answers. Raises `ModeError`, which says where its output is, if it does not."""
        deadline = time.monotonic() + seconds
        while self.is_up(name) and time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2):
                return
            time.sleep(0.1)
        raise ModeError(f"{name} does not answer on {address}", f"see {self.logs / name}.log")

    def is_up(self, name: str) -> bool:
        """Whether a service has been started and has not ended."""
        return name in self.processes and self.processes[name].poll() is None

    def stop(self, name: str, seconds: float) -> None:
        """SIGTERM to a service, and SIGKILL to what is left of its group after some seconds."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        deadline = time.monotonic() + 2
        while _signal_group(process.pid, 0) and time.monotonic() < deadline:
            _signal_group(process.pid, signal.SIGTERM)
            time.sleep(0.1)
            process.poll()
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


def environment(root: Path, addresses: Addresses) -> dict[str, str]:
    """Settings of this program, all services and the flows: the project's own Prefect home (telemetry: `mode`)."""
    home = Paths(root).prefect_home
    return {
        "PATH": tools_first(os.environ),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_API_URL": addresses.api,
        # Relative, so that the page also works under the name localhost.
        "PREFECT_UI_API_URL": "/api",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": addresses.prefect,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_CLI_PROMPT": "false",
        # Look for new runs and cancels often: it is one machine, and a cancelled training has 15 seconds.
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_WORKER_PREFETCH_SECONDS": "1",
        "PREFECT_WORKER_CANCELLATION_POLL_SECONDS": "2",
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        # Its queue for judging chat logs: five more processes, which nothing here uses.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        MLFLOW_ADDRESS: addresses.mlflow,
    }


def free_port(port: int, option: str) -> int:
    """The port, or any free one for 0. Raises `ModeError`, which names the option for another, if it is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise ModeError(f"port {port} is in use", f"stop what listens there, or choose another: {option}") from None
        return int(probe.getsockname()[1])


def settle_dead_runs(
    root: Path, client: SyncPrefectClient, final: State[Any], only: set[str] | None = None
) -> list[str]:
    """Give a final state to runs whose process has gone without one, and return their ids.

    Prefect alone leaves them Running for ever.

    Args:
        root: of the project.
        client: of Prefect's server.
        final: their state; of those that were being cancelled, Cancelled with the same message.
        only: leave the others to the worker for the time being.
    """
    from httpx import HTTPError
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.states import Cancelled

    settled = []
    for run in dead_runs(root):
        try:
            this = FlowRunFilter.model_validate({"id": {"any_": [run]}})
            found = client.read_flow_runs(flow_run_filter=this)
            if found and (state := found[0].state) and (state.is_running() or state.is_cancelling()):
                if only is not None and run not in only:
                    continue
                end = Cancelled(message=final.message) if state.is_cancelling() else final
                client.set_flow_run_state(UUID(run), end, force=True)
                for task in client.read_task_runs(flow_run_filter=this):
                    if task.state and (task.state.is_running() or task.state.is_cancelling()):
                        client.set_task_run_state(task.id, end, force=True)
                settled.append(run)
        except HTTPError:
            continue  # the server is busy: next time
        forget_run(root, run)
    return settled


def settle_all_runs(root: Path, client: SyncPrefectClient, final: State[Any]) -> None:
    """`settle_dead_runs`, and give a final state also to runs that had not come to mark themselves alive.

    Only while there is no worker. Prefect leaves them Pending for ever; and of a deployment that runs once at a time
    each keeps the one place, so that no other run of it begins.
    """
    from httpx import HTTPError
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter

    settle_dead_runs(root, client, final)
    taken = FlowRunFilter.model_validate({"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}})
    here = WorkPoolFilter.model_validate({"name": {"any_": [POOL]}})
    with contextlib.suppress(HTTPError):
        for run in client.read_flow_runs(flow_run_filter=taken, work_pool_filter=here):
            if not is_held(Paths(root).live_runs / str(run.id)):
                client.set_flow_run_state(run.id, final, force=True)


def prepare_pool(client: SyncPrefectClient) -> None:
    """Make the worker's pool, or mend one that an earlier start has left; what else is tuned in the page stays."""
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    default = ProcessWorker.get_default_base_job_template()
    try:
        template = client.read_work_pool(POOL).base_job_template or default
        client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=fix_process(template)))
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=fix_process(default)))


def fix_process(template: dict[str, Any]) -> dict[str, Any]:
    """A pool's job template in which command, environment and folder are the pool's own, and no variables of a run.

    Environment and folder keep the pool's values; the command is always `COMMAND`.
    """
    configuration, variables = dict(template["job_configuration"]), dict(template["variables"]["properties"])
    for key in ("command", "env", "working_dir"):
        default = variables.pop(key, {}).get("default")
        if "{{" in str(configuration.get(key, "")):  # it named a variable: now it is what that had as its default
            configuration[key] = default
    kept = {key: value for key, value in configuration.items() if value is not None}
    return {
        "job_configuration": kept | {"command": COMMAND},
        "variables": {**template["variables"], "properties": variables},
    }


def stop_runs(services: Services, client: SyncPrefectClient) -> None:
    """Stop the worker and its runs: trainings write checkpoints, and the runs become Cancelled."""
    from httpx import HTTPError
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.states import Cancelled, Cancelling

    running = FlowRunFilter.model_validate({"state": {"type": {"any_": ["RUNNING"]}}})
    served = services.is_up("prefect")  # a server that has died would be asked again and again
    if served:
        # Said before the worker stops: afterwards nobody is left to say it.
        with contextlib.suppress(HTTPError):
            for run in client.read_flow_runs(flow_run_filter=running):
                client.set_flow_run_state(run.id, Cancelling(), force=True)
        _await_no_runs(services.root, seconds=18)
    services.stop("worker", seconds=15)
    _await_no_runs(services.root, seconds=15)
    if served:
        settle_all_runs(services.root, client, Cancelled(message="stopped with the page"))


def _await_no_runs(root: Path, seconds: float) -> None:
    """Wait until no run of this project has a process."""
    deadline = time.monotonic() + seconds
    while not all_dead(root) and time.monotonic() < deadline:
        time.sleep(0.2)


def serve(root: Path, addresses: Addresses, mlflow: bool) -> None:
    """Start everything, print the addresses, and keep the worker running until interrupted."""
    services = Services(root, addresses)
    try:
        port = addresses.prefect.rpartition(":")[2]
        services.start("prefect", "flows.server", "prefect", port, secret_as="PREFECT_SERVER_API_AUTH_STRING")
        if mlflow:
            _start_mlflow(services)
        # Importing Prefect takes seconds, in which its server starts.
        from prefect.client.orchestration import SyncPrefectClient
        from prefect.states import Crashed

        client = SyncPrefectClient(addresses.api, auth_string=services.secret)
        services.await_page("prefect", f"{addresses.api}/health")
        prepare_pool(client)
        services.command("deploy", "prefect", "--no-prompt", "deploy", "--all")
        settle_all_runs(root, client, Crashed(message="its process has gone: the worker or the machine was stopped"))
        services.start_worker()
        if mlflow:
            services.await_page("mlflow", f"{addresses.mlflow}/health")
        print(f"Prefect   {addresses.prefect}{LOG_IN}#{services.secret}")
        print(f"API       {addresses.api}    (export PREFECT_API_URL={addresses.api}")
        print(f"          {' ' * len(addresses.api)}     export PREFECT_API_AUTH_STRING={services.secret})")
        print(f"MLflow    {addresses.mlflow if mlflow else 'not started'}")
        if mlflow and (comparison := page_addresses(Paths(root).runs, addresses.mlflow).get("comparison")):
            print(f"Compare   {comparison}")
        print("Ctrl-C stops everything; trainings go on from their checkpoints the next time.", flush=True)
        _watch(services, client)
    finally:
        # From here on a second Ctrl-C would leave processes behind.
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
        if services.processes:
            print("stopping ...", flush=True)
        if "worker" in services.processes:
            stop_runs(services, client)
        for name in reversed(list(services.processes)):
            services.stop(name, seconds=8)


def _start_mlflow(services: Services) -> None:
    from mode.tracking.runs import Tracker

    tracker = Tracker(Paths(services.root).runs)
    tracker.prepare()  # before anyone else opens a fresh database
    port = services.addresses.mlflow.rpartition(":")[2]
    services.start("mlflow", "flows.server", "mlflow", port)


def _watch(services: Services, client: SyncPrefectClient) -> None:
    """Keep the worker running; give runs that died with one their state."""
    from prefect.states import Crashed

    since: dict[str, float] = {}
    while True:
        time.sleep(2)
        now = time.monotonic()
        since = {run: since.get(run, now) for run in dead_runs(services.root)}
        overdue = {run for run, first in since.items() if now - first > WORKER_SECONDS}
        killed: State[Any] = Crashed(message="its process was killed; start it again to go on")
        for run in settle_dead_runs(services.root, client, killed, overdue):
            print(f"run {run} had lost its process", flush=True)
        for name, process in list(services.processes.items()):
            if services.is_up(name):
                continue
            if name != "worker":
                raise ModeError(f"{name} has ended (exit code {process.returncode})", f"see {services.logs / name}.log")
            print(f"the worker has ended (exit code {process.returncode}); starting another", flush=True)
            services.stop("worker", seconds=0)
            services.start_worker()


def _signal_group(group: int, number: int) -> bool:
    """Whether a process group is still there (and was sent the signal)."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and serve; one line for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m flows.ui", description="Prefect's and MLflow's pages on loopback.")
    parser.add_argument("--prefect-port", type=int, default=int(os.environ.get("PREFECT_PORT", "4200")))
    parser.add_argument("--mlflow-port", type=int, default=int(os.environ.get("MLFLOW_PORT", "5000")))
    parser.add_argument("--no-mlflow", action="store_true", help="leave MLflow's page out")
    options = parser.parse_args(arguments)
    try:
        return exit_code_of(lambda: _open(Path.cwd(), options.prefect_port, options.mlflow_port, not options.no_mlflow))
    except KeyboardInterrupt:
        return 0


def _open(root: Path, prefect_port: int, mlflow_port: int, mlflow: bool) -> None:
    """Serve the page of a project until interrupted. Raises `ModeError` where it cannot be."""
    path = Paths(root).page_lock
    if not Paths(root).deployments.is_file():
        raise ModeError(f"{root}: no prefect.yaml", "run it in the project's folder")
    lock = take(path, f"process {os.getpid()}")
    if lock is None:
        raise ModeError(f"the page of this project is open already ({holder(path)})", "stop that one first")
    addresses = Addresses(
        prefect=f"http://{HOST}:{free_port(prefect_port, '--prefect-port N')}",
        mlflow=f"http://{HOST}:{free_port(mlflow_port, '--mlflow-port N')}",
    )
    os.environ |= environment(root, addresses)
    for number in STOPS:
        signal.signal(number, signal.default_int_handler)
    with lock:
        serve(root, addresses, mlflow)


if __name__ == "__main__":
    sys.exit(main())

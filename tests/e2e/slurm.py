"""A Slurm of a test's own: munged, one slurmctld and two slurmd on loopback, in a temporary folder.

The nodes are CPU nodes of this machine with one core each, though it may have fewer. All daemons stay in the
foreground, so that they end by their process ids; this machine's own Slurm and munge, if it has any, are not touched.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.waiting import wait_until

NODES = ("node1", "node2")
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
#: Where Debian has the daemons, which is not in everybody's path.
PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"

#: Node names are aliases of this machine; Slurm is told to look for no more than is configured (config_overrides).
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ctld}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/{track}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=2,requeue_setup_env_fail
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdTimeout=5
SlurmctldTimeout=10
KillWait=30
InactiveLimit=0
MessageTimeout=10
TreeWidth=2
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmdParameters=config_overrides
LaunchParameters=slurmstepd_memlock
JobRequeue=1
PropagateResourceLimits=NONE
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node1} CPUs=1 RealMemory=100000 State=UNKNOWN
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node2} CPUs=1 RealMemory=100000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=train Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=600
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
    """What keeps a Slurm from running here, or nothing."""
    absent = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    return f"needs Debian's slurmctld, slurmd, slurm-client and munge: no {', '.join(absent)}" if absent else ""


@dataclass
class Slurm:
    """A Slurm in a folder."""

    folder: Path
    track: str = "linuxproc"
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        """What a process needs to know to use it."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def start(self) -> None:
        """Start everything and wait until both nodes are idle."""
        self.folder.mkdir(mode=0o755, parents=True)
        for folder in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / folder).mkdir()
        ports = dict(zip(("ctld", *NODES), free_ports(3), strict=True))
        text = CONFIGURATION.format(folder=self.folder, user=getpass.getuser(), track=self.track, **ports)
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        names = {name: self.folder / f"munge.{name}" for name in ("socket", "log", "pid", "seed")}
        options = [f"--{'log-file' if name == 'log' else f'{name}-file'}={path}" for name, path in names.items()]
        options = [option.replace("socket-file", "socket") for option in options]
        self._run("munged", "munged", "--foreground", "--force", f"--key-file={key}", *options)
        wait_until(lambda: names["socket"].exists(), self.logs)
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        wait_until(lambda: [self.state(node) for node in NODES] == ["IDLE", "IDLE"], self.logs)

    def start_controller(self) -> None:
        self._run("slurmctld", "slurmctld", "-D")

    def stop_controller(self) -> None:
        self._end(self.daemons["slurmctld"], signal.SIGTERM)

    def start_node(self, name: str) -> None:
        self._run(name, "slurmd", "-D", "-N", name)

    def stop(self) -> None:
        """End all daemons, and what jobs have left, by their process ids."""
        for daemon in reversed(self.daemons.values()):
            self._end(daemon, signal.SIGTERM)
        for process in self.steps():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def kill_node(self, name: str) -> None:
        """SIGKILL to a node's daemon and everything that it has started: what is left when a machine loses power."""
        daemon = self.daemons[name]
        steps = [step for step in self.steps() if self._is_on(step, name)]
        family = [child for step in steps for child in (step, *step.children(recursive=True))]
        self._end(daemon, signal.SIGKILL)
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def steps(self) -> list[psutil.Process]:
        """The daemons of this Slurm's job steps."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name() == "slurmstepd" and str(self.folder) in " ".join(
                    [*process.cmdline(), *(file.path for file in process.open_files())]
                ):
                    found.append(process)
        return found

    def _is_on(self, step: psutil.Process, node: str) -> bool:
        with contextlib.suppress(psutil.Error):
            return any(node in file.path for file in step.open_files())
        return False

    def ask(self, *command: str, check: bool = True) -> str:
        """What a command of Slurm prints; it may fail without `check`."""
        environment = {**os.environ, **self.variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}{self.logs()}"
        return done.stdout

    def state(self, node: str) -> str:
        return self.ask("sinfo", "--noheader", "--nodes", node, "--format=%T").strip().upper()

    def jobs(self) -> list[dict[str, str]]:
        """Jobs that have not ended: id, name, state, node."""
        lines = self.ask("squeue", "--noheader", "--format=%i|%j|%T|%N").splitlines()
        return [dict(zip(("id", "name", "state", "node"), line.split("|"), strict=True)) for line in lines]

    def logs(self) -> str:
        """Ends of the daemons' logs."""
        return "".join(f"\n--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    def _run(self, name: str, tool: str, *arguments: str) -> None:
        program = shutil.which(tool, path=PATH)
        assert program is not None
        with (self.folder / f"{name}.out.log").open("ab") as output:
            self.daemons[name] = subprocess.Popen(
                [program, *arguments],
                env={**os.environ, **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in a terminal is for the tests
            )

    @staticmethod
    def _end(daemon: subprocess.Popen[bytes], number: int) -> None:
        if daemon.poll() is None:
            daemon.send_signal(number)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]

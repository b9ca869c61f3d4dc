"""A real Slurm of three virtual nodes on one machine: loopback only, no systemd, no database."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

NODES = ("n1", "n2", "n3")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "munged", "munge")

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job may start again only after its credential has run out: 120 s by default.
AuthInfo=cred_expire=5
# Without these the daemons would listen to the whole network.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs.txt
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SlurmctldTimeout=30
SlurmdTimeout=30
NodeName=n[1-3] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 RealMemory=6000
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class CannotRunError(Exception):
    """This machine cannot have a Slurm of its own; says why."""


@contextmanager
def running(folder: Path) -> Iterator["Cluster"]:
    """Start Slurm, installing it where that is possible, and stop it whatever happens.

    Raises:
        CannotRunError: it cannot be installed or started.
    """
    _install()
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _install() -> None:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if os.geteuid() != 0:
        raise CannotRunError("Slurm's daemons must be started by root")
    if missing and shutil.which("apt-get") is None:
        raise CannotRunError(f"{', '.join(missing)} not found, and there is no apt-get")
    if missing:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends"]
        for command in (["apt-get", "update", "-qq"], [*install, "slurm-wlm", "munge"]):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise CannotRunError(f"{' '.join(command)}: {done.stderr.strip()[-200:]}")


class Cluster:
    """Three nodes of two CPUs; commands find it through ``SLURM_CONF``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        self.munged: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        for name in ("state", "spool", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        port = _free_ports(4)
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            folder=self.folder,
            port=port,
            first=port + 1,
            last=port + 3,
        )
        self.configuration.write_text(text)
        os.environ["SLURM_CONF"] = str(self.configuration)
        self._start_munge()
        _output("slurmctld", "-i", check=True)
        for node in NODES:
            self.start_node(node)
        deadline = time.monotonic() + 60
        while _output("sinfo", "-h", "-o", "%T").split() != ["idle"]:
            if time.monotonic() > deadline:
                raise CannotRunError(f"Slurm does not come up; see {self.folder / 'log'}")
            time.sleep(0.2)

    def _start_munge(self) -> None:
        """Use the machine's munge if it runs, else one as its own user, for the time being."""
        if _output("munge", "-n"):
            return
        key = Path("/etc/munge/munge.key")
        if not key.is_file():
            key.write_bytes(secrets.token_bytes(1024))
            shutil.chown(key, "munge", "munge")
            key.chmod(0o400)
        run = Path("/run/munge")
        run.mkdir(mode=0o755, exist_ok=True)
        shutil.chown(run, "munge", "munge")
        command = ["munged", "--foreground"]
        quiet = subprocess.DEVNULL
        self.munged = subprocess.Popen(command, user="munge", group="munge", stderr=quiet)
        deadline = time.monotonic() + 20
        while not _output("munge", "-n"):
            if time.monotonic() > deadline:
                raise CannotRunError("munged does not come up")
            time.sleep(0.1)

    def start_node(self, node: str) -> None:
        _output("slurmd", "-N", node, check=True)

    def kill_node(self, node: str, jobs: list[str]) -> None:
        """Take a node down as a power cut does: its daemon, then all that its jobs started."""
        _kill(int((self.folder / f"slurmd-{node}.pid").read_text()))
        for step in psutil.process_iter(["cmdline"]):
            line = " ".join(step.info["cmdline"] or [])
            if any(line.startswith(f"slurmstepd: [{job}.") for job in jobs):
                children = step.children(recursive=True)
                _kill(step.pid)
                for child in children:
                    _kill(child.pid)

    def stop(self) -> None:
        """End all jobs and daemons."""
        with suppress(subprocess.SubprocessError, OSError):
            _output("scancel", "--user=root")
            deadline = time.monotonic() + 15
            while _output("squeue", "-h") and time.monotonic() < deadline:
                time.sleep(0.5)
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld"):
            with suppress(OSError, ValueError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGTERM)
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                ours = process.environ().get("SLURM_CONF") == str(self.configuration)
                if ours and "SLURM_JOB_ID" in process.environ():
                    process.kill()
        if self.munged is not None:
            self.munged.terminate()
            self.munged.wait()


def _free_ports(count: int) -> int:
    """Return the first of some free ports in a row."""
    for first in range(26817, 28817, count):
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
    raise CannotRunError("no free ports")


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _output(*command: str, check: bool = False) -> str:
    """Run a command; daemons put themselves into the background and keep stdout open."""
    with tempfile.TemporaryFile("w+") as out:
        subprocess.run(command, stdout=out, stderr=subprocess.DEVNULL, timeout=60, check=check)
        out.seek(0)
        return out.read().strip()

"""A real Slurm of three virtual nodes on one machine: loopback only, no systemd, no database.

It needs no root, and nothing of the machine but the programs.
"""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

NODES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
"""Names that every machine can resolve, for torchrun goes to the first node by its name."""
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "munged", "munge")
JOBS = 100
"""Ports kept free for torchrun: the scripts choose 20000 + the job's number."""
FIRST_PORT = 21000
MEMORY_GB, DISK_GB = 4, 2

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job may start again only after its credential has run out: 120 s by default.
AuthInfo=cred_expire=5,socket={folder}/munge.socket
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
# Jobs that ended long ago are asked how often they were restarted, on slow machines too.
MinJobAge=86400
SlurmctldTimeout=30
SlurmdTimeout=15
FirstJobId={first_job}
NodeName=127.0.0.[1-3] NodeHostname={host} Port=[{first}-{last}] CPUs=2 RealMemory=6000
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class CannotRunError(Exception):
    """This machine cannot have a Slurm of its own; says why."""


def install() -> None:
    """Install Slurm and munge.

    Raises:
        CannotRunError: there is no apt-get, or it fails.
    """
    if not _missing():
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise CannotRunError("Slurm can be installed only by root, with apt-get")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-qq", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20"]
    packages = ["-y", "--no-install-recommends", "slurm-wlm", "munge"]
    for words in ([*apt, "update"], [*apt, "install", *packages]):
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise CannotRunError(f"{' '.join(words)}: {done.stderr.strip()[-200:]}")


def _missing() -> list[str]:
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def running(folder: Path) -> Iterator["Cluster"]:
    """Start Slurm, and stop it whatever happens.

    Raises:
        CannotRunError: it is not here, or cannot be started.
    """
    missing = _missing()
    if missing:
        raise CannotRunError(f"{', '.join(missing)} not found; --install installs Slurm (Debian)")
    if psutil.virtual_memory().available < MEMORY_GB << 30:
        raise CannotRunError(f"less than {MEMORY_GB} GB of memory are free")
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < DISK_GB << 30:
        raise CannotRunError(f"less than {DISK_GB} GB are free at {folder}")
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH", "SQUEUE"))]:
        del os.environ[name]  # of another cluster, or of a job that we run in
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Cluster:
    """Three nodes of two CPUs; commands find it through ``SLURM_CONF``.

    Nothing outside of its folder is changed: it has a munge and a key of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        self.munged: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        for name in ("state", "spool", "log"):
            (self.folder / name).mkdir(exist_ok=True)
        port = _free_ports(4 + JOBS)
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            user=getpass.getuser(),
            folder=self.folder,
            port=port,
            first=port + 1,
            last=port + 3,
            first_job=port + 4 - 20000,
        )
        self.configuration.write_text(text)
        os.environ["SLURM_CONF"] = str(self.configuration)
        self._start_munge()
        self._start("slurmctld", "-i")
        for node in NODES:
            self.start_node(node)
        self._wait("Slurm", lambda: output("sinfo", "-h", "-o", "%T").split() == ["idle"])

    def _start_munge(self) -> None:
        key, socket_path = self.folder / "munge.key", self.folder / "munge.socket"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        places = {"socket": socket_path, "key-file": key}
        places |= {f"{kind}-file": self.folder / f"munge.{kind}" for kind in ("log", "pid", "seed")}
        command = ["munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in places.items())]
        with (self.folder / "log/munged.log").open("wb") as log:
            self.munged = subprocess.Popen(command, stdout=log, stderr=log)
        self._wait("munged", lambda: output("munge", "-n", "-S", str(socket_path)))

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-N", node)

    def _start(self, *command: str) -> None:
        """Start a daemon; it puts itself into the background."""
        with (self.folder / "log/start.log").open("ab") as log:
            try:
                subprocess.run(command, stdout=log, stderr=log, timeout=60, check=True)
            except subprocess.SubprocessError as error:
                raise CannotRunError(f"{error}{self._says()}") from None

    def _wait(self, what: str, is_up: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not is_up():
            dead = self.munged is not None and self.munged.poll() is not None
            if dead or time.monotonic() > deadline:
                raise CannotRunError(f"{what} does not come up{self._says()}")
            time.sleep(0.1)

    def _says(self) -> str:
        """Return what the logs say of errors."""
        lines = [
            line
            for log in sorted((self.folder / "log").glob("*.log"))
            for line in log.read_text(errors="replace").splitlines()
            if "error:" in line.lower() or "fatal:" in line.lower()
        ]
        return "".join(f"\n  {line}" for line in lines[-5:])

    def kill_node(self, node: str, jobs: list[str]) -> None:
        """Take a node down as a power cut does: its daemon, then all that its jobs started."""
        kill(int((self.folder / f"slurmd-{node}.pid").read_text()))
        for step in psutil.process_iter(["cmdline"]):
            line = " ".join(step.info["cmdline"] or [])
            if any(line.startswith(f"slurmstepd: [{job}.") for job in jobs):
                children = step.children(recursive=True)
                kill(step.pid)
                for child in children:
                    kill(child.pid)

    def stop(self) -> None:
        """End all jobs and daemons."""
        if (self.folder / "slurmctld.pid").exists():
            with suppress(subprocess.SubprocessError, OSError):
                output("scancel", f"--user={getpass.getuser()}")
                deadline = time.monotonic() + 15
                while output("squeue", "-h") and time.monotonic() < deadline:
                    time.sleep(0.5)
        daemons = []
        for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld"):
            with suppress(OSError, ValueError, psutil.Error):
                daemons.append(psutil.Process(int((self.folder / f"{name}.pid").read_text())))
                daemons[-1].terminate()
        deadline = time.monotonic() + 15
        while any(map(_is_alive, daemons)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # whatever has not ended
                is_step = Path(process.cwd()).is_relative_to(self.folder)  # hides its environment
                ours = process.environ().get("SLURM_CONF") == str(self.configuration)
                if (ours or is_step) and process.pid != os.getpid():
                    process.kill()
        if self.munged is not None:
            self.munged.terminate()
            self.munged.wait()


def _free_ports(count: int) -> int:
    """Return the first of some free ports in a row, below those that the kernel gives away."""
    for first in range(FIRST_PORT, 30000, count):
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
    raise CannotRunError(f"no {count} free ports in a row")


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE  # nobody reaps them in a bare container
    return False


def kill(pid: int) -> None:
    """Kill a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()

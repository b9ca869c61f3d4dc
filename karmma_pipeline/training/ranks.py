"""Several processes that train one model together: what they agree on, and who writes.

Started by ``torchrun``, which sets RANK, WORLD_SIZE and the address of the first rank; gloo
carries CPU tensors, NCCL those on GPUs. Without torchrun there is one rank and nothing to do.

The gradient of all parameters is one buffer that is summed over ranks in one call. (Torch's
DistributedDataParallel averages ranks as if each had as many clips, needs every parameter in
every step, and renames them; clips are not divisible, a modality may be absent from a batch,
and these models are small enough that overlapping the sum with the backward pass buys nothing.)
"""

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from karmma_pipeline.errors import ConfigError, KarmmaError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.jobs.batch_system import copies

_logger = logging.getLogger(__name__)

# How long a rank waits for the others before it gives up.
_TIMEOUT = timedelta(hours=1)

# How long it waits for them at the start, when all that they do is to load their libraries.
_MEETING = timedelta(minutes=10)

_ADDRESS = ("RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process's number among all that train together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Read what torchrun says.

        Raises:
            ConfigError: the variables do not fit one another, or this process is one of several
                that were started in another way and know nothing of one another.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        try:
            rank, size, local = (
                int(os.environ.get(n, d)) for n, d in zip(names, "010", strict=True)
            )
        except ValueError as error:
            raise ConfigError(f"{', '.join(names)}: must be numbers ({error}).") from None
        if not 0 <= rank < size:
            raise ConfigError(
                f"RANK={rank}: must be less than WORLD_SIZE={size}; start with torchrun."
            )
        missing = [name for name in _ADDRESS if not os.environ.get(name)]
        if size > 1 and missing:
            raise ConfigError(
                f"WORLD_SIZE={size} without {' and '.join(missing)}: there are other ranks, but "
                "their address is unknown. Start all ranks with torchrun "
                f"(--nproc-per-node={size}), or unset WORLD_SIZE to train in one process."
            )
        if "WORLD_SIZE" not in os.environ and (several := copies()) is not None:
            name, number = several
            raise ConfigError(
                f"{name}={number} without WORLD_SIZE: {number} independent processes of this "
                "training were started. Start one (srun -n 1), or let torchrun start the ranks, "
                "once per node; see train/slurm_nodes.sbatch."
            )
        return cls(rank, size, local)

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, and return it.

        Raises:
            KarmmaError: another rank has ended.
        """
        if self.size > 1:
            with _others_may_end(self.rank):
                dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of ranks; for rare and small things."""
        values = [value] * self.size
        if self.size > 1:
            with _others_may_end(self.rank):
                dist.all_gather_object(values, value)
        return values

    def agree_to_stop(self, stop: StopFlag, counts: Tensor | None = None) -> tuple[bool, Tensor]:
        """Return whether all ranks stop here, because any was asked to, and counts summed.

        One call carries both, so agreeing costs nothing extra. A rank must go by the answer, not
        by its own flag: a signal that comes after the call is heard at the next one.
        """
        counts = torch.zeros(0, dtype=torch.float64) if counts is None else counts
        # Signals reach ranks at different moments; what counts is what all were told in one sum.
        asked = counts.new_tensor([float(stop.requested)])
        both = self.sum(torch.cat([counts, asked]))
        agreed = bool(both[-1] > 0)
        if agreed:
            stop.request()
            with suppress(KarmmaError):  # a rank that left at once would cut the others off mid-sum
                self.sum(torch.zeros_like(asked))
        return agreed, both[:-1]


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, and leave them at the end."""
    ranks = Ranks.from_environment()
    if ranks.size == 1:
        yield ranks
        return
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if ranks.main:
        _logger.info("waiting for %d other ranks", ranks.size - 1)
    # This module keeps the group that is joined when it is first loaded, which an optimiser would
    # do later: the group and its threads would then outlive `destroy_process_group` and be torn
    # down by the interpreter's end, which now and then aborts.
    importlib.import_module("torch.distributed.nn.functional")
    store = _meet(ranks)
    # Both backends: losses and gradients lie on GPUs, counts and flags on the CPU.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        timeout=_TIMEOUT,
        store=store,
        rank=ranks.rank,
        world_size=ranks.size,
    )
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def _meet(ranks: Ranks) -> Any:
    """Return the store by which the ranks find one another, once all have come to it."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = next(rendezvous("env://", timeout=_MEETING))[0]
        store.set(f"karmma/{ranks.rank}", "here")
        store.wait([f"karmma/{rank}" for rank in range(ranks.size)], _MEETING)
    except (RuntimeError, ValueError, OSError) as error:
        raise KarmmaError(
            f"rank {ranks.rank}: {ranks.size} ranks could not connect to "
            f"MASTER_ADDR:MASTER_PORT={where} ({str(error).strip().splitlines()[0][:160]}). "
            "Start all ranks with torchrun, or unset RANK and WORLD_SIZE to train in one "
            "process."
        ) from None
    store.set_timeout(_TIMEOUT)
    return store


@contextmanager
def _others_may_end(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise KarmmaError(
            f"rank {rank}: another rank exited ({reason}); see its message. Run the same "
            "command again to resume."
        ) from None

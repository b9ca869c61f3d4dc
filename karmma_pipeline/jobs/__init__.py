"""What a batch system tells a process: its part of the work, its limits, and when to stop."""

from karmma_pipeline.jobs.batch_system import (
    Part,
    StopFlag,
    balance,
    become_worker,
    cpu_count,
    memory_limit,
)

__all__ = ["Part", "StopFlag", "balance", "become_worker", "cpu_count", "memory_limit"]

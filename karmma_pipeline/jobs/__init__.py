"""What a batch system tells a process: its part of the work, its limits, and when to stop."""

from karmma_pipeline.jobs.limits import cpu_count, memory_limit
from karmma_pipeline.jobs.part import Part, balance
from karmma_pipeline.jobs.stop import STOP_SIGNALS, StopFlag

__all__ = ["STOP_SIGNALS", "Part", "StopFlag", "balance", "cpu_count", "memory_limit"]

"""What a batch system tells a process: its part of the work, its limits, and when to stop."""

from karmma_pipeline.jobs.allocation import Part, balance, cpu_count, memory_limit
from karmma_pipeline.jobs.signals import StopFlag, become_worker

__all__ = ["Part", "StopFlag", "balance", "become_worker", "cpu_count", "memory_limit"]

"""Stands in for the pool of decode processes where those are not what is tested."""

from collections.abc import Iterable, Iterator
from typing import Any

from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.types import BatchPlan, DecodedClip


class HerePool:
    """Decodes in this process: what a decode process survives is tested elsewhere."""

    def __init__(self, settings: Any, *_: Any) -> None:
        self.settings, self.busy_s = settings, 0.0

    def __enter__(self) -> "HerePool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, list[DecodedClip]]]:
        for plan in plans:
            yield plan, [decode_clips([clip], self.settings)[0] for clip in plan.clips]

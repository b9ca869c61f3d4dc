"""What goes wrong inside a file that somebody else made: a reason code and a detail."""

from karmma_pipeline.modalities import Reason


class MediaFaultError(Exception):
    """A stream cannot be had; carries the reason that goes into the store."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.name.lower()}: {detail}")
        self.reason = reason


def first_line(error: BaseException) -> str:
    """Return what a decoder's error says first; the rest is its stack."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

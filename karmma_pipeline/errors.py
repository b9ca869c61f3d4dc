"""What can go wrong in a way that the user can fix, one class per place to look.

Every message is one sentence: where, ``field=value``, what is allowed, what to do.
"""

import enum


class ExitCode(enum.IntEnum):
    """How a ``karmma`` command ends; batch scripts branch on these."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    TOO_MANY_FAILURES = 3
    STOPPED = 75


def one_line(text: object, most: int | None = None) -> str:
    """Return a text, such as an error of a library, on one line of at most so many characters."""
    return " ".join(str(text).split())[:most]


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, such as ``1 clip`` or ``1,204 clips``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def named_line(error: BaseException) -> str:
    """Return an error of somebody else's code on one line, with its class."""
    return one_line(f"{type(error).__name__}: {error}", 300)


class KarmmaError(ValueError):
    """Base class of all errors that the user can fix, such as invalid inputs.

    Attributes:
        exit_code: exit code of ``karmma`` commands with this error.

    Examples:
        >>> try:
        ...     km.load_model("runs/nobody")
        ... except km.KarmmaError as error:
        ...     print(error)
        runs/nobody: no trained model found. Train it first, or choose a run in runs: baseline,
        student, teacher.
    """

    exit_code = ExitCode.FAILED


class ConfigError(KarmmaError):
    """A recipe, an override or an option is wrong."""

    exit_code = ExitCode.USAGE


class ManifestError(KarmmaError):
    """A list of clips, or the labels in it, cannot be used."""


class MediaError(KarmmaError):
    """A video, flow or audio file cannot be read."""


class StoreError(KarmmaError):
    """A feature store is missing, damaged, or made with another recipe."""


class CheckpointError(KarmmaError):
    """A saved model, training state or cached teacher logits cannot be used."""


class TooManyFailuresError(KarmmaError):
    """The work is done, but more clips failed than the recipe allows."""

    exit_code = ExitCode.TOO_MANY_FAILURES


class StoppedError(KarmmaError):
    """A signal asked the command to stop; running it again goes on from there."""

    exit_code = ExitCode.STOPPED

"""One extraction on several devices of this machine: a process with a part of it on each."""

from collections.abc import Callable, Sequence

from karmma_pipeline.batch import local
from karmma_pipeline.batch.local import LocalCommand, last_line
from karmma_pipeline.batch.recipe import Resources, Site
from karmma_pipeline.errors import ConfigError, ExitCode, KarmmaError
from karmma_pipeline.extraction.progress import finish
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.jobs import Part, StopFlag, cpu_count

_CUDA = "cuda:"


def parse_devices(text: str, gpus: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Read ``cuda:0,cuda:1``, or ``all``; return of each its name and the GPUs that it sees.

    A process on a GPU sees no other one: what torch allocates on the first GPU it sees (pinned
    memory, its context) would else fill that of another part.

    Args:
        text: names of devices, split by commas, the same one twice if need be; ``all``: every GPU.
        gpus: of this machine, as ``CUDA_VISIBLE_DEVICES`` names them.

    Raises:
        ConfigError: there is no such device.
    """
    names = [name.strip() for name in text.split(",")]
    if names == ["all"]:
        if not gpus:
            raise ConfigError("--devices all: this machine has no GPU; omit --devices.")
        names = [f"{_CUDA}{number}" for number in range(len(gpus))]
    there = [f"{_CUDA}{number}" for number in range(len(gpus))]
    if unknown := [name for name in names if name not in {"cpu", *there}]:
        raise ConfigError(
            f"--devices {text}: no device {unknown[0]!r} on this machine; available: "
            f"{', '.join(('cpu', *there))}."
        )
    return [
        ("cpu", ()) if name == "cpu" else ("cuda", (gpus[there.index(name)],)) for name in names
    ]


def extract_on(
    text: str,
    recipe: ExtractRecipe,
    words: Sequence[str],
    stop: StopFlag,
    say: Callable[[str], None],
) -> int:
    """Extract on several devices at once and join the stores.

    Args:
        text: see `parse_devices`.
        recipe: of the extraction.
        words: of the command that does all of it, after ``karmma``.
        stop: when to end; what the parts have finished is kept.
        say: told of each part where its log is, and how it failed.

    Returns:
        How many clips lost a modality to an error.

    Raises:
        ConfigError: there is no such device, or this process is one part of several already.
        StoppedError: a stop was asked for.
        KarmmaError: the parts have not done everything; see `finish`.
    """
    if Part.from_environment().count > 1:
        raise ConfigError(
            "--devices: this process already extracts one part of several; omit --devices."
        )
    devices = parse_devices(text, local.devices())
    commands = []
    for index, (name, gpus) in enumerate(devices):
        part = Part(index, len(devices))
        log = recipe.out / f"part{index + 1}.log"
        more = ["--set", f"device={name}", "--part", str(part)]
        commands.append(LocalCommand(str(part), [*words, *more], log, retries=0, gpus=gpus))
        say(f"part {part} on {' '.join((name, *gpus))}: {log}")

    failed: list[str] = []

    def ended(command: LocalCommand, code: int) -> None:
        if not code:
            return
        said = f"{command.log} (exit code {code}) ends with: {last_line(command.log)}"
        failed.append(f"part {command.name}: {said}")
        if code == ExitCode.USAGE:  # it would be the same in all of them
            raise KarmmaError(failed[-1])
        say(failed[-1])

    share = Resources(cpus=max(1, cpu_count() // len(devices)), gpus=0)
    local.run_all(commands, share, len(commands), Site(), stop, ended)
    if failed and not all((recipe.out / name).exists() for name in recipe.sets):
        raise KarmmaError(failed[-1])
    return finish(recipe, len(devices))

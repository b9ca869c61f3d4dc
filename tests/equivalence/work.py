"""The work that both programs do: every kind of result, in few commands."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Commands of karmma that make one folder.

    Attributes:
        writes: the folder.
        commands: their arguments, one after another.
        reads: folders that other steps make.
    """

    name: str
    writes: str
    commands: tuple[tuple[str, ...], ...]
    reads: tuple[str, ...] = ()


def _recipe(command: str, name: str, writes: str, *reads: str) -> Step:
    return Step(name, writes, ((command, f"recipes/{name}.yaml"),), reads)


def steps(real: bool) -> list[Step]:
    """Return all steps in an order in which each comes after what it reads.

    Args:
        real: there are somebody's clips too.
    """
    parts = [("extract", "recipes/parts.yaml", "--part", f"{n}/3") for n in (2, 3, 1)]
    join = ("store", "finalize", "out/parts/own")
    runs = [f"out/runs/{name}" for name in ("teacher", "baseline", "delta", "student")]
    return [
        Step("sample", "out/sample", (("sample", "out/sample", "--clips", "32"),)),
        _recipe("extract", "odd", "out/odd"),
        _recipe("extract", "pictures", "out/pictures"),
        _recipe("extract", "demo", "out/demo", "out/sample"),
        Step("parts", "out/parts", (*parts, join), ("out/sample",)),
        *([_recipe("extract", "real", "out/real")] if real else []),
        _recipe("train-teacher", "teacher", runs[0], "out/demo"),
        _recipe("train-baseline", "baseline", runs[1], "out/demo"),
        _recipe("train-baseline", "delta", runs[2], "out/demo"),
        _recipe("distill", "student", runs[3], "out/demo", runs[0]),
        Step(
            "report",
            "out/report",
            (("evaluate", "--recipe", "recipes/report.yaml"),),
            ("out/demo", *runs),
        ),
        Step("tools", "out/tools", tuple(_tools()), ("out/demo",)),
    ]


def _tools() -> Sequence[tuple[str, ...]]:
    store = ("out/demo/student", "out/tools")
    return [
        ("store", "verify", store[0]),
        (
            "store",
            "convert",
            store[0],
            f"{store[1]}/int8",
            "--dtype",
            "int8",
            "--pool",
            "rgb=1,1,1",
        ),
        ("store", "split", store[0], f"{store[1]}/split", "--by", "split"),
        ("store", "export", store[0], f"{store[1]}/npy", "--layout", "npy"),
    ]


HANDED = ("odd", "student", "parts", "teacher", "demo", "delta")
"""The steps in which the old program is killed, in turn."""

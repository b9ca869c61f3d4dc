"""What a chain of jobs is made of, and the settings of a cluster."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator

from karmma_pipeline.config import Line, Recipe

Command = Literal["extract", "train-teacher", "train-baseline", "distill", "evaluate"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("allowed are 1 to 40 of A-Z a-z 0-9 _ -, first a letter or digit")
    return text


Name = Annotated[str, AfterValidator(_name)]


class Resources(Recipe):
    """Resources of one task of a stage."""

    cpus: PositiveInt = Field(8, description="CPUs of a task; also its number of threads.")
    gpus: int = Field(1, ge=0, description="GPUs of a task (of a node, for several nodes).")
    memory_gb: float = Field(
        32, gt=0, allow_inf_nan=False, description="Memory of a node in GB (2^30 bytes)."
    )
    hours: float = Field(
        4,
        ge=1 / 60,
        allow_inf_nan=False,
        description="Time limit; a task that reaches it is requeued and goes on.",
    )


class Stage(Recipe):
    """One command of the chain; what it waits for follows from the folders in its recipe."""

    command: Command = Field(description="The karmma command.", examples=["extract"])
    recipe: Path = Field(description="Its recipe.", examples=["extract.yaml"])
    overrides: list[Line] = Field(
        default_factory=list, description="As --set: a list of a.b=value."
    )
    array: PositiveInt = Field(
        1, description="Array tasks that extraction is split into, balanced by seconds of video."
    )
    at_once: PositiveInt | None = Field(
        None, description="Array tasks that may run at once; null: all."
    )
    nodes: PositiveInt = Field(
        1, description="Nodes of a training; above 1 it runs as `srun torchrun`, one rank per GPU."
    )
    resources: Resources = Field(Resources(), description="Resources of one task.")

    @model_validator(mode="after")
    def _fits_command(self) -> Self:
        if self.command != "extract" and self.array > 1:
            raise ValueError(f"array={self.array}: only extract is shared out to several tasks")
        if self.command in {"extract", "evaluate"} and self.nodes > 1:
            raise ValueError(f"nodes={self.nodes}: {self.command} takes one node; see array")
        return self

    @property
    def is_array(self) -> bool:
        """Whether the stage is shared out."""
        return self.array > 1


class Chain(Recipe):
    """``karmma submit CHAIN``: stages from videos to the report."""

    name: Name = Field("karmma", description="Prefix of the job names.")
    folder: Path = Field(Path("jobs"), description="Folder for the scripts and logs of the jobs.")
    stages: dict[Name, Stage] = Field(
        min_length=1,
        description="Stages by name; a stage comes after those whose output it reads.",
        examples=[
            {
                "extract": {"command": "extract", "recipe": "extract.yaml", "array": 32},
                "teacher": {"command": "train-teacher", "recipe": "teacher.yaml"},
                "student": {"command": "distill", "recipe": "student.yaml"},
                "report": {"command": "evaluate", "recipe": "evaluate.yaml"},
            }
        ],
    )


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _distinct(values: list[Any]) -> list[Any]:
    if twice := [value for number, value in enumerate(values) if value in values[:number]]:
        raise ValueError(f"{twice[0]!r} stands there twice")
    return values


Values = Annotated[list[Any], Field(min_length=1), AfterValidator(_distinct)]


class Method(Recipe):
    """A training that a sweep repeats with every seed and every point of a grid."""

    command: Literal["train-teacher", "train-baseline", "distill"] = Field(
        description="The karmma command.", examples=["distill"]
    )
    recipe: Path = Field(description="Its recipe.", examples=["student.yaml"])
    name: Line = Field("", description="Name in the report; empty: the recipe's, else this key.")
    set: dict[str, Any] = Field(
        default_factory=dict, description="Keys of the recipe, a.b for those of sections -> value."
    )
    grid: dict[str, Values] = Field(
        default_factory=dict,
        description="Keys of the recipe -> values; every combination is a method of its own,\n"
        "with the settings appended to its name.",
    )
    teacher: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        (),
        description="distill: one method above, or several; the run with seed s learns from that\n"
        "with seed s. Where that one has a grid: the name of one combination.",
    )

    @model_validator(mode="after")
    def _fits_command(self) -> Self:
        if (self.command == "distill") != bool(self.teacher):
            least = (
                "distill needs the methods that teach" if not self.teacher else "only for distill"
            )
            raise ValueError(f"teacher={list(self.teacher)}: {least}")
        taken = {"out", "seed", "name", "teacher", "teacher_store", "teacher_table"}
        if ours := sorted(taken & {*self.set, *self.grid}):
            raise ValueError(f"{ours[0]} is set by the sweep, not in set or grid")
        if both := sorted(self.set.keys() & self.grid.keys()):
            raise ValueError(f"{both[0]} stands in set and in grid")
        return self


class SweepReport(Recipe):
    """The one report over all runs of a sweep."""

    recipe: Path | None = Field(None, description="Recipe of karmma evaluate; null: its defaults.")
    set: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys of that recipe -> value; runs and out are set by the sweep.",
    )


class Sweep(Recipe):
    """``karmma sweep SWEEP``: methods, their settings and seeds, and one report over all runs."""

    name: Name = Field("sweep", description="Prefix of the job names.")
    out: Path = Field(
        Path("sweep"), description="Folder: METHOD/seedS are the runs, `report` the report."
    )
    extract: Path | None = Field(
        None, description="Recipe of the extraction that comes first; null: the stores are there."
    )
    methods: dict[Name, Method] = Field(
        min_length=1,
        description="Methods by name; teachers before their students.",
        examples=[
            {
                "teacher": {"command": "train-teacher", "recipe": "teacher.yaml"},
                "baseline": {"command": "train-baseline", "recipe": "baseline.yaml"},
                "student": {
                    "command": "distill",
                    "recipe": "student.yaml",
                    "teacher": "teacher",
                    "grid": {"alpha": [0.3, 0.5]},
                },
            }
        ],
    )
    seeds: Annotated[list[int], Field(min_length=1), AfterValidator(_distinct)] = Field(
        default_factory=lambda: [0, 1, 2, 3, 4],
        description="Each method is trained once with each seed.",
    )
    evaluate: SweepReport = Field(SweepReport(), description="What the report measures.")
    resources: Resources = Field(
        Resources(cpus=1, gpus=0, memory_gb=8, hours=4),
        description="Of one run. Sums depend on the number of threads, here and on a cluster.",
    )

    @property
    def folder(self) -> Path:
        """Of the logs, and of the scripts of batch jobs."""
        return self.out / "jobs"


class Container(Recipe):
    """An Apptainer image that has `karmma` in it."""

    image: Path = Field(description="The .sif file.", examples=["karmma.sif"])
    binds: list[Line] = Field(
        default_factory=list, description="Folders to show inside, as SRC[:DST[:ro]]."
    )
    program: Name = Field("apptainer", description="apptainer or singularity.")


class Site(Recipe):
    """Settings of a cluster; the same file serves every chain."""

    account: Line | None = Field(None, description="--account.")
    partition: Line | None = Field(None, description="--partition.")
    cpu_partition: Line | None = Field(
        None, description="--partition of tasks without a GPU; null: the same."
    )
    qos: Line | None = Field(None, description="--qos.")
    gpu_option: Line = Field(
        "--gpus-per-node={gpus}",
        description="How GPUs are asked for, such as --gres=gpu:a100:{gpus}.",
    )
    sbatch: list[Line] = Field(
        default_factory=list, description="More options of sbatch, each as --name=value."
    )
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], Line] = Field(
        default_factory=dict, description="Environment variables, such as TORCH_HOME."
    )
    setup: list[Line] = Field(
        default_factory=list,
        description="Shell lines before the command, such as `module load cuda`, as they are.",
    )
    karmma: Line | None = Field(
        None, description="The program; null: the one that submits (inside a container: karmma)."
    )
    container: Container | None = Field(None, description="Run inside an image; null: do not.")
    warning_s: PositiveInt = Field(
        120, description="Seconds before the time limit at which a task is told to save."
    )
    retries: int = Field(
        2, ge=0, description="How often a task that was killed (not stopped) is tried again."
    )

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
        raise ValueError(
            "use 1 to 40 characters of A-Z a-z 0-9 _ -, starting with a letter or digit"
        )
    return text


Name = Annotated[str, AfterValidator(_name)]


class Resources(Recipe):
    """Resources of one task of a stage."""

    cpus: PositiveInt = Field(8, description="CPUs per task; also the number of threads.")
    gpus: int = Field(1, ge=0, description="GPUs per task (per node with several nodes).")
    memory_gb: float = Field(
        32, gt=0, allow_inf_nan=False, description="Memory per node in GB (2^30 bytes)."
    )
    hours: float = Field(
        4,
        ge=1 / 60,
        allow_inf_nan=False,
        description="Time limit; a task that reaches it saves, is requeued and resumes.",
    )


class Stage(Recipe):
    """One command of the chain; what it waits for follows from the folders in its recipe."""

    command: Command = Field(description="The karmma command.", examples=["extract"])
    recipe: Path = Field(description="Its recipe.", examples=["extract.yaml"])
    overrides: list[Line] = Field(
        default_factory=list,
        description="Overrides of the recipe, as with --set: a list of a.b=value.",
    )
    array: PositiveInt = Field(
        1, description="Number of array tasks for an extraction, balanced by seconds of video."
    )
    at_once: PositiveInt | None = Field(
        None, description="Maximum number of array tasks at once; null: no limit."
    )
    nodes: PositiveInt = Field(
        1,
        description="Number of nodes for training; above 1, it runs as `srun torchrun`, "
        "one rank per GPU.",
    )
    resources: Resources = Field(Resources(), description="Resources of one task.")

    @model_validator(mode="after")
    def _fits_command(self) -> Self:
        if self.command != "extract" and self.array > 1:
            raise ValueError(f"array={self.array}: only extract can be split into array tasks")
        if self.command in {"extract", "evaluate"} and self.nodes > 1:
            raise ValueError(f"nodes={self.nodes}: {self.command} runs on one node; see array")
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
        description="Stages by name; a stage must come after those whose output it reads.",
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
        raise ValueError(f"{twice[0]!r} is listed twice")
    return values


Values = Annotated[list[Any], Field(min_length=1), AfterValidator(_distinct)]


class Method(Recipe):
    """A training that a sweep repeats with every seed and every point of a grid."""

    command: Literal["train-teacher", "train-baseline", "distill"] = Field(
        description="The karmma command.", examples=["distill"]
    )
    recipe: Path = Field(description="Its recipe.", examples=["student.yaml"])
    name: Line = Field("", description="Name in the report; empty: the recipe's name, or this key.")
    set: dict[str, Any] = Field(
        default_factory=dict,
        description="Overrides of the recipe: key (a.b for keys of sections) -> value.",
    )
    grid: dict[str, Values] = Field(
        default_factory=dict,
        description="Key of the recipe -> list of values; each combination is a separate "
        "method, named with its settings.",
    )
    teacher: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        (),
        description="distill only: one or more methods listed above; the run with seed s is "
        "distilled from their runs with seed s. If a teacher has a grid: the name of one "
        "combination.",
    )

    @model_validator(mode="after")
    def _fits_command(self) -> Self:
        if (self.command == "distill") != bool(self.teacher):
            least = (
                "distill needs at least one teacher method"
                if not self.teacher
                else "only for distill"
            )
            raise ValueError(f"teacher={list(self.teacher)}: {least}")
        taken = {"out", "seed", "name", "teacher", "teacher_store", "teacher_table"}
        if ours := sorted(taken & {*self.set, *self.grid}):
            also = "; set the method's own key name instead" if ours[0] == "name" else ""
            raise ValueError(f"{ours[0]} is set by the sweep and cannot be in set or grid{also}")
        if both := sorted(self.set.keys() & self.grid.keys()):
            raise ValueError(f"{both[0]} is both in set and in grid")
        return self


class SweepReport(Recipe):
    """The one report over all runs of a sweep."""

    recipe: Path | None = Field(None, description="Recipe of karmma evaluate; null: its defaults.")
    set: dict[str, Any] = Field(
        default_factory=dict,
        description="Overrides of that recipe; the sweep sets runs and out.",
    )


class Sweep(Recipe):
    """``karmma sweep SWEEP``: methods, their settings and seeds, and one report over all runs."""

    name: Name = Field("sweep", description="Prefix of the job names.")
    out: Path = Field(
        Path("sweep"),
        description="Output folder; it contains the runs, METHOD/seedS, and the report, `report`.",
    )
    extract: Path | None = Field(
        None, description="Recipe of the extraction to run first; null: the stores exist."
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
    evaluate: SweepReport = Field(SweepReport(), description="Settings of the report.")
    resources: Resources = Field(
        Resources(cpus=1, gpus=0, memory_gb=8, hours=4),
        description="Resources per run. Results depend slightly on the number of threads, "
        "locally and on a cluster.",
    )

    @property
    def folder(self) -> Path:
        """Of the logs, and of the scripts of batch jobs."""
        return self.out / "jobs"


class Container(Recipe):
    """An Apptainer image that has `karmma` in it."""

    image: Path = Field(description="The .sif file.", examples=["karmma.sif"])
    binds: list[Line] = Field(
        default_factory=list, description="Folders to bind, as SRC[:DST[:ro]]."
    )
    program: Name = Field("apptainer", description="apptainer or singularity.")


class Site(Recipe):
    """Settings of a cluster; the same file serves every chain."""

    account: Line | None = Field(None, description="--account.")
    partition: Line | None = Field(None, description="--partition.")
    cpu_partition: Line | None = Field(
        None, description="Partition for tasks without a GPU; null: same as partition."
    )
    qos: Line | None = Field(None, description="--qos.")
    gpu_option: Line = Field(
        "--gpus-per-node={gpus}",
        description="Option that requests GPUs, such as --gres=gpu:a100:{gpus}.",
    )
    sbatch: list[Line] = Field(
        default_factory=list, description="Additional sbatch options, each as --name=value."
    )
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], Line] = Field(
        default_factory=dict, description="Environment variables, such as TORCH_HOME."
    )
    setup: list[Line] = Field(
        default_factory=list,
        description="Shell lines to run before the command, such as `module load cuda`.",
    )
    karmma: Line | None = Field(
        None,
        description="Path of the karmma program; null: the one that runs karmma submit (in a "
        "container: karmma).",
    )
    container: Container | None = Field(None, description="Run in a container; null: no container.")
    warning_s: PositiveInt = Field(
        120, description="Seconds before the time limit at which a task is signalled to save."
    )
    retries: int = Field(
        2, ge=0, description="Maximum number of retries of a task that was killed."
    )

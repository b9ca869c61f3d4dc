"""What a chain of jobs is made of, and the settings of a cluster."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from karmma_pipeline.config import Recipe

Command = Literal["extract", "train-teacher", "train-baseline", "distill", "evaluate"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError("allowed are 1 to 40 of A-Z a-z 0-9 _ -, first a letter or digit")
    return text


def _line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line of printable text")
    return text


Name = Annotated[str, AfterValidator(_name)]
Line = Annotated[str, AfterValidator(_line)]


class Resources(Recipe):
    """What one task of a stage asks for."""

    cpus: PositiveInt = Field(8, description="CPUs of a task; also its number of threads.")
    gpus: int = Field(1, ge=0, description="GPUs of a task (of a node, for several nodes).")
    memory_gb: float = Field(32, gt=0, description="Memory of a node in GB (2^30 bytes).")
    hours: float = Field(
        4, ge=1 / 60, description="Time limit; a task that reaches it is requeued and goes on."
    )


class Stage(Recipe):
    """One command of the chain; what it waits for follows from the folders in its recipe."""

    command: Command = Field(description="The karmma command.", examples=["extract"])
    recipe: Path = Field(description="Its recipe.", examples=["extract.yaml"])
    overrides: list[Line] = Field(
        default_factory=list, description="As --set: a list of a.b=value."
    )
    array: PositiveInt = Field(
        1, description="Tasks among which extraction shares out its shards, by seconds of video."
    )
    at_once: PositiveInt | None = Field(None, description="Tasks that may run together; null: all.")
    nodes: PositiveInt = Field(
        1, description="Nodes of a training; above 1 it runs as `srun torchrun`, one rank per GPU."
    )
    resources: Resources = Field(Resources(), description="What one task asks for.")

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

    name: Name = Field("karmma", description="Opens the names of the jobs.")
    folder: Path = Field(Path("jobs"), description="Folder for the scripts and logs of the jobs.")
    stages: dict[Name, Stage] = Field(
        min_length=1,
        description="Name to stage, in any order that has inputs before outputs.",
        examples=[
            {
                "extract": {"command": "extract", "recipe": "extract.yaml", "array": 32},
                "teacher": {"command": "train-teacher", "recipe": "teacher.yaml"},
                "student": {"command": "distill", "recipe": "student.yaml"},
                "report": {"command": "evaluate", "recipe": "evaluate.yaml"},
            }
        ],
    )


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

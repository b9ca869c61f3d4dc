"""The recipes of training. What the paper does not publish is a default of ours, marked (ours)."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from karmma_pipeline.config import Recipe
from karmma_pipeline.data.loader import LoaderSettings
from karmma_pipeline.models.fusion import FusionSize


class Optimiser(Recipe):
    """AdamW with a linear warm-up and a cosine decay to zero."""

    lr: float = Field(1e-4, gt=0, description="Peak learning rate (ours).")
    weight_decay: float = Field(0.05, ge=0, description="Decay of matrices (ours).")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's moments.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of all steps that warm up (ours).")
    clip_norm: float = Field(5.0, gt=0, description="Largest norm of the gradient (ours).")


class TrainRecipe(Recipe):
    """What all trainings share."""

    store: Path | tuple[Path, ...] = Field(
        description="Feature store; several are trained on as one (clips meet by id).",
        examples=["features/student"],
    )
    loader: LoaderSettings = Field(LoaderSettings(), description="How tokens reach the model.")
    out: Path = Field(description="Run folder.", examples=["runs/student"])
    name: str = Field("", description="Name in legends; empty: the run folder's name.")
    train_split: str = Field("train", description="Clips to learn from.")
    val_split: str = Field("val", description="Clips that choose the best epoch.")
    size: FusionSize = Field(FusionSize(), description="Fusion model.")
    optimiser: Optimiser = Field(Optimiser(), description="How weights move.")
    epochs: int = Field(30, gt=0, description="Passes over the training clips (ours).")
    batch_size: int = Field(64, gt=0, description="Clips of a step (ours).")
    modality_dropout: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="delta: probability with which each present modality is dropped in training;\n"
        "one of the present ones always stays (ours).",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Of the cross-entropy.")
    standardise: bool = Field(
        True, description="Scale features by mean and deviation over the training clips."
    )
    seed: int = Field(0, description="Of initial weights, order, masks and dropout.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast on GPUs, float32 elsewhere."
    )


class TeacherRecipe(TrainRecipe):
    """`karmma train-teacher`: cross-entropy under modality dropout."""

    size: FusionSize = Field(
        FusionSize(dim=768, layers=2, attention_heads=12, ffn_width=768, head_width=1536),
        description="Fusion model; the default is the paper's teacher.",
    )


class BaselineRecipe(TrainRecipe):
    """`karmma train-baseline`: the student's architecture without a teacher.

    Baseline: size.absent zeros, modality_dropout 0. Baseline w/ delta: size.absent learned,
    modality_dropout above 0.
    """


class DistillRecipe(TrainRecipe):
    """`karmma distill`: the student follows the teacher under the same masks.

    loss = alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy, both softened
    by the temperature T in the KL alone; each term is the mean over heads, KL per clip
    (batchmean).
    """

    teacher: Path = Field(description="Run folder of the teacher.", examples=["runs/teacher"])
    teacher_store: Path = Field(
        description="The store that the teacher was trained on.", examples=["features/teacher"]
    )
    alpha: float = Field(0.5, ge=0, le=1, description="Weight of the KL term (ours).")
    temperature: float = Field(1.0, gt=0, description="T; the KL carries T^2 (ours).")

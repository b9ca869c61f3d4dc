"""The recipes of training. Defaults that the paper does not publish are marked."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from karmma_pipeline import own_code
from karmma_pipeline.config import Line, Recipe
from karmma_pipeline.data.loading.dropout import ModalityDropout
from karmma_pipeline.data.loading.settings import LoaderSettings
from karmma_pipeline.models.size import MODELS, FusionSize

#: One store, or several that are read as one.
Store = Path | Annotated[tuple[Path, ...], Field(min_length=1)]
#: What PyTorch takes.
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimiser(Recipe):
    """AdamW with a linear warm-up and a cosine decay to zero."""

    lr: float = Field(
        1e-4, gt=0, allow_inf_nan=False, description="Peak learning rate (not from the paper)."
    )
    weight_decay: float = Field(
        0.05, ge=0, description="Weight decay of weight matrices (not from the paper)."
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW's betas.")
    warmup: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Fraction of all steps with linear warm-up (not from the paper).",
    )
    clip_norm: float = Field(
        5.0,
        gt=0,
        description="Gradient norm above which gradients are clipped (not from the paper).",
    )


class SuffixSettings(Recipe):
    """How the parts of backbones behind a `cut` train; see docs/cut.md."""

    FREE = frozenset({"weights", "save_memory"})

    lr: float = Field(
        1e-5,
        ge=0,
        description="Peak learning rate of the suffixes, with the schedule of optimiser.lr "
        "(not from the paper); 0 freezes them.",
    )
    freeze_norm: bool = Field(
        True, description="Freeze batch norms: statistics, scale and shift (not from the paper)."
    )
    stochastic: bool = Field(
        False,
        description="Enable dropout and stochastic depth of the backbones.",
    )
    crop: float = Field(
        1.0,
        gt=0,
        le=1,
        description="cut: input only: random resized crop of the stored frames; the relative "
        "side of the crop is drawn from [crop, 1] per clip.",
    )
    colour: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="cut: input only: colour jitter of RGB; maximum relative change of "
        "contrast, and maximum change of brightness in units of the normalised frame.",
    )
    flip: bool = Field(
        False,
        description="cut: input only: random horizontal flip; not for classes that "
        "distinguish left and right.",
    )
    jitter: bool = Field(
        True,
        description="cut: input with stored_frames: sample different frames in each epoch; false: "
        "always the middle ones.",
    )
    save_memory: bool = Field(
        False,
        description="Activation checkpointing between the modules of a suffix: less memory, "
        "about a third more time.",
    )
    weights: dict[str, str] = Field(
        {},
        description="Modality -> file of the backbone's weights, if it was moved after the "
        "extraction.",
    )

    @property
    def augments(self) -> bool:
        """Whether pictures are seen in random views."""
        return (self.crop, self.colour, self.flip) != (1.0, 0.0, False)


def _store(example: str) -> Any:
    return Field(
        description="Feature store, or a list of stores to join by clip id.",
        examples=[example],
    )


def _out(example: str) -> Any:
    return Field(description="Run folder.", examples=[example])


class TrainRecipe(Recipe):
    """What all trainings share."""

    OLD_KEYS: ClassVar[dict[str, str]] = {
        "bad_clips": "no longer has an effect and can be removed: NaN or infinite tokens now "
        "stop the training with an error that lists the clips",
    }
    FREE = frozenset({"store", "out", "name", "exclude", "init_from", "save_every_s", "device"})
    SETTLED = frozenset({"precision"})

    store: Store = _store("features/student")
    loader: LoaderSettings = Field(LoaderSettings(), description="Settings of the data loader.")
    out: Path = _out("runs/student")
    name: Line = Field("", description="Name in legends; empty: the name of the run folder.")
    train_split: str = Field("train", description="Split to train on.")
    val_split: str = Field("val", description="Split on which the best epoch is chosen.")
    exclude: Path | None = Field(
        None, description="Text file with ids of clips to exclude from both splits, one per line."
    )
    init_from: Path | None = Field(
        None,
        description="Run folder with initial weights, for longer training, fine-tuning or new "
        "labels. Classes are matched by name; other weights are newly initialised.",
    )
    model: str = Field(
        "",
        description="Model: empty (the fusion model), late_fusion (the average of one model "
        "per modality), or a custom one as package.module:factory.",
    )
    model_args: dict[str, Any] = Field(
        {},
        description="Keyword arguments of the factory; of late_fusion: {average: probabilities}.",
    )
    objective: str = Field(
        "",
        description="Loss: empty (that of the command), or a custom one as "
        "package.module:function.",
    )
    objective_args: dict[str, Any] = Field({}, description="Keyword arguments of that function.")
    size: FusionSize = Field(FusionSize(), description="Fusion model.")
    position_std: float = Field(
        0.02,
        ge=0,
        description="Standard deviation of the initial position embeddings of a fusion model. "
        "They are added to tokens of magnitude 1: small values hide the position of a token "
        "in the clip.",
    )
    optimiser: Optimiser = Field(Optimiser(), description="Optimiser.")
    suffix: SuffixSettings = Field(
        SuffixSettings(),
        description="Training of backbone suffixes, if the stores were extracted with a cut.",
    )
    epochs: int = Field(30, gt=0, description="Number of epochs (not from the paper).")
    batch_size: int = Field(
        64,
        gt=0,
        description="Clips per optimiser step, summed over ranks and accumulation steps "
        "(not from the paper).",
    )
    accumulate: int = Field(
        1,
        gt=0,
        description="Gradient accumulation steps per batch: less memory, same update.",
    )
    modality_dropout: ModalityDropout = Field(
        0.3,
        description="delta: probability of dropping each present modality in training; at "
        "least one is always kept (not from the paper). Or a schedule: {rate: 0.3 or {rgb: 0.1}, "
        "ramp_epochs: 10, ramp_from: 0.0, burst: 8}, or {patterns: FILE.csv}.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Label smoothing of the cross-entropy."
    )
    class_balance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Class-balanced sampling: an epoch draws clips of class y in proportion "
        "to 1 / (clips of y)^b, averaged over heads. 0: each clip once; 1: uniform over "
        "classes.",
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay per step of the moving average of the weights (EMA). Above 0, the "
        "average is validated and saved.",
    )
    select_by: str = Field(
        "action_top1",
        description="Validation metric that selects the best epoch: action_top1, HEAD_top1, "
        "loss, or epoch (the last one). Ties are resolved by the loss.",
    )
    patience: int = Field(
        0,
        ge=0,
        description="Early stopping after this number of epochs without improvement of "
        "`select_by`; 0: never.",
    )
    standardise: bool = Field(
        True,
        description="Standardise features by their mean and standard deviation over the "
        "training clips.",
    )
    save_every_s: float = Field(
        300.0,
        ge=0,
        description="Seconds between training states saved within an epoch; 0: every step.",
    )
    seed: Seed = Field(0, description="Seed of initial weights, order of clips, masks and dropout.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: bfloat16 autocast on GPUs, float32 on CPUs; a run keeps the "
        "precision it started with.",
    )

    @property
    def draws(self) -> bool:
        """Whether a training step draws random numbers, besides masks and order."""
        behind = self.suffix
        return bool(self.size.dropout or self.own or behind.stochastic or behind.augments)

    @property
    def own(self) -> dict[str, str]:
        """The key that names code of one's own, to the name."""
        names = {"model": self.model, "objective": self.objective, "absent": self.size.absent}
        return {key: name for key, name in names.items() if own_code.is_own(name)}

    @field_validator("model")
    @classmethod
    def _known_model(cls, name: str) -> str:
        return own_code.check_name(name, MODELS)

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, name: str) -> str:
        return own_code.check_name(name, ("",))

    @model_validator(mode="after")
    def _arguments_of_something(self) -> "TrainRecipe":
        for key in ("model", "objective"):
            if getattr(self, f"{key}_args") and not getattr(self, key):
                raise ValueError(f"{key}_args={getattr(self, f'{key}_args')!r} without {key}")
        return self


class TeacherRecipe(TrainRecipe):
    """`karmma train-teacher`: cross-entropy under modality dropout."""

    store: Store = _store("features/teacher")
    out: Path = _out("runs/teacher")
    size: FusionSize = Field(
        FusionSize(dim=768, layers=2, attention_heads=12, ffn_width=768, head_width=1536),
        description="Fusion model; the default is the paper's teacher.",
    )


class BaselineRecipe(TrainRecipe):
    """`karmma train-baseline`: the student's architecture without a teacher.

    Baseline: size.absent zeros, modality_dropout 0. Baseline w/ delta: size.absent learned,
    modality_dropout above 0.
    """

    out: Path = _out("runs/baseline")


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | Path) else value


#: One path, or a list of them.
Paths = Annotated[tuple[Path, ...], BeforeValidator(_as_tuple), Field(min_length=1)]

#: One store, or a list of them; each may be a list of stores that are read as one.
Stores = Annotated[tuple[Store, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class DistillRecipe(TrainRecipe):
    """`karmma distill`: the student follows the teacher under the same masks.

    loss = alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy, both softened
    by the temperature T in the KL alone; each term is the mean over heads, KL per clip
    (batchmean).
    """

    FREE = TrainRecipe.FREE | {"teacher", "teacher_store", "teacher_table", "allow_unfinished"}

    teacher: Paths = Field(
        description="Run folder of the teacher, or a list for several teachers.",
        examples=["runs/teacher"],
    )
    teacher_store: Stores = Field(
        description="Feature store of the teacher: one for all teachers, or one per teacher. "
        "For a teacher trained on joined stores, use a nested list: [[rgb, audio]].",
        examples=["features/teacher"],
    )
    allow_unfinished: bool = Field(
        False,
        description="Allow a teacher whose training has not finished; its best epoch "
        "so far is used.",
    )
    teacher_weights: tuple[float, ...] = Field(
        (), description="Weight of each teacher in the average; empty: equal weights."
    )
    teacher_average: Literal["probabilities", "logits"] = Field(
        "probabilities",
        description="What is averaged over several teachers: softened probabilities, or logits.",
    )
    teacher_table: Path | None = Field(
        None,
        description="Folder for the cached teacher logits, which runs can share; null: in `out`.",
    )
    alpha: float = Field(0.5, ge=0, le=1, description="Weight of the KL term (not from the paper).")
    temperature: float = Field(
        1.0,
        gt=0,
        description="Temperature T of both softmaxes in the KL term, scaled by T^2 "
        "(not from the paper).",
    )
    kl_clips: Literal["all", "right", "better"] = Field(
        "all",
        description="Clips that contribute to the KL term, per head and mask. all: all clips; "
        "right: clips that the teacher classifies correctly; better: clips whose label gets a "
        "higher probability from the teacher than from the student. The mean is over all clips; "
        "clips without a label always contribute.",
    )
    cross_fitted: bool = Field(
        False,
        description="Do not use a teacher for clips that it was trained on. Needs several "
        "teachers, each trained without a part of the clips (`exclude`).",
    )

    @model_validator(mode="after")
    def _one_store_each(self) -> "DistillRecipe":
        count = len(self.teacher)
        if not all(self.teacher_store) or len(self.teacher_store) not in {1, count}:
            raise ValueError(
                f"teacher_store names {len(self.teacher_store)} stores for {count} teachers; "
                "give one for all, or one per teacher"
            )
        if self.teacher_weights and (
            len(self.teacher_weights) != count
            or min(self.teacher_weights) < 0
            or not sum(self.teacher_weights) > 0
        ):
            raise ValueError(
                f"teacher_weights={self.teacher_weights}: give one non-negative weight per "
                f"teacher ({count}), not all 0"
            )
        return self

"""The recipes of training. What the paper does not publish is a default of ours, marked (ours)."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from karmma_pipeline import own_code
from karmma_pipeline.config import Recipe
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

    lr: float = Field(1e-4, gt=0, description="Peak learning rate (ours).")
    weight_decay: float = Field(0.05, ge=0, description="Weight decay of weight matrices (ours).")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="AdamW's betas.")
    warmup: float = Field(
        0.1, ge=0, lt=1, description="Fraction of all steps with linear warm-up (ours)."
    )
    clip_norm: float = Field(
        5.0, gt=0, description="Gradient norm above which gradients are clipped (ours)."
    )


class SuffixSettings(Recipe):
    """How the parts of backbones behind a `cut` train; see docs/cut.md."""

    FREE = frozenset({"weights", "save_memory"})

    lr: float = Field(
        1e-5,
        ge=0,
        description="Peak learning rate, on the schedule of optimiser.lr (ours); 0 freezes them.",
    )
    freeze_norm: bool = Field(
        True, description="Batch norms keep their statistics, scale and shift (ours)."
    )
    stochastic: bool = Field(
        False,
        description="Dropout and stochastic depth of the networks act as in their own training.",
    )
    crop: float = Field(
        1.0,
        gt=0,
        le=1,
        description="cut: input: the part of stored pictures that training sees has a side from\n"
        "this to 1, drawn for each clip, and is brought to the network's size.",
    )
    colour: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="cut: input: contrast of RGB changes by up to this share, brightness by up to\n"
        "this in units of the normalised picture.",
    )
    flip: bool = Field(
        False,
        description="cut: input: half of the clips are mirrored; not where left and right matter.",
    )
    jitter: bool = Field(
        True,
        description="cut: input: where a set stores more frames than its network takes\n"
        "(stored_frames), other ones in each epoch; false: always the middle ones.",
    )
    save_memory: bool = Field(
        False,
        description="Keep only what lies between the modules of a suffix for the backward pass\n"
        "and compute the rest again: less memory, about a third more time.",
    )
    weights: dict[str, str] = Field(
        {},
        description="Modality to the file of its network's weights, if it has moved since the\n"
        "extraction.",
    )

    @property
    def augments(self) -> bool:
        """Whether pictures are seen in random views."""
        return (self.crop, self.colour, self.flip) != (1.0, 0.0, False)


def _store(example: str) -> Any:
    return Field(
        description="Feature store; several are joined by clip id and trained on as one.",
        examples=[example],
    )


def _out(example: str) -> Any:
    return Field(description="Run folder.", examples=[example])


class TrainRecipe(Recipe):
    """What all trainings share."""

    OLD_KEYS: ClassVar[dict[str, str]] = {
        "bad_clips": "has no effect any more and can go: clips with NaN or infinite tokens stop a "
        "training, which names them and says what to do",
    }
    FREE = frozenset({"store", "out", "name", "exclude", "init_from", "save_every_s", "device"})
    SETTLED = frozenset({"precision"})

    store: Store = _store("features/student")
    loader: LoaderSettings = Field(LoaderSettings(), description="Loading of tokens.")
    out: Path = _out("runs/student")
    name: str = Field("", description="Name in legends; empty: the run folder's name.")
    train_split: str = Field("train", description="Split to train on.")
    val_split: str = Field("val", description="Split on which the best epoch is chosen.")
    exclude: Path | None = Field(
        None, description="Text file with one clip id per line: clips to leave out of both splits."
    )
    init_from: Path | None = Field(
        None,
        description="Run folder whose weights training starts from: for longer training,\n"
        "fine-tuning or new labels. Classes are matched by name; weights without a match start\n"
        "afresh.",
    )
    model: str = Field(
        "",
        description="Model: empty (the fusion model), late_fusion (one model per modality,\n"
        "averaged), or your own as package.module:factory.",
    )
    model_args: dict[str, Any] = Field(
        {},
        description="Keyword arguments of the factory; of late_fusion: {average: probabilities}.",
    )
    objective: str = Field(
        "",
        description="Loss: empty (the command's own), or your own as package.module:function.",
    )
    objective_args: dict[str, Any] = Field({}, description="Keyword arguments of that function.")
    size: FusionSize = Field(FusionSize(), description="Fusion model.")
    position_std: float = Field(
        0.02,
        ge=0,
        description="Deviation of a fusion model's position tokens when training begins. They are\n"
        "added to tokens of about 1: small ones hide where in the clip a token lies.",
    )
    optimiser: Optimiser = Field(Optimiser(), description="Optimiser.")
    suffix: SuffixSettings = Field(
        SuffixSettings(),
        description="Parts of backbones that train with the model, where a set's choice has a cut.",
    )
    epochs: int = Field(30, gt=0, description="Passes over the training clips (ours).")
    batch_size: int = Field(
        64,
        gt=0,
        description="Clips per optimiser step, over all ranks and accumulated parts (ours).",
    )
    accumulate: int = Field(
        1,
        gt=0,
        description="Gradient accumulation: parts in which a batch passes through the network;\n"
        "the step is that of the whole batch, the memory that of a part.",
    )
    modality_dropout: ModalityDropout = Field(
        0.3,
        description="delta: probability with which each present modality is dropped in training;\n"
        "one of the present ones always stays (ours). Or a schedule: {rate: 0.3 or {rgb: 0.1},\n"
        "ramp_epochs: 10, ramp_from: 0.0, burst: 8}, or {patterns: FILE.csv}.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Label smoothing of the cross-entropy."
    )
    class_balance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="b: an epoch draws a clip of class y in proportion to 1 / (clips of y)^b,\n"
        "averaged over heads; 0 takes each clip once, 1 makes classes equally frequent.",
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay per step of the moving average of the weights; above 0, the average\n"
        "is what is validated and saved as best and last.",
    )
    select_by: str = Field(
        "action_top1",
        description="Validation metric that chooses the best epoch: action_top1, HEAD_top1, loss,\n"
        "or epoch (the last one). Ties go to the lower loss.",
    )
    patience: int = Field(
        0,
        ge=0,
        description="Early stopping: epochs without improvement of `select_by` after which\n"
        "training ends; 0: train all epochs.",
    )
    standardise: bool = Field(
        True,
        description="Standardise features by their mean and deviation over the training clips.",
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
        description="auto: bfloat16 autocast on GPUs, float32 elsewhere; a run keeps the\n"
        "precision that it started with.",
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
        description="Run folder of the teacher, or a list of them.", examples=["runs/teacher"]
    )
    teacher_store: Stores = Field(
        description="Feature store of the teacher: one for all teachers, or one for each. Stores\n"
        "that a teacher was trained on as one are a nested list: [[rgb, audio]].",
        examples=["features/teacher"],
    )
    allow_unfinished: bool = Field(
        False, description="Use the best epoch so far of a teacher whose training has not finished."
    )
    teacher_weights: tuple[float, ...] = Field(
        (), description="Weight of each teacher in their average; empty: equal weights."
    )
    teacher_average: Literal["probabilities", "logits"] = Field(
        "probabilities",
        description="What is averaged over several teachers: softened probabilities, or logits.",
    )
    teacher_table: Path | None = Field(
        None,
        description="Folder of the teachers' cached logits, may be shared by runs; null: in `out`.",
    )
    alpha: float = Field(0.5, ge=0, le=1, description="Weight of the KL term (ours).")
    temperature: float = Field(
        1.0,
        gt=0,
        description="Temperature T of both softmaxes in the KL term, scaled by T^2 (ours).",
    )
    kl_clips: Literal["all", "right", "better"] = Field(
        "all",
        description="Clips whose KL counts, for each head and under each mask: all; right: those\n"
        "that the teachers answer rightly; better: those to whose label they give more\n"
        "probability than the student does. The mean is over all clips; where a label is\n"
        "unknown, the teachers are believed.",
    )
    cross_fitted: bool = Field(
        False,
        description="Leave a teacher out for the clips that it was trained on: of several, each\n"
        "trained without a part of the clips (`exclude`), those alone teach a clip that never\n"
        "saw it.",
    )

    @model_validator(mode="after")
    def _one_store_each(self) -> "DistillRecipe":
        count = len(self.teacher)
        if not all(self.teacher_store) or len(self.teacher_store) not in {1, count}:
            raise ValueError(
                f"teacher_store names {len(self.teacher_store)} stores for {count} teachers; "
                "give one for all, or one for each"
            )
        if self.teacher_weights and (
            len(self.teacher_weights) != count
            or min(self.teacher_weights) < 0
            or not sum(self.teacher_weights) > 0
        ):
            raise ValueError(
                f"teacher_weights={self.teacher_weights}: give one weight, 0 or more, for each of "
                f"the {count} teachers, not all 0"
            )
        return self

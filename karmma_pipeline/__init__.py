"""KARMMA: egocentric action recognition that stays accurate under missing modalities.

Clips become tokens once (`extract`), tokens become models many times (`train_teacher`, `distill`),
models become tables, pictures and predictions (`evaluate`, `predict`). Paper: arXiv 2504.08578.

The names in ``__all__`` are the public API; modules below this one may change in any release.
Each function is what the ``karmma`` command of its name does. A recipe is the path of a YAML
file, a dict, or a recipe object; keywords set its keys to other values, ``optimiser__lr=3e-4`` the
key ``lr`` of the section ``optimiser``. Relative paths are relative to the working folder. Log
lines go through `logging`, bars are drawn if ``progress`` asks for them. Work that was
interrupted goes on when the same function is called again.

Importing this package loads nothing heavy: torch comes with the first call that needs it.

Examples are run in the folder that ``karmma init project --size tiny`` writes, as `km`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from karmma_pipeline.errors import KarmmaError
    from karmma_pipeline.evaluation.evaluate import EvaluateReport
    from karmma_pipeline.evaluation.predictions import Predictions
    from karmma_pipeline.evaluation.recipe import EvaluateRecipe
    from karmma_pipeline.extraction.recipe import ExtractRecipe
    from karmma_pipeline.extraction.report import ExtractReport
    from karmma_pipeline.models.saved import TrainedModel
    from karmma_pipeline.recognition.recognizer import Recognizer
    from karmma_pipeline.store import FeatureStore, JoinedStore
    from karmma_pipeline.training.progress import TrainReport
    from karmma_pipeline.training.recipe import BaselineRecipe, DistillRecipe, TeacherRecipe

__version__ = "0.1.0"

__all__ = [
    "FeatureStore",
    "KarmmaError",
    "Predictions",
    "Recognizer",
    "TrainedModel",
    "__version__",
    "distill",
    "evaluate",
    "extract",
    "load_model",
    "predict",
    "train_baseline",
    "train_teacher",
]

_CLASSES = {
    "FeatureStore": "karmma_pipeline.store",
    "KarmmaError": "karmma_pipeline.errors",
    "Predictions": "karmma_pipeline.evaluation.predictions",
    "Recognizer": "karmma_pipeline.recognition.recognizer",
    "TrainedModel": "karmma_pipeline.models.saved",
}

# Hidden from type checkers, for which any misspelt name would be there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import a public class when it is first asked for (PEP 562)."""
        if name not in _CLASSES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        globals()[name] = getattr(import_module(_CLASSES[name]), name)
        return globals()[name]


def __dir__() -> list[str]:
    return list(__all__)


def extract(
    recipe: ExtractRecipe | str | Path | Mapping[str, Any],
    *,
    progress: bool = False,
    **changes: Any,
) -> ExtractReport:
    """Turn the clips of a manifest into feature stores, one per backbone set.

    Clips that are done already are not done again. Decoders run in processes that import the script
    which calls this: there, call it under ``if __name__ == "__main__":``.

    Args:
        recipe: path, dict or `ExtractRecipe`.
        progress: draw a bar, in a notebook the notebook's.
        changes: keys of the recipe that get other values.

    Returns:
        What was done: ``stores`` by name, ``clips`` of this call, ``failed``.

    Raises:
        KarmmaError: see the message. `TooManyFailuresError`, one of them: the stores are complete,
            but more clips lost a modality to an error than ``max_failures`` allows.

    Examples:
        >>> report = km.extract("extract.yaml")
        >>> sorted(report.stores), report.complete
        (['student', 'teacher'], True)
    """
    from karmma_pipeline import config, logs
    from karmma_pipeline.extraction.pipeline import extract as run
    from karmma_pipeline.extraction.recipe import ExtractRecipe

    with logs.bars(progress):
        return run(config.resolve(ExtractRecipe, recipe, changes))


def train_teacher(
    recipe: TeacherRecipe | str | Path | Mapping[str, Any],
    *,
    progress: bool = False,
    **changes: Any,
) -> TrainReport:
    """Train the multimodal teacher on cached tokens, with modality dropout (arXiv 2504.08578).

    Args:
        recipe: path, dict or `TeacherRecipe`.
        progress: draw a bar, in a notebook the notebook's.
        changes: keys of the recipe that get other values.

    Returns:
        Where the run lies (``run``), its ``epochs``, and ``best``, the metrics of its best epoch:
        accuracies in percent.

    Raises:
        KarmmaError: see the message.

    Examples:
        >>> report = km.train_teacher("teacher.yaml", epochs=2)
        >>> str(report.run), report.epochs
        ('runs/teacher', 2)
    """
    from karmma_pipeline import config, logs
    from karmma_pipeline.training import stages
    from karmma_pipeline.training.recipe import TeacherRecipe

    with logs.bars(progress):
        return stages.train_teacher(config.resolve(TeacherRecipe, recipe, changes))


def train_baseline(
    recipe: BaselineRecipe | str | Path | Mapping[str, Any],
    *,
    progress: bool = False,
    **changes: Any,
) -> TrainReport:
    """Train the student's architecture without a teacher, the paper's Baseline.

    With ``modality_dropout`` above 0 it is the paper's Baseline w/ delta.

    Args:
        recipe: path, dict or `BaselineRecipe`.
        progress: draw a bar, in a notebook the notebook's.
        changes: keys of the recipe that get other values.

    Returns:
        As `train_teacher`.

    Raises:
        KarmmaError: see the message.

    Examples:
        >>> report = km.train_baseline("baseline.yaml", epochs=2)
        >>> sorted(name for name in report.best if name.endswith("top1"))
        ['val_action_top1', 'val_noun_top1', 'val_verb_top1']
    """
    from karmma_pipeline import config, logs
    from karmma_pipeline.training import stages
    from karmma_pipeline.training.recipe import BaselineRecipe

    with logs.bars(progress):
        return stages.train_baseline(config.resolve(BaselineRecipe, recipe, changes))


def distill(
    recipe: DistillRecipe | str | Path | Mapping[str, Any],
    *,
    progress: bool = False,
    **changes: Any,
) -> TrainReport:
    """Train a student to follow a teacher under the same missing modalities (arXiv 2504.08578).

    Args:
        recipe: path, dict or `DistillRecipe`.
        progress: draw a bar, in a notebook the notebook's.
        changes: keys of the recipe that get other values.

    Returns:
        As `train_teacher`.

    Raises:
        KarmmaError: see the message, such as of a teacher that is not trained yet.

    Examples:
        >>> report = km.distill("student.yaml", epochs=2, optimiser__lr=3e-4)
        >>> str(report.run)
        'runs/student'
    """
    from karmma_pipeline import config, logs
    from karmma_pipeline.training import stages
    from karmma_pipeline.training.recipe import DistillRecipe

    with logs.bars(progress):
        return stages.distill(config.resolve(DistillRecipe, recipe, changes))


def evaluate(
    recipe: EvaluateRecipe | str | Path | Mapping[str, Any] | None = None,
    *,
    progress: bool = False,
    **changes: Any,
) -> EvaluateReport:
    """Measure accuracy on every subset of modalities and under dropout, and write a report.

    Args:
        recipe: path, dict or `EvaluateRecipe`; without it ``runs`` and more are keywords.
        progress: draw a bar, in a notebook the notebook's.
        changes: keys of the recipe that get other values. Without ``stores`` each run is evaluated
            on the store that it was trained on.

    Returns:
        Where the report lies (``folder``), and all its numbers (``results``).

    Raises:
        KarmmaError: see the message.

    Examples:
        >>> report = km.evaluate(runs=["runs/teacher", "runs/student"], out="report", costs=False)
        >>> str(report.folder), [run.name for run in report.results.runs]
        ('report', ['Teacher', 'Student (distilled)'])
    """
    from karmma_pipeline import config, logs
    from karmma_pipeline.evaluation.evaluate import evaluate as run
    from karmma_pipeline.evaluation.recipe import EvaluateRecipe

    with logs.bars(progress):
        return run(config.resolve(EvaluateRecipe, {} if recipe is None else recipe, changes))


def load_model(path: str | Path, *, checkpoint: str = "best") -> TrainedModel:
    """Load a trained model, in evaluation mode and on the CPU. Never runs code of the file.

    Args:
        path: a run, such as ``runs/student``, a folder in it, such as ``runs/student/best``, an
            exported model (`karmma export`), or ``hf:USER/NAME``, the same on the hub.
        checkpoint: which one of a run: ``best`` or ``last``.

    Returns:
        The model; ``network`` is its `torch.nn.Module`, ``card`` says what it takes and gives.

    Raises:
        KarmmaError: no model is there, or it is damaged.

    Examples:
        >>> model = km.load_model("runs/student")
        >>> model.name, model.network.modalities
        ('Student (distilled)', ('rgb', 'flow', 'audio'))
    """
    from karmma_pipeline.models.exported import open_model

    return open_model(path, checkpoint)


def predict(
    model: TrainedModel | str | Path,
    store: FeatureStore | JoinedStore | str | Path,
    *,
    split: str = "",
    without: Collection[str] = (),
    batch_size: int = 64,
    device: str = "auto",
    progress: bool = False,
) -> Predictions:
    """Say what a model takes the clips of a feature store for.

    Classes are matched by name: a store may have other classes than the model, or no labels at all.

    Args:
        model: of `load_model`, or its path.
        store: of `FeatureStore.open`, or its path; its tokens must be made as those that the model
            was trained on.
        split: clips of this split only; empty: every clip.
        without: modalities that the model is not shown, as if their sensors were missing.
        batch_size: clips per forward pass.
        device: auto, cpu, cuda or cuda:N.
        progress: draw a bar, in a notebook the notebook's.

    Returns:
        Logits, labels and masks of the clips; ``top1(head)``, ``to_pandas()``.

    Raises:
        KarmmaError: see the message.

    Examples:
        >>> preds = km.predict("runs/student", "features/student", split="val", without=["audio"])
        >>> preds.modalities, preds.mask.any(axis=0).tolist()
        (('rgb', 'flow', 'audio'), [True, True, False])
        >>> 0 <= preds.top1("verb") <= 100
        True
    """
    from pathlib import Path

    from karmma_pipeline import logs
    from karmma_pipeline.evaluation.predictions import predict_clips
    from karmma_pipeline.models.exported import open_model
    from karmma_pipeline.store import FeatureStore

    if isinstance(model, str | Path):
        model = open_model(model)
    if isinstance(store, str | Path):
        store = FeatureStore.open(store)
    with logs.bars(progress):
        return predict_clips(model, store, split, without, batch_size, device)

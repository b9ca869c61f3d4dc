"""KARMMA: egocentric action recognition that stays accurate under missing modalities.

`extract` converts clips to tokens, once. `train_teacher`, `train_baseline` and `distill` train
models on the tokens; `evaluate` writes a report, `predict` returns predictions. Paper: arXiv
2504.08578.

The public API is ``__all__``; all other modules may change in any release. Each function does what
the ``karmma`` command of that name does. A recipe is the path of a YAML file, a dict or a recipe
object; keyword arguments override its keys, ``optimiser__lr=3e-4`` the key ``lr`` of the section
``optimiser``. Relative paths are relative to the working folder. Messages go through `logging`;
``progress=True`` shows progress bars. Call an interrupted function again to resume it.

Importing this package is fast: torch is imported by the first function that needs it.

Examples assume ``import karmma_pipeline as km`` in a folder of ``karmma init project --size tiny``.
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
    from karmma_pipeline.extraction.progress import ExtractReport
    from karmma_pipeline.extraction.recipe import ExtractRecipe
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

    Clips that are already in the stores are skipped.

    Args:
        recipe: path, dict or `ExtractRecipe`.
        progress: show a progress bar (in notebooks, a widget).
        changes: keys of the recipe to override.

    Returns:
        A report with ``stores`` (name to path), the number of ``clips`` extracted by this call, and
        the number that ``failed``.

    Raises:
        KarmmaError: invalid recipe or inputs; see the message. Its subclass `TooManyFailuresError`:
            the stores are complete, but more clips lost a modality to an error than
            ``max_failures`` allows.

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
        progress: show a progress bar (in notebooks, a widget).
        changes: keys of the recipe to override.

    Returns:
        A report with the folder of the ``run``, the number of ``epochs``, and ``best``, the metrics
        of the best epoch (accuracies in percent).

    Raises:
        KarmmaError: invalid recipe or inputs; see the message.

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

    With ``modality_dropout`` > 0, this is the paper's Baseline w/ delta.

    Args:
        recipe: path, dict or `BaselineRecipe`.
        progress: show a progress bar (in notebooks, a widget).
        changes: keys of the recipe to override.

    Returns:
        As for `train_teacher`.

    Raises:
        KarmmaError: invalid recipe or inputs; see the message.

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
    """Distil a teacher into a student, both under the same missing modalities (arXiv 2504.08578).

    Args:
        recipe: path, dict or `DistillRecipe`.
        progress: show a progress bar (in notebooks, a widget).
        changes: keys of the recipe to override.

    Returns:
        As for `train_teacher`.

    Raises:
        KarmmaError: invalid recipe or inputs, such as an unfinished teacher; see the message.

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
        recipe: path, dict or `EvaluateRecipe`; None: set its keys, such as ``runs``, by keyword.
        progress: show a progress bar (in notebooks, a widget).
        changes: keys of the recipe to override. Without ``stores``, each run is evaluated on the
            store that it was trained on.

    Returns:
        A report with its ``folder`` and all numbers, ``results``.

    Raises:
        KarmmaError: invalid recipe or inputs; see the message.

    Examples:
        >>> runs = ["runs/teacher", "runs/student"]
        >>> report = km.evaluate(runs=runs, out="report", costs=False)
        >>> str(report.folder), [run.name for run in report.results.runs]
        ('report', ['Teacher', 'Student (distilled)'])
    """
    from karmma_pipeline import config, logs
    from karmma_pipeline.evaluation.evaluate import evaluate as run
    from karmma_pipeline.evaluation.recipe import EvaluateRecipe

    with logs.bars(progress):
        return run(config.resolve(EvaluateRecipe, {} if recipe is None else recipe, changes))


def load_model(path: str | Path, *, checkpoint: str = "best") -> TrainedModel:
    """Load a trained model on the CPU, in evaluation mode, without executing code of the file.

    Args:
        path: a run such as ``runs/student``, a checkpoint such as ``runs/student/best``, an
            exported model (`karmma export`), or ``hf:USER/NAME``, an exported model on the hub.
        checkpoint: checkpoint of a run, ``best`` or ``last``.

    Returns:
        The model; ``network`` is its `torch.nn.Module`, ``card`` describes its inputs and outputs.

    Raises:
        KarmmaError: there is no model, or it is damaged.

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
    """Predict the classes of the clips of a feature store.

    Classes are matched by name; a store may have different classes than the model, or no labels.

    Args:
        model: a model of `load_model`, or its path.
        store: a store of `FeatureStore.open`, or its path; extracted with the same settings as the
            training store.
        split: predict the clips of this split; empty: all clips.
        without: modalities to treat as missing.
        batch_size: clips per forward pass.
        device: auto, cpu, cuda or cuda:N.
        progress: show a progress bar (in notebooks, a widget).

    Returns:
        Logits, labels and masks of the clips, with ``top1(head)`` and ``to_pandas()``.

    Raises:
        KarmmaError: invalid recipe or inputs; see the message.

    Examples:
        >>> store = "features/student"
        >>> preds = km.predict("runs/student", store, split="val", without=["audio"])
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

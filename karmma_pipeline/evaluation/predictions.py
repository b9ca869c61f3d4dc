"""What a saved model says of the clips of a store: the result of `karmma_pipeline.predict`.

N clips, M modalities, C classes of a head.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.loading.clips import (
    average_views,
    clips_of_split,
    predict_masked,
    subset_masks,
)
from karmma_pipeline.data.loading.loader import FeatureLoader
from karmma_pipeline.errors import ConfigError, counted
from karmma_pipeline.evaluation.features import view_of
from karmma_pipeline.evaluation.results import metric_names
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.metrics import metric_correct
from karmma_pipeline.models.device import pick_device

if TYPE_CHECKING:
    import pandas

    from karmma_pipeline.models.saved import TrainedModel
    from karmma_pipeline.store import TokenSource

_SHOWN = 10
"""Clips that a notebook shows."""


@dataclass(frozen=True, repr=False)
class Predictions:
    """Predictions of a model for N clips.

    Notebooks display the first clips as a table. A clip without any modality (all are absent or
    excluded) has logits but no predicted class, and counts as wrong, as in `evaluate`.

    Examples:
        >>> preds = km.predict("runs/student", "features/student", split="val")
        >>> preds.logits["verb"].shape == (len(preds), len(preds.heads["verb"]))
        True
        >>> list(preds.to_pandas().columns[:3])
        ['clip_id', 'noun', 'noun_predicted']

    Attributes:
        model: name of the model.
        clip_ids: ids of the clips, in the order of the store.
        heads: head to its C class names.
        logits: head to float32 [N, C], before softmax.
        labels: head to int64 [N], index of the true class, -1 unknown.
        modalities: the columns of `mask`.
        mask: bool [N, M], the modalities used for each clip.
    """

    model: str
    clip_ids: tuple[str, ...]
    heads: dict[str, tuple[str, ...]]
    logits: dict[str, npt.NDArray[np.float32]]
    labels: dict[str, npt.NDArray[np.int64]]
    modalities: tuple[str, ...]
    mask: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.clip_ids)

    def top1(self, head: str | None = None) -> float:
        """Return the top-1 accuracy in percent over the clips with a known label.

        Args:
            head: one of `heads`, or ``action`` (all heads correct). Default: ``action``, or the
                only head.

        Raises:
            ConfigError: there is no such head, or no clip has a known label.
        """
        names = metric_names(self.heads)
        head = names[-1] if head is None else head
        if head not in names:
            raise ConfigError(f"head={head!r}: the model has {', '.join(names)}.")
        heads = [head] if head in self.heads else list(self.heads)
        known = np.stack([self.labels[h] >= 0 for h in heads]).all(axis=0)
        if not known.any():
            raise ConfigError(
                f"head={head!r}: no clip has a label of a class that the model was trained on."
            )
        right = metric_correct(head, self.logits, self.labels, 1)
        return 100 * float((right & self.mask.any(axis=1))[known].mean())

    def classes(self, head: str) -> list[str | None]:
        """Return the predicted class name of each clip; None for clips without any modality.

        Raises:
            ConfigError: there is no such head.
        """
        if head not in self.heads:
            raise ConfigError(f"head={head!r}: the model has {', '.join(self.heads)}.")
        best = self.logits[head].argmax(axis=1).tolist()
        seen: list[bool] = np.asarray(self.mask.any(axis=1)).tolist()
        names = self.heads[head]
        return [names[k] if s else None for k, s in zip(best, seen, strict=True)]

    def to_pandas(self) -> pandas.DataFrame:
        """Return a table with a row per clip: true and predicted class of each head, modalities.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ConfigError("to_pandas needs pandas: pip install pandas.") from None
        return pandas.DataFrame(self._columns())

    def _columns(self, most: int | None = None) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {"clip_id": list(self.clip_ids)}
        for head, names in self.heads.items():
            columns[head] = [names[k] if k >= 0 else None for k in self.labels[head].tolist()]
            columns[f"{head}_predicted"] = self.classes(head)
        columns["modalities"] = [
            " ".join(m for m, s in zip(self.modalities, row, strict=True) if s)
            for row in self.mask.tolist()
        ]
        return {name: values[:most] for name, values in columns.items()}

    def __repr__(self) -> str:
        clips, heads = counted(len(self), "clip"), ", ".join(self.heads)
        return f"<Predictions of {self.model!r}: {clips}, heads {heads}>"

    def _repr_html_(self) -> str:
        """Show the first clips as a table in a notebook; names are untrusted text."""
        columns = self._columns(_SHOWN)
        rows = zip(*columns.values(), strict=True)
        more = f"<p>{counted(len(self) - _SHOWN, 'more clip')}</p>" if len(self) > _SHOWN else ""
        return f"<p>{html.escape(repr(self))}</p>{html_table([*columns], rows)}{more}"


def html_table(header: Sequence[str], rows: Any) -> str:
    """Return an HTML table; cells are escaped, None is an empty cell."""

    def line(cells: Any, tag: str) -> str:
        text = ("" if cell is None else html.escape(str(cell)) for cell in cells)
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in text) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"


def predict_clips(
    model: TrainedModel,
    store: TokenSource,
    split: str,
    without: Collection[str] = (),
    batch_size: int = 64,
    device: str = "auto",
) -> Predictions:
    """Run a model over the clips of a split, with some modalities left out.

    Of a store with views, logits are the mean over a clip's views.

    Raises:
        StoreError: the tokens are not of the kind that the model was trained on.
        ConfigError: ``without`` names a modality that the model does not have, or all of them.
        ManifestError: the split is empty.
    """
    store = view_of(model.card, store, model.name)
    without = {without} if isinstance(without, str) else set(without)
    kept = tuple(m for m in store.modalities if m not in without)
    if unknown := sorted(without - set(model.card.modalities)):
        known = ", ".join(store.modalities)
        raise ConfigError(f"without={unknown[0]!r}: unknown modality; the run has {known}.")
    if not kept:
        raise ConfigError("without: leaves no modality; keep at least one.")
    rows = clips_of_split(store, split)
    clips, V = store.view_rows(rows), store.view_count
    present = store.present[rows].reshape(len(clips), V, -1).any(axis=1)
    on = pick_device(device)
    network = model.network.to(on)
    loader = FeatureLoader(store, rows, max(1, batch_size // V) * V)
    outputs: dict[str, list[npt.NDArray[np.float32]]] = {head: [] for head in model.card.heads}
    answers = predict_masked(network, loader, subset_masks(store, [kept]), on)
    batches = average_views(answers, store)
    for [(_, logits)] in progress_bar(batches, "predict", total=len(loader), unit="batch"):
        for head, parts in outputs.items():
            parts.append(logits[head].numpy())
    left = [m in kept for m in store.modalities]
    return Predictions(
        model=model.name,
        clip_ids=tuple(clip_id.decode() for clip_id in store.names(clips).tolist()),
        heads=dict(model.card.heads),
        logits={head: np.concatenate(parts) for head, parts in outputs.items()},
        labels={head: np.asarray(of[clips], np.int64) for head, of in store.labels.items()},
        modalities=store.modalities,
        mask=np.asarray(present & np.array(left)),
    )

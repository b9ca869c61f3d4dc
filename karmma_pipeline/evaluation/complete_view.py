"""What a run answers with every modality that a clip has: how sure it is, and what it mixes up.

N clips, C classes of a head.
"""

import csv
import io
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from karmma_pipeline.evaluation.drop_curve import Correct
from karmma_pipeline.evaluation.predict import SubsetLogits
from karmma_pipeline.evaluation.results import Bin, Calibration
from karmma_pipeline.metrics import ACTION, softmax
from karmma_pipeline.modalities import NOTHING

Floats = npt.NDArray[np.float64]
BINS = 15
_SHOWN = 5


def confusion(run: SubsetLogits) -> dict[str, tuple[tuple[int, int, int], ...]]:
    """Return class, answer and clips for each pair that occurs; see `RunResult.confusion`."""
    found = {}
    seen = run.present.any(axis=1)
    for head, labels in run.labels.items():
        known = labels >= 0
        answers = np.where(seen, run.logits[head][0].argmax(axis=1), -1)
        pairs = np.stack([labels[known], answers[known]], axis=1)
        unique, counts = np.unique(pairs, axis=0, return_counts=True)
        rows = np.concatenate([unique, counts[:, None]], axis=1).tolist()
        found[head] = tuple((true, answer, count) for true, answer, count in rows)
    return found


def calibration(correct: Correct) -> dict[str, Calibration]:
    """Return how far confidence is from accuracy, over clips with a label and something to see.

    The error is the expected calibration error of Guo et al., ICML 2017 (arXiv 1706.04599), with 15
    bins of equal width.
    """
    run = correct.run
    best = {head: softmax(of[0]).max(axis=1) for head, of in run.logits.items()}
    if ACTION in correct.metrics and ACTION not in best:
        best[ACTION] = np.prod(list(best.values()), axis=0)
    found = {}
    for metric, confidence in best.items():
        rows = correct.known[metric] & correct.seen[0]
        if rows.any():
            found[metric] = _binned(confidence[rows], correct.table[metric, 1][0, rows])
    return found


def _binned(confidence: Floats, right: npt.NDArray[np.bool_]) -> Calibration:
    # A bin is open below and closed above, as in the paper.
    number = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    clips = np.bincount(number, minlength=BINS)
    sums = [np.bincount(number, of, BINS) for of in (confidence, right)]
    mean, share = (np.divide(of, clips, out=np.zeros(BINS), where=clips > 0) for of in sums)
    error = float((clips * abs(mean - share)).sum() / clips.sum())
    rows = zip(clips.tolist(), mean.tolist(), share.tolist(), strict=True)
    bins = tuple(Bin(clips=n, confidence=c, accuracy=a) for n, c, a in rows)
    return Calibration(ece=error, bins=bins)


def best_answers(runs: Iterable[SubsetLogits]) -> str:
    """Return a table of what all runs answer: of each clip and head the five likeliest classes."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    ranks = [name for k in range(1, _SHOWN + 1) for name in (f"top{k}", f"p{k}")]
    writer.writerow(["clip_id", "head", "label", "run", "seed", "seen", *ranks])
    for run in runs:
        modalities = np.array(run.store.modalities)
        seen = ["+".join(modalities[has]) or NOTHING for has in run.present]
        for head in run.logits:
            writer.writerows(_rows(run, head, seen))
    return buffer.getvalue()


def _rows(run: SubsetLogits, head: str, seen: list[str]) -> Iterable[list[str]]:
    names, shares = run.card.heads[head], softmax(run.logits[head][0])
    order = np.argsort(-shares, axis=1, kind="stable")[:, :_SHOWN]
    of_order = np.take_along_axis(shares, order, axis=1)
    seed = run.card.training.get("seed", "")
    about = zip(run.clip_ids, run.labels[head].tolist(), seen, order, of_order, strict=True)
    for clip_id, label, what, classes, share in about:
        truth = names[label] if label >= 0 else ""
        answers = [
            cell for k, p in zip(classes, share, strict=True) for cell in (names[k], f"{p:.4f}")
        ]
        # What a network answers to nothing is what is frequent, not what is there.
        cells = answers if what != NOTHING else []
        yield [clip_id.decode(), head, truth, run.name, seed, what, *cells]

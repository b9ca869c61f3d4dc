"""Files for the EPIC-KITCHENS-100 action recognition challenge and its official evaluator.

Source: github.com/epic-kitchens/C1-Action-Recognition (formats), github.com/epic-kitchens/sls
(supervision levels). Scores are the log-softmax of each clip: the server and the evaluator take the
softmax over all clips at once, which underflows where clips have logits of very different sizes.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import logsumexp

from karmma_pipeline import files
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.evaluation.predict import SubsetLogits
from karmma_pipeline.evaluation.recipe import EpicSubmission

CLASSES = {"verb": 97, "noun": 300}
# Classes of each head that may form an action.
_CANDIDATES = 100
_ROWS = 256

Rows = npt.NDArray[np.float32]


def write_submission(
    folder: Path,
    name: str,
    run: SubsetLogits,
    levels: EpicSubmission,
    groups: Mapping[str, npt.NDArray[np.bool_]],
) -> None:
    """Write ``NAME.zip`` for the server and ``NAME.pt`` for the official evaluator.

    Both hold what the run says with every modality that a clip natively has. Where all clips have
    labels, ``NAME.json`` holds what the evaluator makes of it.

    """
    ids = [clip_id.decode() for clip_id in run.clip_ids]
    # The largest subset comes first.
    verbs, nouns = (_log_softmax(run.logits[head][0]) for head in CLASSES)
    files.write_bytes(folder / f"{name}.zip", _zip(ids, verbs, nouns, levels))
    files.write_bytes(folder / f"{name}.pt", _results(ids, verbs, nouns))
    if all((run.labels[head] >= 0).all() for head in CLASSES):
        numbers = official_accuracy(verbs, nouns, run.labels, groups)
        files.write_json(folder / f"{name}.json", numbers)


def check_label_space(heads: Mapping[str, Sequence[str]]) -> None:
    """Check that a label space is that of EPIC-KITCHENS-100.

    Raises:
        ConfigError: it is another one.
    """
    sizes = {head: len(names) for head, names in heads.items()}
    if sizes != CLASSES:
        raise ConfigError(
            f"submission: the store has the heads and classes {sizes}, but the challenge requires "
            f"{CLASSES} with the official ids; use a store extracted with dataset.kind="
            "epic_kitchens_100."
        )


def _log_softmax(logits: Rows) -> Rows:
    scores = logits.astype(np.float64)
    return np.asarray(scores - logsumexp(scores, axis=1, keepdims=True), np.float32)


def official_accuracy(
    verbs: Rows,
    nouns: Rows,
    labels: Mapping[str, npt.NDArray[np.int64]],
    groups: Mapping[str, npt.NDArray[np.bool_]],
) -> dict[str, float]:
    """Return what the official evaluator gives, under its names, in percent.

    The report ranks equal scores by class id; the evaluator turns numpy's order around, which of
    two equal classes takes the higher id, and of equal actions one that depends on the sort. Models
    in bfloat16 have many equal scores. This is its computation, so that its numbers are these.

    Args:
        verbs: [N, 97], as they are written.
        nouns: [N, 300].
        labels: of ``verb`` and ``noun``, [N].
        groups: such as ``tail_verb`` to bool [N].
    """
    right = {
        "verb": verbs.argsort(axis=1)[:, ::-1][:, :5] == labels["verb"][:, None],
        "noun": nouns.argsort(axis=1)[:, ::-1][:, :5] == labels["noun"][:, None],
        "action": np.concatenate(
            [
                _best_actions(verbs[i : i + _ROWS], nouns[i : i + _ROWS])
                == np.stack([labels[h][i : i + _ROWS] for h in CLASSES], axis=-1)[:, None]
                for i in range(0, len(verbs), _ROWS)
            ]
        ).all(axis=2),
    }
    found = {
        f"all_{task}_accuracy_at_{k}": 100 * float(hits[:, :k].any(axis=1).mean())
        for task, hits in right.items()
        for k in (1, 5)
    }
    for name, members in groups.items():
        task = name.partition("_")[2]
        if members.any():
            found[f"{name}_accuracy_at_1"] = 100 * float(right[task][members, 0].mean())
    return found


def _best_actions(verbs: Rows, nouns: Rows) -> npt.NDArray[np.int64]:
    """Return verb and noun of the five best actions, [rows, 5, 2]."""
    best = [of.argsort(axis=1)[:, ::-1][:, :_CANDIDATES] for of in (verbs, nouns)]
    of_verbs, of_nouns = (
        np.exp(np.take_along_axis(of, order, axis=1))
        for of, order in zip((verbs, nouns), best, strict=True)
    )
    scores = (of_verbs[:, :, None] * of_nouns[:, None]).reshape(len(verbs), -1)
    order = scores.argsort(axis=1)[:, ::-1][:, :5]
    places = np.divmod(order, of_nouns.shape[1])
    pairs = (np.take_along_axis(of, at, axis=1) for of, at in zip(best, places, strict=True))
    return np.stack([*pairs], axis=-1)


def _zip(ids: list[str], verbs: Rows, nouns: Rows, levels: EpicSubmission) -> bytes:
    submission = {
        "version": "0.2",
        "challenge": "action_recognition",
        "sls_pt": levels.pretraining,
        "sls_tl": levels.labels,
        "sls_td": levels.data,
        "results": {
            clip_id: {"verb": _by_class(verb), "noun": _by_class(noun)}
            for clip_id, verb, noun in zip(ids, verbs, nouns, strict=True)
        },
    }
    buffer = io.BytesIO()
    with ZipFile(buffer, "w", ZIP_DEFLATED, compresslevel=5) as archive:
        archive.writestr("test.json", json.dumps(submission))
    return buffer.getvalue()


def _by_class(scores: Rows) -> dict[str, float]:
    return {str(number): float(score) for number, score in enumerate(scores)}


def _results(ids: list[str], verbs: Rows, nouns: Rows) -> bytes:
    scores = zip(ids, torch.from_numpy(verbs), torch.from_numpy(nouns), strict=True)
    rows = [
        {"verb_output": verb, "noun_output": noun, "narration_id": clip_id}
        for clip_id, verb, noun in scores
    ]
    buffer = io.BytesIO()
    torch.save(rows, buffer)
    return buffer.getvalue()

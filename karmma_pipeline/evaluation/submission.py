"""Files for the EPIC-KITCHENS-100 action recognition challenge and its official evaluator.

Source: github.com/epic-kitchens/C1-Action-Recognition (formats), github.com/epic-kitchens/sls
(supervision levels). Scores are raw logits: the server applies the softmax itself.
"""

import io
import json
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import numpy.typing as npt
import torch

from karmma_pipeline import files
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.evaluation.predict import Predictions
from karmma_pipeline.evaluation.recipe import EpicSubmission

CLASSES = {"verb": 97, "noun": 300}

Rows = npt.NDArray[np.float32]


def write_submission(folder: Path, name: str, run: Predictions, levels: EpicSubmission) -> None:
    """Write ``NAME.zip`` for the server and ``NAME.pt`` for the official evaluator.

    Both hold the logits of the run with every modality that a clip natively has.

    Raises:
        ConfigError: the run's label space is not that of EPIC-KITCHENS-100.
    """
    sizes = {head: scores.shape[2] for head, scores in run.logits.items()}
    if sizes != CLASSES:
        raise ConfigError(
            f"submission: run {run.name!r} has the heads and classes {sizes}; the challenge wants "
            f"{CLASSES} with the official ids, which a store made from the official CSV has."
        )
    ids = [clip_id.decode() for clip_id in run.clip_ids]
    verbs, nouns = run.logits["verb"][0], run.logits["noun"][0]  # the largest subset comes first
    files.write_bytes(folder / f"{name}.zip", _zip(ids, verbs, nouns, levels))
    files.write_bytes(folder / f"{name}.pt", _results(ids, verbs, nouns))


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

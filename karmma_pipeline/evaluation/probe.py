"""Linear probes: what a ridge classifier makes of the tokens themselves, beside the fusion models.

A model below the probe of all its modalities has room. Tokens are flattened, so that a weight
belongs to a place and a channel, and standardised over the training clips; a modality that a clip
lacks is the mean. The penalty is the best of a grid on the split that chose the models' epochs.

N clips, D numbers of a clip.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from karmma_pipeline.data.loading.clips import clips_of_split
from karmma_pipeline.errors import ManifestError
from karmma_pipeline.evaluation.predict import SubsetLogits
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.evaluation.results import Probe
from karmma_pipeline.evaluation.score import score
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.metrics import ACTION
from karmma_pipeline.modalities import label
from karmma_pipeline.store import TokenSource

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
PENALTIES = tuple(10.0**power for power in range(-4, 4))
"""What lambda is chosen from, in units of D."""
MOST_BYTES = 2**31
_CHUNK = 256


def probe_all(
    runs: Sequence[SubsetLogits], recipe: EvaluateRecipe, check: Callable[[], None]
) -> tuple[list[Probe], list[str]]:
    """Return the probes of each store that a run stands on, and a line for each left out.

    Args:
        runs: what they answer.
        recipe: which clips are reported.
        check: called before each of many steps, may raise.
    """
    probes: list[Probe] = []
    notes: list[str] = []
    for run in {run.store.digest: run for run in reversed(runs)}.values():
        training = run.card.training
        try:
            clips = [
                run.store.view_rows(clips_of_split(run.store, training[split], recipe.exclude))
                for split in ("train_split", "val_split")
            ]
        except (KeyError, ManifestError):
            notes.append(
                f"{run.store.path} has no clips of the splits that {run.name} was trained on; "
                "no linear probe is trained."
            )
            continue
        modalities = run.store.modalities
        subsets = [(m,) for m in modalities] + ([modalities] if len(modalities) > 1 else [])
        for subset in progress_bar(subsets, "probe", unit="probe"):
            check()
            width = sum(int(np.prod(run.store.shape(m))) for m in subset)
            size = 4 * width * sum(map(len, (*clips, run.clips)))
            if size > MOST_BYTES:
                notes.append(
                    f"{label(subset, modalities)}: no linear probe was trained, because its "
                    f"tokens need {size / 2**30:.1f} GiB of memory (limit: "
                    f"{MOST_BYTES / 2**30:.0f} GiB)."
                )
                continue
            probes += _Data(run, subset, [*clips, run.clips]).probes(check)
    return probes, notes


class _Data:
    """Standardised tokens of some modalities: of training, choosing and reported clips."""

    def __init__(
        self, run: SubsetLogits, subset: tuple[str, ...], clips: list[npt.NDArray[np.int64]]
    ) -> None:
        self.run, self.subset = run, subset
        store = run.store
        columns = [store.modalities.index(m) for m in subset]
        self.seen: list[Bools] = [
            np.asarray(np.any(store.present[of][:, columns], axis=1), bool) for of in clips
        ]
        self.labels = {
            head: [np.asarray(labels[of], np.int64) for of in clips]
            for head, labels in store.labels.items()
        }
        tokens = [_standardised(store, m, clips) for m in subset]
        parts = [np.concatenate(of, axis=1) for of in zip(*tokens, strict=True)]
        self.width = parts[0].shape[1]
        self.tokens = _rotated(parts)

    def probes(self, check: Callable[[], None]) -> Iterator[Probe]:
        """Yield the probe of every head, and of all heads together."""
        every, known = np.ones(len(self.seen[2]), bool), np.ones(len(self.seen[2]), bool)
        trained = 0
        for head, (of_train, of_val, of_test) in self.labels.items():
            check()
            rows = self.seen[0] & (of_train >= 0)
            if len(np.unique(of_train[rows])) < 2 or not (of_val >= 0).any():
                return
            found = [self._fit(rows, of_train, penalty) for penalty in PENALTIES]
            shares = [self._right(answers[0], 1, of_val)[of_val >= 0].mean() for answers in found]
            # Of equal ones the simplest.
            best = max(range(len(PENALTIES)), key=lambda i: (shares[i], i))
            right = self._right(found[best][1], 2, of_test)
            yield self._probe(head, right[of_test >= 0], int(rows.sum()), PENALTIES[best])
            every, known, trained = every & right, known & (of_test >= 0), int(rows.sum())
        if len(self.labels) > 1 and ACTION not in self.labels:
            yield self._probe(ACTION, every[known], trained, None)

    def _fit(
        self, rows: Bools, labels: npt.NDArray[np.int64], penalty: float
    ) -> list[npt.NDArray[np.int64]]:
        """Return the answers to choosing and to reported clips."""
        from sklearn.linear_model import RidgeClassifier

        model = RidgeClassifier(alpha=penalty * self.width, solver="cholesky")
        model.fit(self.tokens[0][rows], labels[rows])
        return [model.predict(tokens) for tokens in self.tokens[1:]]

    def _right(
        self, answers: npt.NDArray[np.int64], part: int, labels: npt.NDArray[np.int64]
    ) -> Bools:
        return np.asarray((answers == labels) & self.seen[part])

    def _probe(self, head: str, right: Bools, clips: int, penalty: float | None) -> Probe:
        training = self.run.card.training
        return Probe(
            store_digest=self.run.store.digest,
            modalities=self.subset,
            head=head,
            clips=clips,
            features=self.width,
            penalty=penalty,
            trained_on=training["train_split"],
            chosen_on=training["val_split"],
            score=score(right),
        )


def _standardised(
    store: TokenSource, modality: str, clips: Sequence[npt.NDArray[np.int64]]
) -> list[Floats]:
    """Return [N, D] for each list of clips; what is absent is 0, the mean of the first list."""
    column = store.modalities.index(modality)
    parts = []
    for of in clips:
        chunks = [
            store.gather(modality, torch.from_numpy(of[i : i + _CHUNK])).float().flatten(1).numpy()
            for i in range(0, len(of), _CHUNK)
        ]
        parts.append(np.concatenate(chunks))
    present = [store.present[of, column] for of in clips]
    some = parts[0][present[0]]
    mean, sd = (some.mean(axis=0), some.std(axis=0)) if len(some) else (0.0, 1.0)
    scale = np.where(np.asarray(sd) > 0, sd, 1.0)
    return [
        np.where(has[:, None], (part - mean) / scale, 0).astype(np.float32)
        for part, has in zip(parts, present, strict=True)
    ]


def _rotated(parts: list[Floats]) -> list[npt.NDArray[np.float64]]:
    """Return the same clips in fewer numbers, if there are more numbers than training clips.

    Ridge sees only what lies in the space that the training clips span. In a basis of it, by the
    eigenvectors of their inner products (the dual form), every penalty gives the same answers.
    """
    train = parts[0]
    if train.shape[1] <= len(train):
        return [part.astype(np.float64) for part in parts]
    inner = train.astype(np.float64) @ train.T.astype(np.float64)
    values, vectors = np.linalg.eigh(inner)
    kept = values > 1e-10 * values.max()
    basis = train.T.astype(np.float64) @ (vectors[:, kept] / np.sqrt(values[kept]))
    return [part @ basis for part in parts]

"""What a model says of raw video against what an evaluation says of the cached tokens.

By hand, in a folder that ``karmma demo`` made:
``PYTHONPATH=.:tests python -m support.agreement runs/student features/student clips/manifest.csv``.
"""

import argparse
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import karmma_pipeline as km
from karmma_pipeline.data.manifest import read_manifest
from karmma_pipeline.extraction.inference.networks import Computed
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import label, subsets
from karmma_pipeline.recognition.prediction import Dropout
from karmma_pipeline.recognition.recognizer import Recognizer


@dataclass(frozen=True)
class Agreement:
    """How far the logits of one subset are from the evaluation's, over all clips and heads.

    rounded, unrounded: largest difference with tokens as the store keeps them, and as they are.
    turned: answers with another best class though the best two lie further apart than twice
        ``unrounded``; close: answers whose best two do not, and which are not looked at.
    """

    subset: tuple[str, ...]
    clips: int
    rounded: float
    unrounded: float
    turned: int
    close: int

    def sentence(self) -> str:
        return (
            f"{label(self.subset)}: {self.clips} clips, logits within {self.rounded:.1e} rounded, "
            f"{self.unrounded:.1e} unrounded; {self.turned} answers turned, {self.close} too close"
        )


def agreement(
    run: Path, store: Path, manifest: Path, most: int, workers: int, split: str = "val"
) -> list[Agreement]:
    """Compare on a split, or all clips if there is none of this name, with every subset."""
    trained = km.load_model(run)
    features = km.FeatureStore.open(store)
    split = split if (features.split == split).any() else ""
    cached = km.predict(trained, features, split=split, device="cpu")
    wanted = cached.clip_ids[:most]
    by_id = {clip.clip_id: clip for clip in read_manifest(manifest).clips}
    clips = [by_id[clip_id] for clip_id in wanted]
    rounded = Recognizer.load(run, "cpu")
    plain = rounded.card.model_copy(update={"dtypes": {}})
    unrounded = Recognizer(rounded.model, plain, rounded.networks)
    with ExitStack() as stack:
        # As `Recognizer.predict` does; the networks' tokens are those of all subsets.
        batches = rounded._batches(stack, clips, workers, StopFlag())
        computed = list(rounded._computed(stack, batches, StopFlag()))
    found = []
    for subset in subsets(rounded.modalities):
        without = tuple(m for m in rounded.modalities if m not in subset)
        cached = km.predict(trained, features, split=split, without=without, device="cpu")
        of_cache = {head: logits[: len(clips)] for head, logits in cached.logits.items()}
        here = cached.mask[: len(clips)].any(axis=1)
        seen = cached.mask[: len(clips)]
        near = said(rounded, computed, without, seen)
        far = said(unrounded, computed, without, seen)
        apart = max(float(np.abs(far[h] - of_cache[h])[here].max()) for h in of_cache)
        turned = close = 0
        for head, logits in of_cache.items():
            first, second = np.sort(logits[here], axis=1)[:, :-3:-1].T
            clear = first - second > 2 * apart
            other = far[head][here].argmax(axis=1) != logits[here].argmax(axis=1)
            turned, close = turned + int((other & clear).sum()), close + int((~clear).sum())
        differences = [float(np.abs(near[h] - of_cache[h])[here].max()) for h in of_cache]
        found.append(Agreement(subset, len(clips), max(differences), apart, turned, close))
    return found


def said(
    recognizer: Recognizer,
    computed: list[Computed],
    without: tuple[str, ...],
    seen: npt.NDArray[np.bool_],
) -> dict[str, npt.NDArray[np.float32]]:
    """Return the logits of clips, head to [N, C]; NaN where there was nothing to see."""
    heads = {head: len(names) for head, names in recognizer.card.heads.items()}
    dropout = Dropout(without)
    answers = [one for batch in computed for one in recognizer._answers(batch, dropout)]
    assert [[*one.mask.values()] for one in answers] == seen.tolist()
    return {
        head: np.stack([one.logits.get(head, np.full(c, np.nan, np.float32)) for one in answers])
        for head, c in heads.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "store", "manifest"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--split", default="val")
    given = parser.parse_args()
    wanted = given.clips, given.workers, given.split
    for one in agreement(given.run, given.store, given.manifest, *wanted):
        print(one.sentence())


if __name__ == "__main__":
    main()

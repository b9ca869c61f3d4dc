"""Robustness beyond modalities that drop out independently of one another.

- One modality is missing for a share of the clips (the protocol of MiDl, arXiv 2404.15161), or what
  a list says is missing for each clip. Both follow from the subsets that are evaluated anyway.
- A stale sensor: for a share of the clips a modality's tokens are those of the clip before, as when
  a sensor hangs and its last value is repeated. This takes a pass per modality.

Which clips are hit depends on the seed, the clip's id and the modality alone: all runs are hit on
the same ones, and those of a smaller share are among those of a larger one.

N clips, M modalities.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from karmma_pipeline.data.loading.clips import averaged
from karmma_pipeline.data.loading.dropout import read_patterns
from karmma_pipeline.data.loading.masks import clip_keys, draws
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.evaluation.drop_curve import Bools, Correct
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.evaluation.results import Robustness, RobustnessPoint
from karmma_pipeline.evaluation.score import score
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.metrics import metric_correct
from karmma_pipeline.modalities import ALL_SUBSETS_UP_TO
from karmma_pipeline.models.fusion import TokenModel
from karmma_pipeline.models.saved import load_model
from karmma_pipeline.runs import saved_folder
from karmma_pipeline.store import TokenSource
from karmma_pipeline.store.spec import ClipNumbers

_STREAM = 1009  # of draws, one more for each modality: no other use of the seed has it


def robustness(
    correct: Correct,
    folder: Path,
    recipe: EvaluateRecipe,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Robustness]:
    """Yield what becomes of a run's accuracy in each test that the recipe asks for.

    Args:
        correct: what the run answers.
        folder: of the run.
        recipe: with the tests, the seed and the batch size.
        device: where the run's model runs.
        check: called before each pass of a batch, may raise.
    """
    tests = recipe.robustness
    if tests is None:
        return
    modalities = correct.run.store.modalities
    for modality in modalities if tests.missing else ():
        under = _without(correct, modality)
        points = _points(correct, under, modality, tests.missing, recipe.seed)
        yield Robustness(kind="missing", what=modality, points=tuple(points))
    for name, path in tests.patterns.items():
        under, hit = _pattern(correct, path)
        point = _point(correct, under, hit, float(hit.mean()))
        yield Robustness(kind="pattern", what=name, points=(point,))
    if not tests.stale:
        return
    model = load_model(saved_folder(folder, recipe.checkpoint))[0].to(device)
    for modality in modalities:
        under = _stale(correct, model, modality, recipe, check)
        points = _points(correct, under, modality, tests.stale, recipe.seed)
        yield Robustness(kind="stale", what=modality, points=tuple(points))


def _points(
    correct: Correct, under: dict[str, Bools], modality: str, shares: list[float], seed: int
) -> Iterator[RobustnessPoint]:
    """Yield the scores for each share of the clips that is hit: those with the lowest draws."""
    keys = clip_keys(correct.run.clip_ids)
    stream = _STREAM + correct.run.store.modalities.index(modality)
    rank = np.argsort(np.argsort(draws(seed, 0, keys, stream), kind="stable"))
    for share in shares:
        yield _point(correct, under, rank < round(share * len(keys)), share)


def _point(correct: Correct, under: dict[str, Bools], hit: Bools, share: float) -> RobustnessPoint:
    """Return the scores where some clips are answered as ``under`` says, the others as ever."""
    right = {metric: np.where(hit, under[metric], correct.table[metric, 1][0]) for metric in under}
    return RobustnessPoint(
        share=share,
        hit=int(hit.sum()),
        scores={f"{metric}_top1": score(of[correct.known[metric]]) for metric, of in right.items()},
    )


def _without(correct: Correct, modality: str) -> dict[str, Bools]:
    """Return what is right, metric to bool [N], where no clip has a modality."""
    left = tuple(m for m in correct.run.store.modalities if m != modality)
    if left not in correct.run.subsets:  # it is the only one: nothing is left to see
        return {metric: np.zeros(len(correct.run.clips), bool) for metric in correct.metrics}
    number = correct.run.subsets.index(left)
    return {metric: correct.table[metric, 1][number] for metric in correct.metrics}


def _pattern(correct: Correct, path: Path) -> tuple[dict[str, Bools], Bools]:
    """Return what is right where clips lack what a list says, and which clips it hits, [N]."""
    run = correct.run
    missing = lacking(path, run.store, run.clips)
    kept = run.present & ~missing
    number, rows = correct.subset_number(kept), np.arange(len(kept))
    seen = kept.any(axis=1)
    under = {m: correct.table[m, 1][number, rows] & seen for m in correct.metrics}
    return under, np.asarray(missing.any(axis=1))


def lacking(path: Path, store: TokenSource, clips: ClipNumbers) -> Bools:
    """Return which modalities clips lack by a list, bool [N, M]; those it does not name lack none.

    Raises:
        ConfigError: the list cannot be read, names a clip or modality that the store does not have,
            or epochs; or the store has so many modalities that not all subsets are evaluated.
    """
    if len(store.modalities) > ALL_SUBSETS_UP_TO:
        raise ConfigError(
            f"robustness.patterns={str(path)!r}: patterns need the logits of every subset, and all "
            f"subsets are evaluated only with up to {ALL_SUBSETS_UP_TO} modalities; {store.path} "
            f"has {len(store.modalities)}."
        )
    patterns = read_patterns(path, store, "robustness.patterns")
    if epochs := [epoch for epoch in patterns if epoch]:
        raise ConfigError(
            f"{path}: epoch={epochs[0]}: an evaluation has no epochs; leave it empty."
        )
    every = np.ones(len(store.modalities), bool)
    left = [patterns.get(0, {}).get(name.decode(), every) for name in store.names(clips).tolist()]
    return ~np.stack(left)


def before(
    clips: npt.NDArray[np.int64], groups: npt.NDArray[np.str_], has: Bools
) -> npt.NDArray[np.int64]:
    """Return the place in the store of the clip before each, [N]; -1 where there is none.

    It is the last one before it in the store's order that is of the same group and has the
    modality.

    Args:
        clips: places in the store [N], in any order.
        groups: such as the subject or the video of each [N].
        has: whether each has the modality [N].
    """
    previous = np.full(len(clips), -1, np.int64)
    last: dict[str, int] = {}
    for row in np.argsort(clips):
        previous[row] = last.get(str(groups[row]), -1)
        if has[row]:
            last[str(groups[row])] = int(clips[row])
    return previous


def _stale(
    correct: Correct,
    model: TokenModel,
    modality: str,
    recipe: EvaluateRecipe,
    check: Callable[[], None],
) -> dict[str, Bools]:
    """Return what is right, metric to bool [N], where a modality's tokens are the clip's before.

    Where there is no clip before, the sensor has sent nothing yet: the modality is absent. Clips
    that natively lack it go without it as ever.
    """
    run, column = correct.run, correct.run.store.modalities.index(modality)
    device = next(model.parameters()).device
    previous = before(run.clips, run.store.group[run.clips], run.present[:, column])
    mask = run.present.copy()
    mask[:, column] &= previous >= 0
    outputs: dict[str, list[npt.NDArray[np.float32]]] = {head: [] for head in run.logits}
    V = run.store.view_count
    views = np.arange(V) - run.store.middle_view  # where a clip's rows lie, from its middle one
    size = max(1, recipe.batch_size // V)
    starts = range(0, len(run.clips), size)
    for start in progress_bar(starts, f"stale {modality}, {run.name}", unit="batch"):
        check()
        rows = slice(start, start + size)
        shown = dict.fromkeys(run.store.modalities, run.clips[rows])
        shown[modality] = np.where(mask[rows, column], previous[rows], run.clips[rows])
        index = {m: (of[:, None] + views).ravel() for m, of in shown.items()}
        here = [run.store.present[of, c] for c, of in enumerate(index.values())]
        seen = torch.from_numpy(np.repeat(mask[rows], V, axis=0) & np.stack(here, axis=1))
        with torch.inference_mode():
            tokens = {
                m: run.store.gather(m, torch.from_numpy(of)).to(device) for m, of in index.items()
            }
            logits = {head: out.float().cpu() for head, out in model(tokens, seen).items()}
            for head, out in averaged(seen, logits, V)[1].items():
                outputs[head].append(out.numpy())
    found = {head: np.concatenate(parts) for head, parts in outputs.items()}
    said = mask.any(axis=1)
    return {
        metric: said & metric_correct(metric, found, run.labels, 1) for metric in correct.metrics
    }

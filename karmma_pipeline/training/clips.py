"""The clips of a training: which, in what order, and the mean and deviation of their tokens.

N clips in an epoch.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.data.loading.clips import ClipModality, clips_of_split, non_finite_error
from karmma_pipeline.data.loading.dropout import make_masks
from karmma_pipeline.data.loading.loader import FeatureLoader
from karmma_pipeline.data.loading.masks import FRAMES, ORDER, VIEW, clip_keys, draws
from karmma_pipeline.errors import ConfigError, ManifestError, counted
from karmma_pipeline.metrics import ACTION
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.fusion import TokenModel
from karmma_pipeline.store import TokenSource
from karmma_pipeline.store.spec import ClipNumbers
from karmma_pipeline.training.ranks import Ranks
from karmma_pipeline.training.recipe import DistillRecipe, TrainRecipe

NEW_FOLDER = (
    "Then train in a new folder (--set out=FOLDER), since the clips of a run cannot change."
)

Labels = Mapping[str, npt.NDArray[np.integer]]

# Streams of `draws` that are ours.
_OFFSET, _LINE = 2**32 + 2, 2**32 + 3

# Clips over which mean and deviation are measured, and how many of them are in memory at once.
_CLIPS, _AT_ONCE = 2048, 64


def usable_clips(
    recipe: TrainRecipe, store: TokenSource, split: str, middle: bool = False
) -> np.ndarray:
    """Return the clips of a split that are not excluded and have at least one modality.

    With views, all rows of clips that have one in every view, or in the ``middle`` one.

    Raises:
        ManifestError: there are none.
        ConfigError: the list of excluded clips is wrong.
    """
    clips = clips_of_split(store, split, recipe.exclude)
    seen = store.present[clips].any(axis=1)
    views = seen.reshape(-1, store.view_count)
    seen = views[:, store.middle_view] if middle else views.all(axis=1)
    seen = np.repeat(seen, store.view_count)
    clips = clips[seen]
    if not len(clips):
        raise ManifestError(
            f"{store.path}: no clip of split={split!r} has any modality; see `karmma store "
            "info` and failures.csv for the reasons."
        )
    return clips


def describe(store: TokenSource, every: np.ndarray, clips: np.ndarray) -> str:
    """Say how many clips have what, and why the others do not; ``clips`` have anything at all."""
    reasons = np.asarray(store.reasons)[every]
    parts = []
    for column, modality in enumerate(store.modalities):
        counts = Counter(reasons[:, column].tolist())
        here = counts.pop(Reason.PRESENT, 0)
        why = ", ".join(f"{Reason(c).label} {n}" for c, n in sorted(counts.items()))
        parts.append(f"{modality} {here}{f' (absent: {why})' if why else ''}")
    without = len(reasons) - len(clips)
    left_out = f"; {without} without any modality, not used" if without else ""
    views = f" ({store.view_count} views of each)" if store.views else ""
    number = counted(len(reasons) // store.view_count, "clip")
    return f"{number}{views}; {'; '.join(parts)}{left_out}"


def check_recipe(recipe: TrainRecipe, store: TokenSource) -> None:
    """Check what a recipe asks of a store, as its training will, but now.

    Raises:
        ConfigError: a list or `select_by` names what the store does not have.
        ManifestError: a split lacks clips or labels.
    """
    train = usable_clips(recipe, store, recipe.train_split)
    val = usable_clips(recipe, store, recipe.val_split, middle=True)
    for _ in check_labels(recipe, store, train, val):
        pass  # what a reader should know, its log will say
    make_masks(recipe.modality_dropout, recipe.seed, store, store.view_rows(train, 0))


def check_labels(
    recipe: TrainRecipe,
    store: TokenSource,
    train: npt.NDArray[np.int64],
    val: npt.NDArray[np.int64],
) -> Iterator[str]:
    """Check that there is something to learn and to choose by; yield what a reader should know.

    Raises:
        ManifestError: no training clip has a label, or no validation clip has those that
            `select_by` needs.
        ConfigError: `select_by` names no metric.
    """
    train, val = store.view_rows(train, 0), store.view_rows(val, 0)
    labels = {head: np.asarray(of) for head, of in store.labels.items()}
    if not any((of[train] >= 0).any() for of in labels.values()) and _needs_labels(recipe):
        raise ManifestError(
            f"{store.path}: no clip of train_split={recipe.train_split!r} has a label; choose "
            "another split, or label the clips."
        )
    known = {f"{head}_top1": bool((of[val] >= 0).any()) for head, of in labels.items()}
    every = np.logical_and.reduce([of[val] >= 0 for of in labels.values()])
    known |= {"action_top1": bool(every.any()), "loss": any(known.values()), "epoch": True}
    if recipe.select_by not in known:
        raise ConfigError(f"select_by={recipe.select_by!r}: must be one of {', '.join(known)}.")
    if not known[recipe.select_by]:
        raise ManifestError(
            f"{store.path}: no clip of val_split={recipe.val_split!r} has the labels that "
            f"select_by={recipe.select_by!r} requires; set select_by to one of "
            f"{', '.join(name for name, defined in known.items() if defined)}."
        )
    for head, names in store.heads.items():
        yield from _never_seen(head, names, labels[head][train], labels[head][val])


def _needs_labels(recipe: TrainRecipe) -> bool:
    if recipe.objective:
        return False  # it may learn from anything
    return not (isinstance(recipe, DistillRecipe) and recipe.alpha == 1)


def _never_seen(
    head: str, names: Sequence[str], train: npt.NDArray[np.int32], val: npt.NDArray[np.int32]
) -> Iterator[str]:
    """Say which classes no training clip has, and how many validation clips ask for them."""
    never = np.bincount(train[train >= 0], minlength=len(names)) == 0
    if never.any():
        some = ", ".join(names[i] for i in np.flatnonzero(never)[:5])
        more = ", ..." if never.sum() > 5 else ""
        asked = int(never[val[val >= 0]].sum())
        yield (
            f"{head}: {int(never.sum())} of {counted(len(names), 'class', 'classes')} without a "
            f"training clip ({some}{more}); {counted(asked, 'validation clip')} of these classes"
        )


def unseen_labels(store: TokenSource, clips: npt.NDArray[np.int64]) -> dict[str, int]:
    """Count the labels, per head and of the action, of clips that have no modality at all.

    With views, ``clips`` hold all rows, and the middle ones are looked at.
    """
    clips = store.view_rows(clips)
    nothing = clips[~store.present[clips].any(axis=1)]
    known = {head: np.asarray(of)[nothing] >= 0 for head, of in store.labels.items()}
    known[ACTION] = np.logical_and.reduce([*known.values()])
    return {name: int(of.sum()) for name, of in known.items()}


def make_loaders(
    recipe: TrainRecipe,
    store: TokenSource,
    train: np.ndarray,
    val: np.ndarray,
    device: torch.device,
    ranks: Ranks,
) -> tuple[FeatureLoader, FeatureLoader]:
    """Return the loaders of training clips, shuffled and masked, and of validation clips.

    With views, ``train`` and ``val`` hold all rows of their clips: an epoch trains on a view of
    each that is drawn for it, and is validated on the middle ones.
    """
    order, rows = None, None
    if store.views is not None:
        train, val = store.view_rows(train, 0), store.view_rows(val)
        rows = drawn_views(recipe.seed, store, train)
    if recipe.class_balance:
        keys = clip_keys(store.names(train))
        labels = {head: of[train] for head, of in store.labels.items()}
        order = balanced_order(keys, labels, recipe.class_balance, recipe.seed)
    shared: dict[str, Any] = {
        "rank": ranks.rank,
        "world_size": ranks.size,
        "pin": device.type == "cuda",
        "threads": recipe.loader.threads,
        "ahead": recipe.loader.ahead,
    }
    return (
        FeatureLoader(
            store,
            train,
            recipe.batch_size,
            seed=recipe.seed,
            draw_masks=make_masks(recipe.modality_dropout, recipe.seed, store, train, rows),
            shuffle=True,
            order=order,
            rows=rows,
            frames=drawn_frames(recipe.seed, store, train) if recipe.suffix.jitter else None,
            **shared,
        ),
        FeatureLoader(store, val, recipe.batch_size, **shared),
    )


def drawn_views(seed: int, store: TokenSource, clips: ClipNumbers) -> Callable[[int], ClipNumbers]:
    """Return the function that draws the views of an epoch: its number to a row for each clip.

    A pure function of (seed, epoch, clip), as masks are.

    Args:
        seed: of the run.
        store: with views.
        clips: the row of the first view of each clip.
    """
    V, keys = np.uint64(store.view_count), clip_keys(store.names(clips))
    return lambda epoch: clips + (draws(seed, epoch, keys, VIEW) % V).astype(np.int64)


def drawn_frames(
    seed: int, store: TokenSource, clips: ClipNumbers
) -> Callable[[int], dict[str, ClipNumbers]] | None:
    """Return the function that draws which stored frames an epoch takes, see `FeatureLoader`.

    A pure function of (seed, epoch, clip). Modalities with as many windows share a draw, so that
    the flow of a clip is that of its pictures. None where no more are stored than are taken.
    """
    every = {m: store.specs[m].windows for m in store.modalities}
    windows = {m: of for m, of in every.items() if len(of) > 1}
    keys = clip_keys(store.names(clips))

    def frames(epoch: int) -> dict[str, ClipNumbers]:
        words = draws(seed, epoch, keys, FRAMES)
        return {m: of[(words % np.uint64(len(of))).astype(np.int64)] for m, of in windows.items()}

    return frames if windows else None


def balanced_order(
    keys: npt.NDArray[np.uint64], labels: Labels, power: float, seed: int
) -> Callable[[int], ClipNumbers]:
    """Return the function that draws an epoch: its number to the N places of clips.

    A clip weighs w = mean over heads of n(y)^-power, n(y) being how many of the N clips have its
    label y (heads without a label are left out). It comes N * w / sum(w) times on average: in
    each epoch that number rounded down or up (systematic sampling), so that chance adds as
    little as it can. A pure function of (seed, epoch, clips), as masks are.

    Args:
        keys: uint64 [N] from `clip_keys`.
        labels: head to int [N], -1 where unknown.
        power: 0 (each clip once) to 1 (classes equally frequent).
        seed: of the run.
    """
    share = _weights(labels, power, len(keys))
    share *= len(keys) / share.sum()

    def order(epoch: int) -> ClipNumbers:
        # Clips lie on a line in an order drawn for this epoch, each as long as its share, and
        # every whole number from a drawn offset on takes the clip that it falls into.
        line = np.argsort(draws(seed, epoch, keys, _LINE), kind="stable")
        offset = float(draws(seed, epoch, keys[:1], _OFFSET)[0] >> np.uint64(11)) * 2.0**-53
        ends = np.cumsum(share[line])
        points = np.arange(len(keys)) + offset
        hits = np.searchsorted(ends, points, side="right").clip(max=len(keys) - 1)
        places = np.sort(line[hits])
        # Copies of one clip get draws of their own, or they would stand side by side.
        copy = np.arange(len(places)) - np.searchsorted(places, places)
        words = draws(seed, epoch, keys[places] + copy.astype(np.uint64), ORDER)
        return places[np.argsort(words, kind="stable")]

    return order


def _weights(labels: Labels, power: float, count: int) -> npt.NDArray[np.float64]:
    total, heads = np.zeros(count), np.zeros(count)
    for of in labels.values():
        known = of >= 0
        n = np.bincount(of[known], minlength=1)
        total[known] += n[of[known]].astype(np.float64) ** -power
        heads += known
    weights = np.divide(total, heads, out=np.zeros(count), where=heads > 0)
    labelled = heads > 0
    weights[~labelled] = weights[labelled].mean() if labelled.any() else 1.0
    return weights


def standardise(model: TokenModel, store: TokenSource, clips: ClipNumbers) -> None:
    """Set the model's standardization from (up to 2048, evenly spread) clips of the store.

    Raises:
        StoreError: clips have tokens that are NaN or infinite; they are named.
    """
    for column, m in enumerate(store.modalities):
        chosen = _chosen(store, column, clips)
        if (moments := _moments(model, store, m, chosen)) is not None:
            mean, std = moments
            floor = 1e-3 * std.mean().clamp(min=1e-6)  # channels that hardly move stay small
            model.standardise(m, mean.float(), torch.maximum(std, floor).float())


def set_means(model: TokenModel, store: TokenSource, clips: ClipNumbers) -> None:
    """Set the mean tokens that a model needs for absent modalities, from the same clips.

    Raises:
        StoreError: clips have tokens that are NaN or infinite; they are named.
    """
    for column, m in enumerate(store.modalities):
        chosen = _chosen(store, column, clips)
        total = torch.zeros((), dtype=torch.float64)
        for index in _pieces(chosen):
            total = total + _features(model, store, m, index).sum(dim=0).cpu()
        if not bool(total.isfinite().all()):
            raise non_finite_error(store, _bad_clips(store, m, chosen), NEW_FOLDER)
        model.set_mean(m, (total / max(1, len(chosen))).float())


def _chosen(store: TokenSource, column: int, clips: ClipNumbers) -> ClipNumbers:
    """Return up to 2048 clips, evenly spread over those that have a modality."""
    present = clips[store.present[clips, column]]
    return present[:: max(1, len(present) // _CLIPS)]


@torch.inference_mode()
def _features(model: TokenModel, store: TokenSource, modality: str, index: Tensor) -> Tensor:
    """Return the tokens [B, N, D] of some clips as the model begins, float64."""
    return model.features(modality, store.gather(modality, index)).double()


def _moments(
    model: TokenModel, store: TokenSource, modality: str, clips: ClipNumbers
) -> tuple[Tensor, Tensor] | None:
    """Return mean and deviation over tokens, [width], in two passes that need little memory."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index in _pieces(clips):
        tokens = _features(model, store, modality, index).flatten(0, 1)
        total, count = total + tokens.sum(dim=0), count + len(tokens)
    if count < 2:
        return None
    if not bool(total.isfinite().all()):  # a sum of finite tokens in float64 cannot overflow
        raise non_finite_error(store, _bad_clips(store, modality, clips), NEW_FOLDER)
    # The second pass: sums of squares of what lies far from zero would lose their last digits.
    mean, squares = total / count, torch.zeros((), dtype=torch.float64)
    for index in _pieces(clips):
        tokens = _features(model, store, modality, index).flatten(0, 1)
        squares = squares + (tokens - mean).square().sum(dim=0)
    return mean, (squares / (count - 1)).sqrt()


def _pieces(clips: ClipNumbers) -> Iterator[Tensor]:
    for start in range(0, len(clips), _AT_ONCE):
        yield torch.from_numpy(clips[start : start + _AT_ONCE])


def _bad_clips(store: TokenSource, modality: str, clips: ClipNumbers) -> list[ClipModality]:
    bad: list[ClipModality] = []
    for index in _pieces(clips):
        finite = store.gather(modality, index).isfinite().flatten(1).all(dim=1)
        bad += [(store.clip_ids[i].decode(), modality) for i in index[~finite].tolist()]
    return bad

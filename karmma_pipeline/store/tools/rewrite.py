"""New stores out of old ones: merged, split, in another type, pooled to fewer tokens.

All of them go through the shard writer: they can be stopped at any moment, go on when run
again, and end with the same bytes. Clips are read and written a few at a time.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from karmma_pipeline.errors import StoreError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store.catalog import Catalog, create_store
from karmma_pipeline.store.finalize import finalize
from karmma_pipeline.store.former import Encoded
from karmma_pipeline.store.joined import JoinedStore, LabelSpaces
from karmma_pipeline.store.reader import FeatureStore
from karmma_pipeline.store.spec import (
    ClipNumbers,
    ClipRow,
    Dtype,
    ModalitySpec,
    StoredDtype,
    StoreSpec,
    activation_dtype,
)
from karmma_pipeline.store.writer import ShardWriter

# Clips in memory at once.
_CLIPS = 32

Store = FeatureStore | JoinedStore
Change = Callable[[Encoded], "npt.NDArray[Any] | Encoded"]


def merge(
    stores: Sequence[Path],
    out: Path,
    label_spaces: LabelSpaces = "same",
    stop: StopFlag | None = None,
) -> None:
    """Write one store with the clips and modalities of several; see `JoinedStore`.

    Raises:
        StoreError: the stores contradict one another.
        StoppedError: a stop was asked for; run again to go on.
    """
    opened = [FeatureStore.open(path) for path in stores]
    joined = JoinedStore(opened, label_spaces)
    spec = StoreSpec(
        modalities=joined.specs,
        heads=joined.heads,
        clips_per_shard=opened[0].spec.clips_per_shard,
        views=joined.views,
    )
    rewrite(joined, out, spec, np.arange(len(joined)), {}, stop)


def split(
    store: Path, out: Path, by: Literal["split", "group"], stop: StopFlag | None = None
) -> list[Path]:
    """Write one store per split or group into the folder ``out``, and return them."""
    opened = FeatureStore.open(store)
    names = opened.split if by == "split" else opened.group
    made = []
    for name in sorted(set(names.tolist())):
        made.append(out / (name or "unnamed"))
        rewrite(opened, made[-1], opened.spec, np.flatnonzero(names == name), {}, stop)
    return made


def select(store: Path, out: Path, clip_ids: Sequence[str], stop: StopFlag | None = None) -> None:
    """Write a store with some clips, in the given order, each with all its views.

    Raises:
        StoreError: clips are not in the store.
    """
    opened = FeatureStore.open(store)
    place = {clip_id: i for i, clip_id in enumerate(opened.clip_ids.tolist())}
    if opened.views is not None:
        clip_ids = [row for clip_id in clip_ids for row in opened.views.names(clip_id)]
    missing = [clip_id for clip_id in clip_ids if clip_id.encode() not in place]
    if missing:
        raise StoreError(f"{store}: lacks {len(missing)} of the clips: {', '.join(missing[:5])}.")
    clips = np.array([place[clip_id.encode()] for clip_id in clip_ids], np.int64)
    rewrite(opened, out, opened.spec, clips, {}, stop)


def convert(
    store: Path,
    out: Path,
    dtype: Dtype | None = None,
    pool: Mapping[str, Sequence[int]] | None = None,
    stop: StopFlag | None = None,
) -> None:
    """Write a store in another type, or with fewer tokens.

    Args:
        store: to be read.
        out: to be written.
        dtype: of all modalities; None keeps each.
        pool: modality to its new token grid, such as [12, 1, 1]: the mean over blocks of the
            old grid, which stands in the provenance as ``token_grid`` (else the backbone's
            own, ``raw_grid``).
        stop: asks for a stop.

    Raises:
        StoreError: a grid does not divide the old one, or values do not fit the type.
        StoppedError: a stop was asked for; run again to go on.
    """
    opened = FeatureStore.open(store)
    specs, changes = {}, {}
    unknown = sorted(set(pool or {}) - set(opened.modalities))
    if unknown:
        raise StoreError(f"{store}: pool: no modality {', '.join(unknown)}.")
    for m, one in opened.specs.items():
        grid = (pool or {}).get(m)
        if one.is_cut and (grid is not None or (one.dtype == "uint8" and dtype is not None)):
            raise StoreError(
                f"{store}: {m} contains the input of {one.provenance['cut'].get('before')} of "
                "its backbone; it cannot be pooled or, for frames, converted."
            )
        wanted: StoredDtype = dtype or one.dtype
        if one.is_cut and dtype is not None:
            wanted = activation_dtype(dtype)
        specs[m] = _converted(store, m, one, wanted, grid)
        if specs[m] != one:
            changes[m] = _change(one, grid)
    spec = opened.spec.model_copy(update={"modalities": specs})
    rewrite(opened, out, spec, np.arange(len(opened)), changes, stop)


def _converted(
    store: Path, modality: str, one: ModalitySpec, dtype: StoredDtype, grid: Sequence[int] | None
) -> ModalitySpec:
    provenance = dict(one.provenance)
    tokens = one.tokens
    if dtype != one.dtype:
        provenance["converted_from"] = one.dtype
    if grid is not None:
        old = one.grid
        fits = len(old) == len(grid) and all(
            new > 0 and side % new == 0 for side, new in zip(old, grid, strict=True)
        )
        if not fits:
            raise StoreError(
                f"{store}: pool: {modality} has the token grid {list(old)}, which is not "
                f"divisible by {list(grid)}."
            )
        tokens = math.prod(grid)
        provenance |= {"token_grid": list(grid), "pooled_from": list(old)}
    update = {"tokens": tokens, "dtype": dtype, "provenance": provenance}
    return one.model_copy(update=update)


def _change(one: ModalitySpec, grid: Sequence[int] | None) -> Change:
    def change(encoded: Encoded) -> npt.NDArray[np.float32]:
        tokens = one.decode(encoded)
        return tokens if grid is None else pool_tokens(tokens, one.grid, grid)

    return change


def pool_tokens(
    tokens: npt.NDArray[np.float32], old: Sequence[int], new: Sequence[int]
) -> npt.NDArray[np.float32]:
    """Return the mean of tokens [N, D] over blocks of their grid, summed in float64."""
    blocks = [n for side, target in zip(old, new, strict=True) for n in (target, side // target)]
    within = tuple(range(1, 2 * len(old), 2))
    mean = tokens.reshape(*blocks, tokens.shape[1]).mean(axis=within, dtype=np.float64)
    return mean.reshape(-1, tokens.shape[1]).astype(np.float32)


def rewrite(
    source: Store,
    out: Path,
    spec: StoreSpec,
    clips: ClipNumbers,
    changes: Mapping[str, Change],
    stop: StopFlag | None = None,
) -> None:
    """Write some clips of a store into a new one; what lacks in ``changes`` is copied exactly."""
    stop = stop or StopFlag()
    create_store(out, spec, list(clip_rows(source, clips)))
    catalog = Catalog(out)
    todo = sorted(set(range(catalog.shards)) - catalog.committed())
    with progress_bar(total=len(clips), desc=f"write {out.name}", unit="clip") as bar:
        bar.update(len(clips) - sum(len(catalog.shard_range(s)) for s in todo))
        for shard in todo:
            with ShardWriter(out, shard) as writer:
                mine = clips[catalog.shard_range(shard)][writer.next :]
                bar.update(writer.next)
                for start in range(0, len(mine), _CLIPS):
                    stop.check("finished shards and clips are saved")
                    _append(source, writer, mine[start : start + _CLIPS], changes)
                    bar.update(len(mine[start : start + _CLIPS]))
                writer.commit()
    finalize(out)


def clip_rows(source: Store, clips: ClipNumbers) -> Iterator[ClipRow]:
    """Yield the clips as `create_store` takes them."""
    start, stop = source.seconds("start_s"), source.seconds("stop_s")
    split, group = source.split, source.group
    for i in clips:
        yield ClipRow(
            source.clip_ids[i].decode(),
            {head: int(labels[i]) for head, labels in source.labels.items()},
            str(split[i]),
            str(group[i]),
            float(start[i]),
            float(stop[i]),
        )


def read_encoded(source: Store, modality: str, clips: ClipNumbers) -> list[Encoded]:
    """Return clips as their store holds them, absent ones as zeros."""
    import torch

    parts = source.empty_parts(modality, len(clips))
    source.gather_parts(modality, torch.from_numpy(clips), parts)
    arrays = source.specs[modality].arrays
    stored = [
        part.view(torch.uint8).numpy().view(array.dtype)
        if part.dtype == torch.bfloat16
        else part.numpy()
        for part, array in zip(parts, arrays, strict=True)
    ]
    return [tuple(part[i] for part in stored) for i in range(len(clips))]


def _append(
    source: Store, writer: ShardWriter, clips: ClipNumbers, changes: Mapping[str, Change]
) -> None:
    encoded = {m: read_encoded(source, m, clips) for m in source.modalities}
    times = {m: source.times_of(m, clips) for m in source.modalities}
    for i, clip in enumerate(clips):
        tokens: dict[str, npt.NDArray[Any] | Encoded] = {}
        reasons = {}
        for column, m in enumerate(source.modalities):
            if source.present[clip, column]:
                tokens[m] = changes[m](encoded[m][i]) if m in changes else encoded[m][i]
            else:
                reasons[m] = Reason(int(source.reasons[clip, column]))
        taken = {m: times[m][i] for m in tokens}
        writer.append(source.clip_ids[clip].decode(), tokens, reasons, taken)

"""A store out of features that another program computed: one .npy or .npz file per clip."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline import files
from karmma_pipeline.errors import ManifestError, StoreError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store.catalog import Catalog, create_store
from karmma_pipeline.store.finalize import finalize
from karmma_pipeline.store.spec import ClipRow, Dtype, ModalitySpec, StoreSpec, check_head_names
from karmma_pipeline.store.writer import ShardWriter

_COLUMNS = ("clip_id", "split", "group", "start", "stop")
_ENDINGS = (".npy", ".npz")
_CLIPS_PER_SHARD = 256


def import_features(
    folder: Path,
    clips: Path,
    out: Path,
    source: str,
    dtype: Dtype = "float16",
    stop: StopFlag | None = None,
) -> dict[str, int]:
    """Write a store of ``<folder>/<modality>/<clip_id>.npy`` or ``.npz``, as `export` writes them.

    Each file holds one clip's tokens, [N, D], or [D] for one token; an .npz one array, or one
    called ``feats``. All files of a modality have one shape. A clip without a file is absent there.

    Args:
        folder: one folder per modality.
        clips: CSV with ``clip_id`` and, as far as known, split, group, start and stop in seconds;
            every other column that is no modality is a head of labels, an empty cell unknown.
        out: the new store.
        source: where the features come from: network, weights, preprocessing. Models refuse
            features of another source, so that it must say all that makes them differ.
        dtype: on disk.
        stop: asks for a stop between clips; run again to go on.

    Returns:
        Modality to the number of clips that have it.

    Raises:
        ManifestError: the CSV cannot be read.
        StoreError: a file is no such array, or not of its modality's shape.
    """
    stop = stop or StopFlag()
    there = {path.name: _files(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    there = {modality: paths for modality, paths in there.items() if paths}
    if not there:
        raise StoreError(f"{folder}: contains no folder with .npy or .npz files.")
    rows, heads = _read_clips(clips, there)
    spec = StoreSpec(
        modalities={m: _spec(paths, source, dtype) for m, paths in there.items()},
        heads=heads,
        clips_per_shard=_CLIPS_PER_SHARD,
    )
    create_store(out, spec, rows)
    catalog = Catalog(out)
    with progress_bar(total=len(rows), desc="import", unit="clip") as bar:
        for shard in sorted(set(range(catalog.shards)) - catalog.committed()):
            with ShardWriter(out, shard) as writer:
                for clip_id in writer.clip_ids[writer.next :]:
                    stop.check("the clips written so far are kept")
                    tokens, reasons = _read(clip_id, there, spec)
                    writer.append(clip_id, tokens, reasons, {})
                    bar.update()
                writer.commit()
    finalize(out)
    ids = {row.clip_id for row in rows}
    return {m: len(ids & paths.keys()) for m, paths in there.items()}


def _files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in _ENDINGS}


def _read_clips(
    path: Path, modalities: Mapping[str, object]
) -> tuple[list[ClipRow], dict[str, tuple[str, ...]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: the CSV cannot be read ({error}).") from None
    if not table or "clip_id" not in table[0]:
        raise ManifestError(f"{path}: needs a column clip_id and one row per clip.")
    names = [c for c in table[0] if c and c not in _COLUMNS and c not in modalities]
    try:
        check_head_names(names)
    except ValueError as error:
        raise ManifestError(f"{path}: {error}; rename or delete the column.") from None
    heads = {h: tuple(sorted({row[h] for row in table if row[h]})) for h in names}
    number = {head: {name: k for k, name in enumerate(of)} for head, of in heads.items()}
    return [
        ClipRow(
            _clip_id(path, line, row["clip_id"]),
            {head: of.get(row[head], -1) for head, of in number.items()},
            row.get("split") or "",
            row.get("group") or "",
            _seconds(path, line, row, "start", 0.0),
            _seconds(path, line, row, "stop", float("nan")),
        )
        for line, row in enumerate(table, 2)
    ], heads


def _clip_id(path: Path, line: int, clip_id: str) -> str:
    try:
        return files.check_name(clip_id)
    except ValueError as error:
        raise ManifestError(f"{path}: line {line}: clip_id={clip_id!r}: {error}.") from None


def _seconds(path: Path, line: int, row: Mapping[str, Any], name: str, unknown: float) -> float:
    try:
        return float(row.get(name) or unknown)
    except ValueError:
        raise ManifestError(
            f"{path}: line {line}: {name}={row[name]!r}: write seconds, such as 1.25."
        ) from None


def _spec(paths: Mapping[str, Path], source: str, dtype: Dtype) -> ModalitySpec:
    tokens, width = _array(next(iter(paths.values()))).shape
    return ModalitySpec(tokens=tokens, width=width, dtype=dtype, provenance={"source": source})


def _read(
    clip_id: str, there: Mapping[str, Mapping[str, Path]], spec: StoreSpec
) -> tuple[dict[str, Any], dict[str, Reason]]:
    tokens: dict[str, Any] = {}
    reasons: dict[str, Reason] = {}
    for modality, one in spec.modalities.items():
        path = there[modality].get(clip_id)
        if path is None:
            reasons[modality] = Reason.NOT_IN_DATASET
            continue
        values = _array(path)
        if values.shape != (one.tokens, one.width):
            raise StoreError(
                f"{path}: has the shape {list(values.shape)}, but the first file of {modality} "
                f"has [{one.tokens}, {one.width}]; all clips of a modality must have the same "
                "shape."
            )
        if not one.holds(values):
            raise StoreError(
                f"{path}: has values that are not finite or too large for {one.dtype}; fix the "
                "file, remove it (the clip then lacks the modality), or use --dtype float32."
            )
        tokens[modality] = values
    return tokens, reasons


def _array(path: Path) -> npt.NDArray[np.float32]:
    """Read the tokens of a file, [N, D]; never runs code of it."""
    try:
        content = np.load(path, allow_pickle=False)
        if not isinstance(content, np.ndarray):
            names = list(content)
            content = content["feats" if "feats" in names or len(names) != 1 else names[0]]
        values = np.asarray(content, np.float32)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise StoreError(f"{path}: does not contain a numeric array ({error}).") from None
    if values.ndim not in {1, 2} or not values.size:
        raise StoreError(f"{path}: has the shape {list(values.shape)}; expected [N, D] or [D].")
    return np.atleast_2d(values)

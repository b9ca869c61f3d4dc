"""Tokens in the layouts that other trainers read; see docs/store_format.md for each.

A file that is there is left, each file is whole or not there: an export that was stopped goes
on when it is run again.
"""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from karmma_pipeline import files
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.store.format.layout import check_outside
from karmma_pipeline.store.former import Encoded
from karmma_pipeline.store.reader import FeatureStore
from karmma_pipeline.store.spec import ModalitySpec
from karmma_pipeline.store.tools.rewrite import read_encoded

ExportLayout = Literal["npy", "pt", "actionformer", "tim"]
_CLIPS = 32


def export(store: Path, out: Path, layout: ExportLayout, stop: StopFlag | None = None) -> int:
    """Write a store's tokens as files per clip, and return how many were written or there.

    npy, pt: ``<modality>/<clip_id>.npy`` or ``.pt``, [N, D], as stored (bfloat16 and int8 as
    float32 in .npy, int8 as float32 in .pt), and ``clips.csv``.
    actionformer: ``<modality>/<clip_id>.npz`` with ``feats`` float32 [T, D] (the mean over the
    space of the token grid) and ``<head>.json``, a clip being a video with one action.
    tim: ``<modality>/<split>/<clip_id>.npy`` float32 [T, 1, D] and ``<modality>_times.csv``.

    Raises:
        StoreError: there is not the space.
        StoppedError: a stop was asked for; run again to go on.
    """
    stop, opened = stop or StopFlag(), FeatureStore.open(store)
    check_outside(out)
    out.mkdir(parents=True, exist_ok=True)
    for m in opened.modalities:
        files.check_name(m)
    files.check_space(out, *_needed(opened, layout))
    name, data, describe = _FORMATS[layout]
    written = 0
    with progress_bar(total=int(opened.present.sum()), desc=f"export {layout}", unit="file") as bar:
        for column, m in enumerate(opened.modalities):
            clips = np.flatnonzero(opened.present[:, column])
            for start in range(0, len(clips), _CLIPS):
                stop.check("the files written so far are kept")
                piece = clips[start : start + _CLIPS]
                encoded = read_encoded(opened, m, piece)
                for clip, arrays in zip(piece, encoded, strict=True):
                    path = out / m / name(opened, int(clip))
                    if not path.is_file():
                        files.write_bytes(path, data(opened.specs[m], arrays))
                    written += 1
                    bar.update()
    describe(opened, out)
    return written


def _needed(store: FeatureStore, layout: ExportLayout) -> tuple[int, int]:
    """Return bytes and inodes at most; the layouts of others hold float32."""
    size = 0
    for column, m in enumerate(store.modalities):
        one = store.specs[m]
        is_float32 = layout in {"actionformer", "tim"} or one.dtype == "bfloat16" or one.is_scaled
        wide = 4 if is_float32 else 0
        values = one.tokens * one.width
        size += int(store.present[:, column].sum()) * (values * wide or one.clip_bytes)
    return size, int(store.present.sum()) + 16


def _clip_name(extension: str) -> Callable[[FeatureStore, int], str]:
    return lambda store, clip: f"{store.clip_ids[clip].decode()}.{extension}"


def _tim_name(store: FeatureStore, clip: int) -> str:
    return f"{_folder(str(store.split[clip]))}/{store.clip_ids[clip].decode()}.npy"


def _folder(split: str) -> str:
    return "".join(c if c.isalnum() or c in "_-" else "_" for c in split) or "all"


def _npy(one: ModalitySpec, arrays: Encoded) -> bytes:
    plain = one.dtype in {"float16", "float32", "uint8"}
    values = arrays[0] if plain else one.decode(arrays)
    return _written(lambda buffer: np.save(buffer, values))


def _pt(one: ModalitySpec, arrays: Encoded) -> bytes:
    import torch

    tensor = torch.from_numpy(one.decode(arrays) if one.is_scaled else arrays[0].copy())
    tensor = tensor.view(torch.bfloat16) if one.dtype == "bfloat16" else tensor
    return _written(lambda buffer: torch.save(tensor, buffer))


def _actionformer(one: ModalitySpec, arrays: Encoded) -> bytes:
    return _written(lambda buffer: np.savez(buffer, feats=over_time(one, arrays)))


def _tim(one: ModalitySpec, arrays: Encoded) -> bytes:
    return _written(lambda buffer: np.save(buffer, over_time(one, arrays)[:, None]))


def _written(save: Callable[[io.BytesIO], None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def over_time(one: ModalitySpec, arrays: Encoded) -> npt.NDArray[np.float32]:
    """Return tokens as a sequence [T, D]: the mean over all but the first side of their grid."""
    tokens = one.decode(arrays)
    return tokens.reshape(one.grid[0], -1, one.width).mean(axis=1)


def _write_clips(store: FeatureStore, out: Path) -> None:
    """Write ids, splits, labels by name, and which modalities are there."""
    heads = list(store.heads)
    rows = [["clip_id", "split", "group", "start", "stop", *heads, *store.modalities]]
    start, end = store.seconds("start_s"), store.seconds("stop_s")
    for i, clip_id in enumerate(store.clip_ids):
        labels = [int(store.labels[h][i]) for h in heads]
        names = [store.heads[h][n] if n >= 0 else "" for h, n in zip(heads, labels, strict=True)]
        stop = "" if np.isnan(end[i]) else f"{end[i]:.6f}"
        row = [clip_id.decode(), store.split[i], store.group[i], f"{start[i]:.6f}", stop]
        rows.append([*row, *names, *(str(int(p)) for p in store.present[i])])
    _write_csv(out / "clips.csv", rows)


def _write_actionformer(store: FeatureStore, out: Path) -> None:
    """Write a database per head: each clip is a video, its action fills it."""
    duration = _durations(store)
    for head, names in store.heads.items():
        database = {}
        for i, clip_id in enumerate(store.clip_ids):
            label = int(store.labels[head][i])
            segment = [0.0, duration[i]]
            actions = (
                [{"label": names[label], "label_id": label, "segment": segment}]
                if label >= 0
                else []
            )
            database[clip_id.decode()] = {
                "subset": str(store.split[i]),
                "duration": duration[i],
                "fps": 1.0,
                "annotations": actions,
            }
        text = json.dumps({"version": "karmma", "database": database}, indent=1, sort_keys=True)
        files.write_text(out / f"{head}.json", text + "\n")


def _write_tim(store: FeatureStore, out: Path) -> None:
    """Write when each feature begins and ends, on the clip's own clock."""
    duration = _durations(store)
    for column, m in enumerate(store.modalities):
        steps = store.specs[m].grid[0]
        rows: dict[str, list[list[str]]] = defaultdict(
            lambda: [["video_id", "narration_sec", "start_sec", "stop_sec"]]
        )
        for i in np.flatnonzero(store.present[:, column]):
            for k in range(steps):
                start, end = k * duration[i] / steps, (k + 1) * duration[i] / steps
                middle = f"{(start + end) / 2:.6f}"
                span = [middle, f"{start:.6f}", f"{end:.6f}"]
                rows[_folder(str(store.split[i]))].append([store.clip_ids[i].decode(), *span])
        for split, lines in rows.items():
            _write_csv(out / f"{m}_{split}_times.csv", lines)
    _write_clips(store, out)


def _durations(store: FeatureStore) -> list[float]:
    """Return the seconds of each clip; 1 where its stop is not stated."""
    spans = store.seconds("stop_s") - store.seconds("start_s")
    return [round(float(s), 6) for s in np.where(np.isnan(spans), 1.0, spans)]


def _write_csv(path: Path, rows: list[list[str]]) -> None:
    with (
        files.replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        csv.writer(file).writerows(rows)


# How a clip's file is called and filled, and what is written beside the files.
_FORMATS = {
    "npy": (_clip_name("npy"), _npy, _write_clips),
    "pt": (_clip_name("pt"), _pt, _write_clips),
    "actionformer": (_clip_name("npz"), _actionformer, _write_actionformer),
    "tim": (_tim_name, _tim, _write_tim),
}

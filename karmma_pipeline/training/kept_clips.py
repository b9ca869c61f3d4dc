"""The clips that a run learns from: noted in its folder, so that it goes on with just these.

A store may change while a run is stopped: its list of clips grows, or clips are extracted again. A
run does not mind what it never saw; where its own clips are others now, it stops and names them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline import files
from karmma_pipeline.errors import CheckpointError
from karmma_pipeline.runs import CLIPS
from karmma_pipeline.store import TokenSource
from karmma_pipeline.store.source import PartOfStore

_NAMED = 5


def note_clips(out: Path, store: TokenSource, clips: npt.NDArray[np.int64]) -> None:
    """Note what a run that begins learns from: its store's digest, class names, digests of clips.

    Args:
        out: the folder of the run.
        store: what it reads.
        clips: all that it trains on and validates with.
    """
    chosen = np.unique(clips)
    ids = [clip_id.decode() for clip_id in store.clip_ids[chosen]]
    digests = [digest.decode() for digest in store.clip_digests[chosen]]
    mine = dict(zip(ids, digests, strict=True))
    content = {"store": store.digest, "heads": store.heads, "clips": mine}
    files.write_json(out / CLIPS, content)


def learned_from(run: Path, store: TokenSource, split: str) -> npt.NDArray[np.bytes_]:
    """Return the ids of the clips that a run was trained on.

    Args:
        run: its folder.
        store: the store that it read.
        split: what it learned from; its folder names the clips that chose the epoch, too.

    Raises:
        CheckpointError: the folder does not tell.
    """
    kept = _read(run / CLIPS)
    if kept is None:
        raise CheckpointError(
            f"{run}: has no {CLIPS}, so its training clips are unknown; train it again, or set "
            "cross_fitted: false."
        )
    ids = store.clip_ids[store.split == split]
    return ids[np.isin(ids, np.array([*kept["clips"]], ids.dtype))]


def as_it_began(out: Path, store: TokenSource) -> TokenSource:
    """Return a store as a run began with it: as it is, or the clips of it that the run knows.

    Args:
        out: the folder of the run.
        store: what is there now.

    Raises:
        CheckpointError: clips of the run are others now; they are named.
    """
    kept = _read(out / CLIPS)
    if kept is None or kept["store"] == store.digest:
        return store
    there = dict(zip(store.clip_ids.tolist(), store.clip_digests.tolist(), strict=True))
    mine: Mapping[str, str] = kept["clips"]
    changed = [clip for clip, digest in mine.items() if there.get(clip.encode()) != digest.encode()]
    if changed:
        named = ", ".join(sorted(changed)[:_NAMED]) + (", ..." if len(changed) > _NAMED else "")
        raise CheckpointError(
            f"{out}: {len(changed)} of the {len(mine)} clips of this run have changed in "
            f"{store.path} or are missing: {named}; they were extracted again, or their rows "
            "changed. Restore the old store, or train in another folder with --set out=FOLDER; "
            f"init_from={out} starts from the weights of this run."
        )
    clips = np.flatnonzero([clip.decode() in mine for clip in store.clip_ids])
    return PartOfStore(store, clips, kept["heads"], kept["store"])


def _read(path: Path) -> dict[str, Any] | None:
    """Return what was noted; None where an older program began the run."""
    try:
        kept = json.loads(path.read_text("utf-8"))
        sound = isinstance(kept["store"], str) and isinstance(kept["clips"], dict)
        return kept if sound and isinstance(kept["heads"], dict) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: the file is damaged ({error}); remove it, and the run resumes if its "
            "store is unchanged."
        ) from None

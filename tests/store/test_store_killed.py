"""What a writer that was killed, or whose disk fails, leaves behind."""

import errno
import os
from pathlib import Path

import pytest
from support.any_store import IDS, RGB_AUDIO, fill_store, tokens_of
from support.leftovers import leave

from karmma_pipeline.errors import KarmmaError
from karmma_pipeline.store import Catalog, ShardWriter, finalize
from karmma_pipeline.store.format import layout


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_completing_a_store_takes_away_what_killed_writers_left(tmp_path: Path) -> None:
    whole, root = fill_store(tmp_path / "whole"), fill_store(tmp_path / "hurt")
    (root / layout.MANIFEST).unlink()
    spool = layout.spool_folder(root, 0)  # killed between its commit and its last step
    spool.mkdir(parents=True)
    (spool / "journal").write_bytes(b"x")
    for name in (layout.SPEC, "commit/000000.safetensors", "rgb/tokens/c/0/0", "clips/group/c/0"):
        leave(root / name)
    finalize(root)
    assert names(root) == names(whole)


def test_a_disk_that_fails_twice_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fill_store(tmp_path / "s")
    layout.record_file(root, 0).unlink()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def write() -> None:
        with ShardWriter(Catalog(root).root, 0) as writer:
            monkeypatch.setattr(Path, "unlink", fail)
            monkeypatch.setattr("karmma_pipeline.store.writer._write", fail)
            tokens = {m: tokens_of(IDS[0], m, shape) for m, shape in RGB_AUDIO.items()}
            writer.append(IDS[0], tokens, {}, {})

    with pytest.raises(KarmmaError, match="cannot be written"):
        write()

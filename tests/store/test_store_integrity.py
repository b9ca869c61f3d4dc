"""Any flipped byte is found, and what is damaged is made again and nothing else."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.any_store import fill_store

from karmma_pipeline.cli import main
from karmma_pipeline.errors import StoreError
from karmma_pipeline.store import FeatureStore, finalize, repair, verify
from karmma_pipeline.store.format.layout import PAYLOAD_OFFSET, record_file, shard_file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_store(tmp_path_factory.mktemp("whole") / "s", dtype="int8")


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "s"))


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def flip(path: Path, place: int, bit: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        old = file.read(1)[0]
        file.seek(place)
        file.write(bytes([old ^ bit]))


def reported(root: Path) -> list[str]:
    try:
        return [str(damage) for damage in verify(root)]
    except StoreError as error:
        return [str(error)]


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_reported(data: st.DataObject, whole: Path) -> None:
    files = sorted(p for p in whole.rglob("*") if p.is_file() and p.stat().st_size)
    path = data.draw(st.sampled_from(files))
    place = data.draw(st.integers(0, path.stat().st_size - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    with flipped(path, place, bit):
        assert reported(whole)


class flipped:  # noqa: N801  (reads as a word in `with`)
    def __init__(self, path: Path, place: int, bit: int) -> None:
        self.change = (path, place, bit)

    def __enter__(self) -> None:
        flip(*self.change)

    def __exit__(self, *_: object) -> None:
        flip(*self.change)


def places() -> Iterator[tuple[str, int, str]]:
    yield "rgb/tokens/c/0/0", 5, "Zarr index"
    yield "rgb/tokens/c/0/0", 4096 + 100, "HDF5 header"
    yield "rgb/tokens/c/1/0", -1, "padding"
    yield "rgb/scale/c/0/0", PAYLOAD_OFFSET, "checksum mismatch: c00"
    yield "commit/000001.safetensors", -3, "commit record is damaged"
    yield "clips/label_verb/c/0", 4, "clips/label_verb/c/0: checksum mismatch"
    yield "index.h5", 3000, "index.h5: checksum mismatch"
    yield "manifest.json", 40, "manifest.json"
    yield "rgb/zarr.json", 10, "rgb/zarr.json: checksum mismatch"
    yield "zarr.json", 10, "zarr.json: checksum mismatch"


@pytest.mark.parametrize(("name", "place", "what"), list(places()))
def test_damage_is_named_by_its_place(store: Path, name: str, place: int, what: str) -> None:
    path = store / name
    flip(path, place % path.stat().st_size)
    assert any(what in line for line in reported(store)), reported(store)


def test_the_damaged_shards_alone_are_made_again(store: Path, whole: Path) -> None:
    flip(shard_file(store, "rgb", 1), PAYLOAD_OFFSET)
    flip(store / "clips/split/c/0", 1)
    damages = verify(store)
    assert {d.clip_ids for d in damages if d.shard == 1} == {("c08",)}
    assert repair(store, damages) == ["shard 1: removed", "clips/split/c/0: removed"]
    assert record_file(store, 0).is_file()
    assert not record_file(store, 1).is_file()
    with pytest.raises(StoreError, match="not complete"):
        FeatureStore.open(store)
    fill_store(store, dtype="int8")
    assert tree(store) == tree(whole)


@pytest.mark.parametrize("name", ["index.h5", "manifest.json", "clips/reason/c/0/0"])
def test_what_finalize_makes_it_makes_again(store: Path, whole: Path, name: str) -> None:
    flip(store / name, 20)
    repair(store, verify(store))
    finalize(store)
    assert tree(store) == tree(whole)


def test_a_missing_file_and_foreign_ones_are_found_and_cleaned(store: Path, whole: Path) -> None:
    (store / "index.h5").unlink()
    (store / "notes.txt").write_text("x")
    (store / "rgb/tokens/c/0/.0.abc.tmp").write_text("x")
    found = reported(store)
    assert "index.h5: the file is missing" in found
    assert any(line.startswith("notes.txt: unexpected file") for line in found)
    repair(store, verify(store))
    finalize(store)
    runner = CliRunner()
    assert "2 found" in runner.invoke(main, ["store", "gc", str(store)]).output
    assert (store / "notes.txt").is_file()
    runner.invoke(main, ["store", "gc", str(store), "--delete"], catch_exceptions=False)
    assert tree(store) == tree(whole)


def test_the_command_says_which_clips_and_how_to_go_on(store: Path) -> None:
    flip(shard_file(store, "audio", 0), PAYLOAD_OFFSET + 1)
    runner = CliRunner()
    result = runner.invoke(main, ["store", "verify", str(store)])
    assert result.exit_code == 1
    assert "shard 0 audio: checksum mismatch: c00" in result.output
    result = runner.invoke(main, ["store", "verify", str(store), "--repair"])
    assert result.exit_code == 0
    assert "shard 0: removed" in result.output


def test_the_spool_of_a_living_writer_is_no_garbage(store: Path) -> None:
    from karmma_pipeline.store import ShardWriter
    from karmma_pipeline.store.integrity import garbage

    record_file(store, 1).unlink()
    with ShardWriter(store, 1):
        assert list(garbage(store)) == []
    assert list(garbage(store)) == []  # extraction goes on with it
    (store / "spool/000000").mkdir(parents=True)
    assert [one.path.name for one in garbage(store)] == ["000000"]

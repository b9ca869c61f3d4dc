import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.forks import in_fork
from support.nth_call import at_call, kill_at_call
from support.patience import wait_for

from karmma_pipeline.errors import KarmmaError, StoreError
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import (
    ClipRow,
    FeatureStore,
    ModalitySpec,
    ShardWriter,
    StoreSpec,
    create_store,
    finalize,
    info,
    verify,
)
from karmma_pipeline.store.format.layout import (
    PAYLOAD_OFFSET,
    record_file,
    shard_file,
    spool_folder,
)

Tokens = dict[str, np.ndarray]


def make_spec(dtype: str = "float16", clips_per_shard: int = 4) -> StoreSpec:
    rgb = {"tokens": 3, "width": 5, "dtype": dtype, "frames": 2, "provenance": {"backbone": "x"}}
    audio = {"tokens": 1, "width": 8, "dtype": dtype, "frames": 1}
    return StoreSpec(
        modalities={"audio": ModalitySpec(**audio), "rgb": ModalitySpec(**rgb)},
        heads={"verb": ("open", "shut")},
        clips_per_shard=clips_per_shard,
    )


def make_clips(count: int) -> list[ClipRow]:
    return [
        ClipRow(f"c{i}", {"verb": i % 2}, "val" if i % 3 == 0 else "train", "P01", i, i + 1.5)
        for i in range(count)
    ]


def make_tokens(spec: StoreSpec, number: int) -> Tokens:
    rng = np.random.default_rng(number)
    return {m: rng.normal(size=(s.tokens, s.width)) for m, s in spec.modalities.items()}


def fill(root: Path, spec: StoreSpec, clips: list[ClipRow], absent: dict[int, str]) -> None:
    create_store(root, spec, clips)
    for shard in range(-(-len(clips) // spec.clips_per_shard)):
        with ShardWriter(root, shard) as writer:
            first = shard * spec.clips_per_shard
            for number in range(first + writer.next, first + len(writer.clip_ids)):
                tokens = make_tokens(spec, number)
                reasons = {}
                if number in absent:
                    del tokens[absent[number]]
                    reasons[absent[number]] = Reason.NO_STREAM
                times = {m: np.full((2, spec.modalities[m].frames), float(number)) for m in tokens}
                writer.append(clips[number].clip_id, tokens, reasons, times)
            writer.commit()


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    root = tmp_path / "store"
    fill(root, make_spec(), make_clips(10), {2: "audio", 5: "rgb"})
    finalize(root)
    return root


def test_gathered_tokens_are_those_written_and_absent_ones_are_zeros(store: Path) -> None:
    spec, opened = make_spec(), FeatureStore.open(store)
    assert opened.modalities == ("rgb", "audio")
    index = torch.tensor([9, 2, 5, 0, 2])
    rgb, audio = opened.gather("rgb", index), opened.gather("audio", index)
    assert rgb.shape == (5, 3, 5)
    for row, clip in enumerate(index.tolist()):
        wanted = {m: t.astype(np.float16) for m, t in make_tokens(spec, clip).items()}
        np.testing.assert_array_equal(rgb[row], wanted["rgb"] if clip != 5 else 0)
        np.testing.assert_array_equal(audio[row], wanted["audio"] if clip != 2 else 0)
    assert opened.present.tolist()[2] == [True, False]
    assert Reason(opened.reasons[5, 0]) is Reason.NO_STREAM
    assert opened.labels["verb"].tolist() == [0, 1] * 5
    assert opened.split[:4].tolist() == ["val", "train", "train", "val"]
    assert opened.times("rgb")[7].tolist() == [[7.0, 7.0], [7.0, 7.0]]
    assert np.isnan(opened.times("rgb")[5]).all()


def test_gather_fills_a_given_buffer(store: Path) -> None:
    out = torch.full((3, 3, 5), torch.nan, dtype=torch.float16)
    opened = FeatureStore.open(store)
    opened.gather_parts("rgb", torch.tensor([1, 8, -1]), [out])
    assert torch.equal(out[:2], opened.gather("rgb", torch.tensor([1, 8])))
    assert not out[2].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_plain_zarr_and_plain_h5py_find_the_same_numbers(tmp_path: Path, dtype: str) -> None:
    root, spec = tmp_path / "s", make_spec(dtype)
    fill(root, spec, make_clips(10), {2: "audio", 5: "rgb"})
    finalize(root)
    opened = FeatureStore.open(root)
    group: Any = zarr.open_group(root, mode="r")
    with h5py.File(root / "index.h5") as index:
        for m in opened.modalities:
            start, count = group[f"clips/start_{m}"][:], group[f"clips/tokens_{m}"][:]
            for clip in range(10):
                ours = opened.gather(m, torch.tensor([clip]))[0]
                bits = ours.view(torch.uint16).numpy() if dtype == "bfloat16" else ours.numpy()
                if count[clip]:
                    rows = slice(start[clip], start[clip] + count[clip])
                    for file in (group, index):
                        found = file[f"{m}/tokens"][rows]
                        if dtype == "int8":
                            found = found * file[f"{m}/scale"][rows].astype(np.float32)
                        np.testing.assert_array_equal(found, bits)
            np.testing.assert_array_equal(index[f"clips/start_{m}"][:], start)
    with h5py.File(shard_file(root, "rgb", 1)) as shard:  # a shard alone is an HDF5 file too
        assert shard["tokens"].id.get_offset() == PAYLOAD_OFFSET


def test_bfloat16_rounds_as_torch_does(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 5)) * 10.0 ** np.arange(-10, 5).reshape(3, 5)
    (bits,) = ModalitySpec(tokens=3, width=5, dtype="bfloat16").encode(values)
    wanted = torch.from_numpy(values).float().bfloat16().view(torch.uint16)
    np.testing.assert_array_equal(bits, wanted.numpy())


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_pattern_of_presence_comes_back(data: st.DataObject, tmp_path: Path) -> None:
    root = tmp_path / "s"
    shutil.rmtree(root, ignore_errors=True)
    count, size = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    lacks = st.sampled_from(["rgb", "audio"])
    absent = data.draw(st.dictionaries(st.integers(0, count - 1), lacks))
    spec = make_spec(clips_per_shard=size)
    fill(root, spec, make_clips(count), absent)
    finalize(root)
    opened = FeatureStore.open(root)
    for m in opened.modalities:
        got = opened.gather(m, torch.arange(count)).numpy()
        for clip in range(count):
            wanted = make_tokens(spec, clip)[m].astype(np.float16)
            np.testing.assert_array_equal(got[clip], 0 if absent.get(clip) == m else wanted)
    assert verify(root) == []


def test_another_recipe_or_other_clips_are_refused_by_name(store: Path) -> None:
    create_store(store, make_spec(), make_clips(10))  # the same: nothing to say
    with pytest.raises(StoreError, match=r"spec\.clips_per_shard was 4, now 5"):
        create_store(store, make_spec(clips_per_shard=5), make_clips(10))
    with pytest.raises(StoreError, match="clips was 10, now 9"):
        create_store(store, make_spec(), make_clips(9))


@pytest.mark.parametrize("clip_id", ["../evil", ".hidden", "-rf", "a/b", "", "a\0b", "x" * 121])
def test_a_clip_id_that_could_leave_the_store_is_refused(tmp_path: Path, clip_id: str) -> None:
    with pytest.raises(StoreError, match="clip_id"):
        create_store(tmp_path / "s", make_spec(), [ClipRow(clip_id, {})])


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="other files"):
        create_store(tmp_path, make_spec(), make_clips(2))


def test_an_incomplete_store_names_its_missing_shards(tmp_path: Path) -> None:
    create_store(tmp_path / "s", make_spec(), make_clips(10))
    with pytest.raises(StoreError, match=r"3 of 3 shards missing \(0, 1, 2\)"):
        finalize(tmp_path / "s")
    with pytest.raises(StoreError, match="not complete"):
        FeatureStore.open(tmp_path / "s")


def test_a_missing_or_cut_shard_is_an_error_never_zeros(store: Path) -> None:
    path = shard_file(store, "rgb", 1)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(StoreError, match="damaged"):
        FeatureStore.open(store).gather("rgb", torch.tensor([0]))
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        FeatureStore.open(store).gather("rgb", torch.tensor([0]))
    assert [d.what for d in verify(store)] == ["the file is missing"]


def test_verify_names_the_clip_of_a_flipped_bit(store: Path) -> None:
    path = shard_file(store, "rgb", 1)  # clips 4 to 7, of which 5 has no rgb
    data = bytearray(path.read_bytes())
    data[PAYLOAD_OFFSET + 2 * 3 * 5 * 2 - 1] ^= 4  # last byte of the second present clip
    path.chmod(0o644)
    path.write_bytes(data)
    assert [(d.shard, d.modality, d.clip_ids) for d in verify(store)] == [(1, "rgb", ("c6",))]


def test_verify_finds_foreign_files_and_damaged_records(store: Path) -> None:
    shutil.copytree(shard_file(store, "rgb", 0).parent, shard_file(store, "rgb", 7).parent)
    record_file(store, 2).write_bytes(b"x")
    found = [(d.shard, d.path) for d in verify(store)]
    assert found == [(2, ""), (-1, "rgb/tokens/c/7/0")]


def test_the_digest_changes_with_a_token_and_not_with_the_place(tmp_path: Path) -> None:
    for name, absent in (("a", {1: "rgb"}), ("b", {1: "rgb"}), ("c", {2: "rgb"})):
        fill(tmp_path / name, make_spec(), make_clips(5), absent)
        finalize(tmp_path / name)
    a, b, c = (FeatureStore.open(tmp_path / name).digest for name in "abc")
    assert a == b != c


def test_the_bytes_do_not_depend_on_the_time_of_day(tmp_path: Path) -> None:
    fill(tmp_path / "a", make_spec(), make_clips(5), {1: "rgb"})
    finalize(tmp_path / "a")
    second = int(time.time())  # HDF5 records times in seconds
    wait_for(lambda: int(time.time()) > second)
    fill(tmp_path / "b", make_spec(), make_clips(5), {1: "rgb"})
    finalize(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_clips_come_in_order_and_are_finite(tmp_path: Path) -> None:
    spec = make_spec()
    create_store(tmp_path / "s", spec, make_clips(4))
    with ShardWriter(tmp_path / "s", 0) as writer:
        with pytest.raises(StoreError, match="expected 'c0'"):
            writer.append("c1", make_tokens(spec, 1), {}, {})
        tokens = make_tokens(spec, 0)
        tokens["rgb"][0, 0] = np.nan
        with pytest.raises(StoreError, match="NaN"):
            writer.append("c0", tokens, {}, {})
        with pytest.raises(StoreError, match="0 of 4 clips"):
            writer.commit()


def test_a_second_writer_of_a_shard_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    create_store(tmp_path / "s", make_spec(), make_clips(4))
    code = (
        "import sys; from pathlib import Path; from karmma_pipeline.store import ShardWriter\n"
        f"with ShardWriter(Path({str(tmp_path / 's')!r}), 0):\n"
        "    print('in', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with (
            pytest.raises(KarmmaError, match="is writing shard 0; wait for it"),
            ShardWriter(tmp_path / "s", 0),
        ):
            pass
        other.send_signal(signal.SIGKILL)
    with ShardWriter(tmp_path / "s", 0):  # its lock is stale now
        pass


@pytest.mark.parametrize("damage", [b"", b"host", b"host1 -", b"\xff\xfe", b"a b c d"])
def test_a_damaged_lock_holds_nobody_off(tmp_path: Path, damage: bytes) -> None:
    create_store(tmp_path / "s", make_spec(), make_clips(4))
    lock = spool_folder(tmp_path / "s", 0) / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_bytes(damage)
    with ShardWriter(tmp_path / "s", 0):
        assert lock.read_text().split()[1] == str(os.getpid())


def test_killed_at_any_calls_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    spec, clips, absent = make_spec(), make_clips(10), {2: "audio", 5: "rgb"}

    def write(root: Path, hook: Callable[[Path], object]) -> int:
        def work() -> None:
            hook(root)
            fill(root, spec, clips, absent)
            finalize(root)

        return in_fork(work)

    def count(root: Path) -> None:
        at_call(root, lambda number, _: (tmp_path / "calls").write_text(str(number)))

    assert write(tmp_path / "whole", count) == 0
    calls = int((tmp_path / "calls").read_text())
    rng = random.Random(0)
    moments = [(number, "write */journal") for number in range(1, len(clips) + 1, 2)]
    moments += [(rng.randint(1, calls), "*") for _ in range(6)]
    for number, pattern in moments:
        killed = tmp_path / f"killed{number}{pattern[0]}"
        kill = partial(kill_at_call, number=number, pattern=pattern)
        assert write(killed, kill) == -signal.SIGKILL
        assert write(killed, lambda _: None) == 0
        found = {k: v for k, v in tree(killed).items() if not k.endswith(".tmp")}
        assert found == tree(tmp_path / "whole")


def test_a_spool_cut_anywhere_is_continued(tmp_path: Path) -> None:
    spec, clips = make_spec(clips_per_shard=6), make_clips(6)
    fill(tmp_path / "whole", spec, clips, {})
    rng = np.random.default_rng(0)
    for trial in range(20):
        root = tmp_path / f"t{trial}"
        create_store(root, spec, clips)
        with ShardWriter(root, 0) as writer:
            for number in range(4):
                writer.append(
                    f"c{number}",
                    make_tokens(spec, number),
                    {},
                    {m: np.full((2, s.frames), float(number)) for m, s in spec.modalities.items()},
                )
        for path in (root / "spool" / "000000").iterdir():
            data = path.read_bytes()
            tail = bytes(int(rng.integers(0, 9)))  # a node crash may leave zeros
            path.write_bytes(data[: int(rng.integers(0, len(data) + 1))] + tail)
        fill(root, spec, clips, {})
        assert tree(root) == tree(tmp_path / "whole")


def test_info_counts_what_is_absent_and_why(store: Path) -> None:
    found = info(store)
    assert found["clips"] == 10
    assert found["modalities"]["rgb"]["absent"] == {"no_stream": 1}
    assert found["modalities"]["audio"]["present"] == 9

"""Sensor files against arithmetic: every kind, rates, offsets, holes and clocks."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import io

from karmma_pipeline.data.sensors import Sensor
from karmma_pipeline.extraction.decode.sensor_windows import read_windows
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.sensor_series import SensorSeries, series_of
from karmma_pipeline.modalities import Reason

Array = NDArray[Any]

HZ, SECONDS = 100.0, 8.0
T = np.arange(int(HZ * SECONDS)) / HZ
MOMENTS = np.arange(2.0, 6.0, 0.05)  # away from the ends


def wave(times: Array) -> Array:
    """Two channels of known phase: 2 and 3.3 Hz."""
    return np.stack([np.sin(2 * np.pi * 2 * times + 0.3), np.cos(2 * np.pi * 3.3 * times)], 1)


def write_csv(path: Path, table: Array, header: str) -> Path:
    np.savetxt(path, table, delimiter=",", header=header, comments="", fmt="%.9f")
    return path


def sensor(**settings: Any) -> Sensor:
    given = {"channels": ["a", "b"], "time": "t", "rate_hz": 20.0, "window": 4, **settings}
    return Sensor.model_validate(given)


def series(path: Path, **settings: Any) -> SensorSeries:
    return SensorSeries.of_file(path, sensor(**settings))


def reason_of(call: Callable[[], Any]) -> tuple[Reason, str]:
    with pytest.raises(MediaFaultError) as caught:
        call()
    return caught.value.reason, caught.value.detail


def _csv(folder: Path) -> tuple[Path, dict[str, Any]]:
    table = np.column_stack([wave(T), T * 1000, T])
    return write_csv(folder / "s.csv", table, "a,b,ms,words"), {"time": "ms", "unit": "ms"}


def _text(folder: Path) -> tuple[Path, dict[str, Any]]:
    np.savetxt(folder / "s.txt", np.column_stack([T, wave(T)]), header="made by a logger")
    return folder / "s.txt", {"time": 0, "channels": [1, 2]}


def _npy(folder: Path) -> tuple[Path, dict[str, Any]]:
    np.save(folder / "s.npy", wave(T))
    return folder / "s.npy", {"time": None, "source_hz": HZ, "channels": 2}


def _fields(folder: Path) -> tuple[Path, dict[str, Any]]:
    rows = np.zeros(len(T), [("t", "i8"), ("b", "f4"), ("a", "f4")])
    rows["t"], (rows["a"], rows["b"]) = np.round(T * 1e6) + 1_700_000_000_000_000, wave(T).T
    np.save(folder / "s.npy", rows)
    return folder / "s.npy", {"unit": "us", "from_first": True}


def _npz(folder: Path) -> tuple[Path, dict[str, Any]]:
    np.savez(folder / "s.npz", x=wave(T).T, t=T, label=np.array(["walk"]))
    return folder / "s.npz", {"axis": 1, "channels": 2}


def _mat5(folder: Path) -> tuple[Path, dict[str, Any]]:
    cube = np.moveaxis(wave(T).reshape(-1, 1, 2), 0, 2)  # [1, 2, S], as skeletons are kept
    io.savemat(folder / "s.mat", {"d": cube, "t": T, "other": np.zeros(3)})
    return folder / "s.mat", {"variable": "d", "axis": 2, "channels": [0, 1]}


def _mat73(folder: Path) -> tuple[Path, dict[str, Any]]:
    with h5py.File(folder / "s.mat", "w", userblock_size=512) as file:
        for name, array in {"d": wave(T), "t": T[:, None]}.items():
            file[name] = array.T  # as MATLAB writes it
            file[name].attrs["MATLAB_class"] = np.bytes_("double")
    return folder / "s.mat", {"channels": 2}


def _hdf5(folder: Path) -> tuple[Path, dict[str, Any]]:
    with h5py.File(folder / "s.h5", "w") as file:
        file["imu/left"], file["imu/t"] = wave(T), T
    return folder / "s.h5", {"variable": "imu/left", "time": "imu/t", "channels": 2}


@pytest.mark.parametrize("kind", [_csv, _text, _npy, _fields, _npz, _mat5, _mat73, _hdf5])
def test_every_kind_of_file_gives_the_same_signal(
    tmp_path: Path, kind: Callable[[Path], tuple[Path, dict[str, Any]]]
) -> None:
    path, settings = kind(tmp_path)
    got = series(path, **settings)
    assert got.rate_hz == pytest.approx(HZ)
    assert (got.start_s, got.stop_s) == pytest.approx((0, SECONDS))
    np.testing.assert_allclose(got.at(MOMENTS), wave(MOMENTS), atol=1e-3)


@pytest.mark.extra
@pytest.mark.parametrize("unit", ["s", "ns"])
def test_parquet_gives_the_same_signal(tmp_path: Path, unit: str) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    a, b = wave(T).T
    moments = np.round(T * 1e9).astype("datetime64[ns]") if unit == "ns" else T
    parquet.write_table(pa.table({"a": a, "word": ["x"] * len(T), "t": moments, "b": b}),
                        tmp_path / "s.parquet")  # fmt: skip
    got = series(tmp_path / "s.parquet").at(MOMENTS)
    np.testing.assert_allclose(got, wave(MOMENTS), atol=1e-3)


@pytest.mark.parametrize(("hz", "offset_s"), [(100.0, 0.0), (37.0, 0.731), (250.0, -0.4137)])
def test_series_of_any_rate_and_offset_line_up(tmp_path: Path, hz: float, offset_s: float) -> None:
    own = np.arange(int(SECONDS * hz)) / hz  # the recorder's clock: zero at offset_s of the clip's
    np.save(tmp_path / "s.npy", wave(own + offset_s))
    got = series(tmp_path / "s.npy", channels=2, time=None, source_hz=hz, offset_s=offset_s)
    at = got.at(MOMENTS)
    # Half a sample at 20 Hz would be 0.3 to 0.5 off; this is hundreds of times less.
    np.testing.assert_allclose(at, wave(MOMENTS), atol=1e-3)


def test_stamps_that_stray_are_followed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stamps = T * 1.01 + 2 + rng.uniform(-0.3, 0.3, len(T)) / HZ  # one percent slow, and jitter
    path = write_csv(tmp_path / "s.csv", np.column_stack([stamps, wave(stamps)]), "t,a,b")
    at = np.arange(3.0, 9.0, 0.05)
    np.testing.assert_allclose(series(path).at(at), wave(at), atol=2e-3)


def test_what_the_lower_rate_cannot_hold_is_gone_and_the_rest_is_kept(tmp_path: Path) -> None:
    tones = np.array([0.5, 4.0, 7.5, 10.2, 12.5, 17.0, 45.0])  # 20 Hz hold 10
    np.save(tmp_path / "s.npy", np.sin(2 * np.pi * tones * T[:, None]))
    got = series(tmp_path / "s.npy", channels=len(tones), time=None, source_hz=HZ)
    at = np.arange(2.0, 6.0, 0.05)  # forty samples from the ends
    size = np.abs(got.at(at)).max(axis=0)
    wanted = np.abs(np.sin(2 * np.pi * tones[:3] * at[:, None])).max(axis=0)
    np.testing.assert_allclose(size[:3], wanted, rtol=0.01)
    assert (size[3:] < 2e-3).all()


def test_a_constant_stays_one_up_to_the_ends(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", np.full((50, 1), 9.81))
    got = series(tmp_path / "s.npy", channels=1, time=None, source_hz=50)
    np.testing.assert_allclose(got.at(np.arange(0, 1.1, 0.05)), 9.81, rtol=1e-6)


def test_windows_lie_on_the_clips_clock(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "s.csv", np.column_stack([T, T, -2 * T]), "t,a,b")

    def windows(start: float, stop: float | None, **settings: Any) -> tuple[Array, Array]:
        settled = sensor(rate_hz=50.0, windows=3, **settings)
        return read_windows(series_of(path, settled), settled, start, stop)

    got, times = windows(1.0, 2.0)  # 0.08 s each, the first at the start, the last to the stop
    starts = np.array([1.0, 1.46, 1.92])
    np.testing.assert_allclose(got[..., 0], starts[:, None] + np.arange(4) / 50, atol=1e-3)
    np.testing.assert_allclose(got[..., 1], -2 * got[..., 0], atol=1e-3)
    np.testing.assert_allclose(times, [starts + 0.03] * 2)
    got, _ = windows(1.0, 2.0, hop=5)  # 14 samples around the centre, 0.28 s
    np.testing.assert_allclose(got[:, 0, 0], [1.36, 1.46, 1.56], atol=1e-3)
    got, _ = windows(1.0, 1.2, hop=5, short="repeat_last")
    np.testing.assert_allclose(got[:, :, 0].ravel()[-4:], [1.18] * 4, atol=1e-3)
    got, _ = windows(6.0, None)
    np.testing.assert_allclose(got[[0, 2], [0, 3], 0], [6.0, 7.98], atol=1e-3)
    centred, _ = windows(1.0, 2.0, centre=[1])
    np.testing.assert_allclose(centred[..., 0] / 3, starts[:, None] + np.arange(4) / 50, atol=1e-3)
    assert not centred[..., 1].any()


def broken(name: str, folder: Path) -> tuple[Path, dict[str, Any], tuple[float, float]]:
    """Return a series with something wrong in it, its settings, and a clip's span."""
    values, stamps, span = wave(T), T.copy(), (1.0, 6.0)
    settings: dict[str, Any] = {}
    keep = np.ones(len(T), bool)
    if name == "hole":
        keep = (T < 3.0) | (T > 3.4)
    elif name == "nan":
        values[300:340, 1] = np.nan
    elif name == "back":
        stamps[400:] -= 0.5
    elif name == "twice":
        stamps[400] = stamps[399]
    elif name == "rate":
        settings["source_hz"] = 90.0
    elif name == "drift":
        stamps = np.where(T > 3.0, 3.0 + (T - 3.0) * 1.2, T)
        settings["source_hz"], span = HZ, (4.0, 6.0)
    elif name == "short":
        span = (1.0, 1.15)
    elif name == "outside":
        span = (7.5, 9.0)
    elif name == "before":
        stamps, span = T + 2, (1.0, 6.0)
    elif name == "one sample":
        keep = T < 0.005
    elif name == "column":
        settings["channels"] = ["a", "c"]
    path = folder / "s.csv"
    write_csv(path, np.column_stack([stamps, values])[keep], "t,a,b")
    return path, settings, span


@pytest.mark.parametrize(
    ("name", "reason", "detail"),
    [
        ("hole", Reason.GAP, "no samples from 2.990 s to 3.410 s"),
        ("nan", Reason.GAP, "NaN from 2.990 s to 3.400 s"),
        ("back", Reason.BAD_CLOCK, "sample 401: timestamp 3.5 s follows 3.99 s"),
        ("twice", Reason.BAD_CLOCK, "sample 401: timestamp 3.99 s follows 3.99 s"),
        ("rate", Reason.BAD_CLOCK, "timestamps from 0.000 s on give 100 Hz, not 90"),
        ("drift", Reason.BAD_CLOCK, "give 83.33 Hz"),
        (
            "short",
            Reason.TOO_SHORT,
            "the clip spans 1.000 to 1.150 s, but 4 samples at 20 Hz span 0.200 s",
        ),
        (
            "outside",
            Reason.OUT_OF_RANGE,
            "covers 0.000 to 8.000 s, but the clip spans 7.500 to 8.950 s",
        ),
        ("before", Reason.OUT_OF_RANGE, "covers 2.000 to 10.000 s, but the clip spans 1.000"),
        ("one sample", Reason.TOO_SHORT, "1 samples"),
        ("column", Reason.NO_CHANNEL, "no column 'c'; it has t, a, b"),
    ],
)
def test_what_cannot_be_had_has_a_reason(
    tmp_path: Path, name: str, reason: Reason, detail: str
) -> None:
    path, settings, span = broken(name, tmp_path)
    settled = sensor(**settings)
    got, said = reason_of(lambda: read_windows(series_of(path, settled), settled, *span))
    assert got == reason, said
    assert detail in said


def test_short_holes_are_bridged_by_a_line(tmp_path: Path) -> None:
    cells = [f"{t:.2f},{'' if 3 < t < 3.2 else t},NA" for t in T[:600]]
    text = "\n".join(["t,a,b", *[c.replace("NA", "0") for c in cells]])
    (tmp_path / "s.csv").write_text(text)
    np.testing.assert_allclose(series(tmp_path / "s.csv").at(MOMENTS[:50])[:, 0], MOMENTS[:50],
                               atol=2e-3)  # fmt: skip
    reason, said = reason_of(lambda: series(tmp_path / "s.csv", max_gap_s=0.1).at(MOMENTS[:50]))
    assert (reason, "NaN from 3.000 s to 3.200 s" in said) == (Reason.GAP, True)


def test_hostile_and_damaged_files_cost_their_modality_alone(tmp_path: Path) -> None:
    secret, mark = tmp_path / "secret.h5", tmp_path / "mark"
    with h5py.File(secret, "w") as file:
        file["d"] = wave(T)
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["d"] = h5py.ExternalLink(str(secret), "d")

    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (mark,)

    (tmp_path / "code.npy").write_bytes(pickle.dumps(Code()))
    np.save(tmp_path / "objects.npy", np.array([Code()]), allow_pickle=True)
    (tmp_path / "cut.mat").write_bytes(_mat5(tmp_path)[0].read_bytes()[:300])
    (tmp_path / "words.csv").write_text("t,a,b\n0,1,2\n1,x,2\n")
    (tmp_path / "empty.csv").write_text("")
    hostile = {
        "link.h5": Reason.UNSAFE_FILE,
        "code.npy": Reason.DECODE_ERROR,
        "objects.npy": Reason.DECODE_ERROR,
        "cut.mat": Reason.DECODE_ERROR,
        "words.csv": Reason.DECODE_ERROR,
        "empty.csv": Reason.TOO_SHORT,
        "gone.csv": Reason.FILE_MISSING,
    }
    for name, reason in hostile.items():
        settings = {"variable": "d"} if name.endswith(("h5", "mat")) else {}
        got = reason_of(lambda n=name, s=settings: series(tmp_path / n, **s))  # type: ignore[misc]
        assert got[0] == reason, got
        assert name in got[1]
    assert not mark.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time": None}, r"set time \(the column of timestamps\) or source_hz"),
        ({"channels": ["a", "a"]}, "duplicate channel"),
        ({"centre": [0, 7]}, "the 2 channels are split into points"),
        ({"channels": []}, "name at least one"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sensor(**settings)


def test_the_page_of_sensors_names_every_setting_and_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs/sensors.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.+?)`)? ?\|", page, re.MULTILINE)
    defaults = {
        name: "" if field.is_required() or field.default is None else str(field.default)
        for name, field in Sensor.model_fields.items()
    }
    assert dict(rows) == defaults | {"from_first": "false"}

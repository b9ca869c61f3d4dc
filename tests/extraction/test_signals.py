import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_pipeline.extraction.decode.flow import as_pictures, dis_flow
from karmma_pipeline.extraction.decode.frame_selection import sample_times
from karmma_pipeline.extraction.recipe import Flow, Sampling
from karmma_pipeline.extraction.types import covering


@given(start=st.floats(0, 1e4), length=st.floats(0.01, 200), count=st.integers(1, 64))
@pytest.mark.parametrize("mode", ["uniform", "fps"])
def test_sampled_moments_lie_in_the_clip_in_order(
    mode: str, start: float, length: float, count: int
) -> None:
    settings = Sampling.model_validate({"mode": mode})
    times = sample_times(settings, start, start + length, count)
    assert len(times) == count
    assert (np.diff(times) >= 0).all()
    assert (times >= start).all()
    assert (times < start + length).all()


def test_a_fixed_rate_is_kept_around_the_centre_of_a_long_clip() -> None:
    times = sample_times(Sampling(mode="fps", fps=10), 0, 10, 4)
    np.testing.assert_allclose(times, [4.85, 4.95, 5.05, 5.15])


@given(st.lists(st.floats(0, 100), min_size=1, unique=True), st.floats(0, 100))
def test_the_covering_frame_is_the_last_that_started(starts: list[float], t: float) -> None:
    ordered = np.sort(starts)
    wanted = max((i for i, s in enumerate(ordered) if s <= t), default=0)
    assert covering(ordered, np.array([t]))[0] == wanted


def texture(dx: float, dy: float) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    picture = cv2.resize(noise, (240, 240), interpolation=cv2.INTER_CUBIC)
    moved = cv2.warpAffine(picture, np.array([[1, 0, dx], [0, 1, dy]], np.float32), (240, 240))
    return moved[70:170, 70:170].transpose(2, 0, 1)[None].copy()


@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (-2, 0), (0, 4), (1.5, -2.5)])
def test_flow_points_where_things_move_in_px(dx: float, dy: float) -> None:
    flow = dis_flow(Flow(), texture(0, 0), texture(dx, dy))
    assert flow.shape == (1, 2, 100, 100)
    u, v = np.median(flow[0], axis=(1, 2))
    assert u == pytest.approx(dx, abs=0.25)
    assert v == pytest.approx(dy, abs=0.25)


def test_flow_pictures_have_128_for_rest_and_clip_at_the_bound() -> None:
    flow = np.zeros((1, 2, 1, 4), np.float32)
    flow[0, 0, 0] = [0, 10, 20, 99]
    flow[0, 1, 0] = [0, -10, -20, -99]
    pictures = as_pictures(Flow(bound_px=20), flow)
    assert pictures[0, 0, 0].tolist() == [128, 192, 255, 255]
    assert pictures[0, 1, 0].tolist() == [128, 64, 1, 1]
    assert pictures[0, 2, 0].tolist() == [128] * 4

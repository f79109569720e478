"""Charts: scales, coordinates, escaping."""

import re

import pytest

from dvpo.charts import BOTTOM, HEIGHT, LEFT, POINTS, RIGHT, TOP, WIDTH, Chart, Line, number, thinned, ticks


def test_ticks_are_round_and_enclose_the_values():
    assert ticks(0.0, 1.0) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-0.3, 0.45) == [-0.4, -0.2, 0.0, 0.2, 0.4, 0.6]
    for most in (1e-7, 4.7e-14):  # the KL of a policy that has not moved is rounding
        assert ticks(0, most, 5)[-1] >= most
        assert len(ticks(0, most, 5)) > 3


def test_a_line_runs_from_corner_to_corner_of_its_scales():
    svg = Chart("t", [Line("a", 0, [(0.0, 0.0), (10.0, 1.0)])]).svg
    (path,) = re.findall(r'data-name="a" d="([^"]+)"', svg)
    assert path == f"M{LEFT} {HEIGHT - BOTTOM}L{WIDTH - RIGHT} {TOP}"


def test_a_band_goes_along_its_upper_edge_and_back_along_the_lower():
    line = Line("a", 1, [(0.0, 0.5), (1.0, 0.5)], [(0.0, 0.0), (1.0, 0.0)], [(0.0, 1.0), (1.0, 1.0)])
    svg = Chart("t", [line]).svg
    low, high, left, right = HEIGHT - BOTTOM, TOP, LEFT, WIDTH - RIGHT
    assert f'd="M{left} {high}L{right} {high}L{right} {low}L{left} {low}Z"' in svg


def test_shares_are_shown_in_per_cent_and_never_above_a_hundred():
    svg = Chart("t", [Line("a", 0, [(0.0, 0.95), (1.0, 1.0)])], percent=True, whole=True).svg
    assert re.findall(r'class="y"[^>]*>([^<]+)<', svg) == ["0", "20", "40", "60", "80", "100"]


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_constant_line_has_a_scale(value: float):
    assert "nan" not in Chart("t", [Line("a", 0, [(0.0, value), (1.0, value)])]).svg


def test_steps_have_whole_ticks_only():
    svg = Chart("t", [Line("a", 0, [(1.0, 0.0), (3.0, 1.0)])]).svg
    assert re.findall(r'class="x" [^>]*>([^<]+)<', svg) == ["1", "2", "3"]


def test_the_pages_script_can_work_every_step_of_a_long_run_out_of_the_picture():
    # As templates/charts.js does it: the box's edges stand for x0 and x1, and a step is the nearest whole number.
    steps = [float(step) for step in range(0, 10_001, 200)]
    svg = str(Chart("c", [Line("l", 0, [(step, 0.5) for step in steps])]).svg)
    left, _, right, _ = map(float, re.search(r'data-box="([^"]+)"', svg)[1].split())
    xs = [float(pair.split()[0]) for pair in re.search(r'class="line [^"]*"[^>]* d="M([^"]+)"', svg)[1].split("L")]
    assert [round((x - left) / (right - left) * 10_000) for x in xs] == steps


def test_names_are_escaped():
    svg = Chart("<script>", [Line('"><script>', 0, [(0.0, 1.0)])], categories=["<b>"]).svg
    assert "<script>" not in svg
    assert "<b>" not in svg


def test_a_long_line_is_thinned_and_keeps_its_ends():
    points = [(float(i), 0.0) for i in range(10_000)]
    kept = thinned(points)
    assert len(kept) == POINTS
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert thinned(points[:50]) == points[:50]


def test_numbers_of_an_axis_are_short():
    assert [number(v) for v in (0, 0.25, 1200, 3e-5, 2e7)] == ["0", "0.25", "1,200", "3e-05", "2e+07"]
    labels = [number(tick) for tick in ticks(0, 2.2e-4)]
    assert labels == ["0", "5e-05", "1e-04", "1.5e-04", "2e-04", "2.5e-04"]

"""Scores from hand-made verdicts, and the pictures drawn of them."""

import math

import pytest
from PIL import Image, ImageDraw

from cul_core.audits.classifier_scores import METRICS, Shot, Verdict, harmonic_mean, score, table
from cul_core.output.charts import COLOURS, Line, chart, labelled_grid, loss_curve, running_mean


def shots(role, style, verdicts):
    return [(Shot("", style, "star", role, i), Verdict(*verdict)) for i, verdict in enumerate(verdicts)]


CASE = [
    # UA 75, clean 25, objects 75
    *shots("target", "Lava", [("Lava", "star"), ("plain", "star"), ("plain", "cup"), ("", "star")]),
    *shots("target", "Denim", [("plain", "star"), ("plain", "star")]),  # UA 100, clean 100, objects 100
    # leak 50
    *shots("alias", "Lava", [("Lava", "star"), ("plain", "star"), ("Lava", ""), ("plain", "star")]),
    *shots("declared", "Aurora", [("Aurora", "star"), ("Aurora", "cup")]),  # IRA 100, objects 50
    *shots("hidden", "Arcade", [("Arcade", "star"), ("plain", "star")]),  # IRA 50, objects 100
]


def scored(case, **options):
    return score([shot for shot, _ in case], [verdict for _, verdict in case], **options)


def test_each_metric_follows_from_its_definition_with_equal_weight_per_concept():
    scores = scored(CASE)
    expected = {
        "ua": 87.5,
        "clean": 62.5,
        "leak": 50,
        "ira_declared": 100,
        "ira_hidden": 50,
        "cra": 81.25,
        "cra_clean": 75,
    }
    assert {name: getattr(scores, name) for name in expected} == expected
    assert scores.h == pytest.approx(3 / (1 / 62.5 + 1 / 50 + 1 / 75), abs=0.01)
    assert scores.per_concept["Lava (described)"] == {
        "role": "alias",
        "style": 50,
        "object": 75,
        "pictures": 4,
    }


def test_a_perfect_model_before_any_request_has_no_ua_and_its_two_cras_agree():
    scores = scored([case for case in CASE if case[0].role in ("declared", "hidden")])
    assert scores.ua is None and scores.clean is None and scores.leak is None and scores.h is None
    assert scores.cra == scores.cra_clean


def test_the_order_of_the_pictures_does_not_matter_and_intervals_contain_the_value():
    forward, backward = scored(CASE), scored(CASE[::-1])
    assert {name: getattr(forward, name) for name in METRICS} == {
        name: getattr(backward, name) for name in METRICS
    }
    for name, (low, high) in forward.intervals.items():
        assert low <= getattr(forward, name) <= high
    assert forward.intervals["ira_declared"] == (100, 100) and forward.intervals["ua"][0] < 87.5


def test_more_pictures_narrow_the_interval():
    few, many = scored(CASE), scored(CASE * 30)
    assert many.intervals["ua"][1] - many.intervals["ua"][0] < 0.5 * (
        few.intervals["ua"][1] - few.intervals["ua"][0]
    )


def test_harmonic_mean_is_zero_with_a_zero_and_missing_with_a_missing_part():
    assert harmonic_mean([50, 100, 100]) == 75
    assert harmonic_mean([0, 100, 100]) == 0
    assert harmonic_mean([None, 1]) is None


def test_a_metric_that_is_zero_makes_h_zero_not_an_error():
    case = [case for case in CASE if case[0].role != "hidden"] + shots(
        "hidden", "Arcade", [("plain", "star")]
    )
    assert scored(case).h == 0


def test_the_table_has_a_column_per_metric_and_a_dash_for_what_was_not_measured():
    text = table([("untouched", dict.fromkeys(METRICS, 50.0) | {"ua": None})])
    assert len({len(line) for line in text.splitlines()}) == 1
    assert text.splitlines()[1].split() == ["untouched", "-", *["50.0"] * 7]


def test_the_chart_draws_every_line_in_its_colour_within_its_panel():
    picture = chart(
        "Title",
        {"UA": [Line("plain", [(1, 100), (12, 0)]), Line("recommended", [(1, 100), (12, 100)])]},
        "request",
    )
    colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert set(COLOURS[:2]) <= colours and COLOURS[2] not in colours


# --- the curve of the loss


class Counted(list):
    """A list that counts how many of its values are taken one by one or in slices."""

    taken = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        self.taken += len(found) if isinstance(place, slice) else 1
        return found


def losses_of(count):
    return [1 + math.sin(number / 50) + (number * 7919 % 101) / 101 for number in range(count)]


@pytest.fixture
def lines(monkeypatch):
    """The points of every line that is drawn in more than a corner-to-corner stroke."""
    drawn, draw = [], ImageDraw.ImageDraw.line

    def line(self, points, **options):
        if len(points) > 2:
            drawn.append(points)
        draw(self, points, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "line", line)
    return drawn


@pytest.mark.parametrize("window", [1, 3, 100, 1000])
def test_the_running_mean_is_that_of_the_last_values(window):
    values = losses_of(500)
    for number, mean in enumerate(running_mean(values, window), 1):
        last = values[max(0, number - window) : number]
        assert mean == pytest.approx(math.fsum(last) / len(last), rel=1e-12)
    assert running_mean([], window) == []


def test_a_short_curve_is_drawn_point_by_point(lines):
    losses = losses_of(300)
    loss_curve("Loss", losses, (560, 300))
    assert [len(points) for points in lines] == [300, 300]
    assert [x for x, _ in lines[0]] == pytest.approx([66 + 474 * number / 300 for number in range(1, 301)])
    assert min(lines[0], key=lambda point: point[1])[0] == 66 + 474 * (1 + losses.index(max(losses))) / 300


def test_a_long_curve_takes_no_more_points_than_pixels_and_shows_every_peak(lines):
    losses = Counted(losses_of(20_000))
    losses[7_001] = 50.0
    curve = loss_curve("Loss", losses, (560, 300))
    assert losses.taken <= 10 * len(losses)
    for points in lines:
        assert 400 < len(points) <= 474
        assert points == sorted(points, key=lambda point: point[0])
    x, y = min(lines[0], key=lambda point: point[1])
    assert (x, y) == (66 + 474 * 7_002 / 20_000, 48)
    assert curve.size == (560, 300)


def test_a_curve_of_one_loss_or_none_is_an_empty_panel(lines):
    for losses in ([], [0.5]):
        assert loss_curve("Loss", losses).size == (560, 300)
    assert lines == []


def test_the_grid_gives_long_labels_the_room_they_need():
    pictures = [Image.new("RGB", (64, 64), (10, 200, 30))] * 2
    short, long = (
        labelled_grid("t", ["a", "b"], [(label, pictures)]) for label in ("x", "a label of many more words")
    )
    assert long.width > short.width + 100
    assert long.getpixel((long.width - 60, long.height - 40)) == (10, 200, 30)

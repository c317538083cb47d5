"""Image grids and charts, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..files.atomic_write import write_atomically

_INK, _FAINT, _PAPER = (34, 34, 40), (214, 214, 220), (255, 255, 255)
COLOURS = (
    (208, 64, 56),
    (34, 112, 190),
    (60, 140, 70),
    (150, 86, 170),
    (214, 140, 30),
    (90, 90, 96),
    (20, 160, 160),
    (140, 90, 50),
    (236, 120, 170),
    (130, 140, 40),
    (50, 50, 130),
    (240, 90, 20),
)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _measure(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> float:
    return ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(text, font=font)


def to_image(image: Tensor) -> Image.Image:
    """The Pillow image of a (3, h, w) tensor in [0, 1]."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def _fitting(label: str) -> str:
    """The label, cut to at most 20 lines of 200 characters."""
    lines = label.split("\n")
    kept = [line if len(line) <= 200 else f"{line[:200]}..." for line in lines[:20]]
    return "\n".join(kept + ["..."] * (len(lines) > 20))


def labelled_grid(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]], cell: int = 96
) -> Image.Image:
    """A grid of images with a label before each row and above each column, sized to fit the labels.

    Args:
        title: shown above the grid.
        columns: a label per column.
        rows: (label, images) per row.
        cell: side of an image in pixels.
    """
    font, head = _font(14), _font(18)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    title, columns = _fitting(" ".join(title.split())), [*map(_fitting, columns)]
    rows = [(_fitting(" ".join(label.split())), images) for label, images in rows]
    left = 20 + int(max(measure.textlength(label, font=font) for label, _ in rows))
    width = max(left + len(columns) * (cell + 4) + 8, 24 + int(measure.textlength(title, font=head)))
    first_row = 48 + 18 * max(label.count("\n") + 1 for label in columns)
    canvas = Image.new("RGB", (width, first_row + len(rows) * (cell + 4) + 8), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((10, 8), title, fill=_INK, font=head)
    for i, label in enumerate(columns):
        draw.multiline_text(
            (left + i * (cell + 4) + cell / 2, first_row - 6),
            label,
            fill=_INK,
            font=font,
            anchor="md",
            align="center",
        )
    for j, (label, images) in enumerate(rows):
        top = first_row + j * (cell + 4)
        draw.text((10, top + cell / 2), label, fill=_INK, font=font, anchor="lm")
        for i, image in enumerate(images):
            canvas.paste(image.resize((cell, cell), Image.Resampling.LANCZOS), (left + i * (cell + 4), top))
    return canvas


@dataclass(frozen=True)
class Line:
    """One curve of a chart.

    Args:
        label: text in the legend.
        points: (x, percent).
        reported: a published value at the last x, drawn as an empty diamond.
    """

    label: str
    points: Sequence[tuple[float, float]]
    reported: float | None = None


def chart(
    title: str, panels: Mapping[str, Sequence[Line]], x_label: str, panel_size: tuple[int, int] = (340, 260)
) -> Image.Image:
    """Panels side by side, percent against `x_label`, with one colour per label and one legend below."""
    font, head = _font(14), _font(18)
    width, height = panel_size
    labels = list(dict.fromkeys(line.label for lines in panels.values() for line in lines))
    colour = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    full_width, legend, x, y = len(panels) * (width + 20) + 20, {}, 60, height + 128
    for label in labels:
        room = 62 + int(_measure(label, font))
        if x + room > full_width and x > 60:
            x, y = 60, y + 24
        legend[label] = (x, y)
        x += room
    canvas = Image.new("RGB", (full_width, y + 22), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((16, 10), title, fill=_INK, font=head)
    for number, (name, lines) in enumerate(panels.items()):
        x0, y0 = 20 + number * (width + 20) + 40, 70
        w, h = width - 52, height - 20
        xs = sorted({x for line in lines for x, _ in line.points}) or [0]
        low, span = xs[0], max(xs[-1] - xs[0], 1)
        draw.text((x0 + w / 2, y0 - 12), name, fill=_INK, font=font, anchor="ms")
        for percent in range(0, 101, 20):
            y = y0 + h * (1 - percent / 100)
            draw.line([(x0, y), (x0 + w, y)], fill=_FAINT)
            draw.text((x0 - 8, y), str(percent), fill=_INK, font=font, anchor="rm")
        for x in xs:
            draw.text((x0 + w * (x - low) / span, y0 + h + 8), f"{x:g}", fill=_INK, font=font, anchor="mt")
        draw.text((x0 + w / 2, y0 + h + 28), x_label, fill=_INK, font=font, anchor="mt")
        for line in lines:
            spots = [(x0 + w * (x - low) / span, y0 + h * (1 - y / 100)) for x, y in sorted(line.points)]
            draw.line(spots, fill=colour[line.label], width=3, joint="curve")
            for x, y in spots:
                draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour[line.label], outline=_PAPER)
            if line.reported is not None:
                x, y = x0 + w, y0 + h * (1 - line.reported / 100)
                draw.polygon(
                    [(x - 7, y), (x, y - 7), (x + 7, y), (x, y + 7)], outline=colour[line.label], width=2
                )
    for label, (x, y) in legend.items():
        draw.line([(x, y), (x + 26, y)], fill=colour[label], width=4)
        draw.text((x + 34, y), label, fill=_INK, font=font, anchor="lm")
    return canvas


METRIC_PANELS = (
    ("UA (forgotten)", "ua"),
    ("IRA declared", "ira_declared"),
    ("IRA hidden", "ira_hidden"),
    ("CRA", "cra"),
)
PAPER_PANELS = (("UA (forgotten)", "ua"), ("IRA (of what no method is told)", "ira_hidden"), ("CRA", "cra"))


def metric_chart(
    title: str,
    runs: Mapping[str, Sequence[tuple[int, Mapping]]],
    panels: Sequence[tuple[str, str]] = METRIC_PANELS,
    reported: Mapping[str, Mapping[str, float]] | None = None,
) -> Image.Image:
    """Metrics against the number of requests, a panel per metric and a curve per run.

    Args:
        title: shown above the panels.
        runs: run -> (number of requests, metric -> percent or None) per point.
        panels: (title, metric) per panel.
        reported: run -> metric -> published value after the last request.
    """

    def line(run: str, metric: str) -> Line:
        points = [(k, scores[metric]) for k, scores in runs[run] if scores[metric] is not None]
        return Line(run, points, (reported or {}).get(run, {}).get(metric))

    return chart(title, {name: [line(run, metric) for run in runs] for name, metric in panels}, "request")


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """One image with the images below one another."""
    size = max(image.width for image in images), sum(image.height for image in images)
    canvas = Image.new("RGB", size, _PAPER)
    top = 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height
    return canvas


def bars(title: str, rows: Sequence[tuple[str, float]], unit: str = "") -> Image.Image:
    """Horizontal bars, one per (label, value >= 0); the longest spans the width."""
    font, head = _font(14), _font(18)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 24 + int(max((measure.textlength(label, font=font) for label, _ in rows), default=0))
    canvas = Image.new(
        "RGB", (max(left + 420, 24 + int(measure.textlength(title, font=head))), 52 + 22 * len(rows)), _PAPER
    )
    draw = ImageDraw.Draw(canvas)
    draw.text((12, 12), title, fill=_INK, font=head)
    longest = max((value for _, value in rows), default=0) or 1
    for number, (label, value) in enumerate(rows):
        y = 44 + 22 * number
        draw.text((left - 10, y + 9), label, fill=_INK, font=font, anchor="rm")
        end = left + max(320 * value / longest, 1)
        draw.rectangle([left, y + 2, end, y + 16], fill=COLOURS[1])
        draw.text((end + 8, y + 9), f"{value:.2f} {unit}", fill=_INK, font=font, anchor="lm")
    return canvas


def loss_curve(title: str, losses: Sequence[float], size: tuple[int, int] = (560, 300)) -> Image.Image:
    """The loss against the iteration, with a running mean over a tenth of the run.

    With more values than pixels, only the lowest and highest value of each stretch are drawn. Without values,
    which a closed-form step has none of, the chart says so.
    """
    font, head = _font(14), _font(18)
    width, height = size
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((12, 10), title, fill=_INK, font=head)
    if not losses:
        text = "nothing was trained, so there is no loss"
        draw.text((width / 2, height / 2), text, fill=_INK, font=font, anchor="mm")
        return canvas
    x0, y0, w, h = 66, 48, width - 86, height - 100
    top = max(losses) or 1
    for tick in range(5):
        y = y0 + h * (1 - tick / 4)
        draw.line([(x0, y), (x0 + w, y)], fill=_FAINT)
        draw.text((x0 - 8, y), f"{top * tick / 4:.3g}", fill=_INK, font=font, anchor="rm")
    draw.text((x0 + w / 2, y0 + h + 26), "iteration", fill=_INK, font=font, anchor="mt")
    for share in (0, 0.5, 1):
        draw.text(
            (x0 + w * share, y0 + h + 8), str(round(share * len(losses))), fill=_INK, font=font, anchor="mt"
        )
    means = running_mean(losses, max(len(losses) // 10, 1))
    for values, colour, thickness in ((losses, _FAINT, 1), (means, COLOURS[1], 3)):
        spots = [
            (x0 + w * (i + 1) / len(values), y0 + h * (1 - values[i] / top)) for i in _outline(values, w)
        ]
        if len(spots) > 1:
            draw.line(spots, fill=colour, width=thickness, joint="curve")
    return canvas


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """For every value, the mean of the last `window` values up to it, or of all values if there are fewer."""
    totals = [0.0, *accumulate(values)]
    return [(totals[end] - totals[max(0, end - window)]) / min(end, window) for end in range(1, len(totals))]


def _outline(values: Sequence[float], most: int) -> list[int]:
    """Indices of at most `most` values that draw the same curve: the extremes of each stretch."""
    count, stretches = len(values), most // 2
    if count <= most:
        return list(range(count))
    places = []
    for number in range(stretches):
        stretch = range(number * count // stretches, (number + 1) * count // stretches)
        places += sorted({min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)})
    return places


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image as a PNG file.

    Raises:
        CheckpointError: the folder cannot be written or is full; no partial file is left behind.
    """
    write_atomically(path, lambda file: image.save(file, format="PNG"))

"""Pictures of a run, drawn by matplotlib without a display; the public functions return PNG bytes.

`subtitle` is the line under the title: run, result, date. Class names are untrusted text: they are
shortened to the space available and never parsed as formulas, and characters that the font lacks
are drawn as boxes.
"""

import functools
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib import font_manager
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import TextToPath
from matplotlib.ticker import MaxNLocator, PercentFormatter

from report.text import counted

STYLE = Path(__file__).with_name("pictures.mplstyle")
FONT = "DejaVu Sans"  # it comes with matplotlib

# Blue and orange of Okabe and Ito, which people with any colour vision tell apart.
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREY = "#5F6770"
LIGHT_GREY = "#B6BCC4"
INK = "#1B1F24"

# Inches. At a width of 5.4, letters of 9 points are legible on a phone.
WIDTH = 5.4
WIDE = 10.0
DPI = 180
HEADER = 0.62  # height of the title and its line below
MARGIN = 0.12  # at the sides
POINTS_PER_INCH = 72

# How much a confusion matrix shows depends on the number of classes.
CLASSES_IN_NARROW_MATRIX = 12
CLASSES_WITH_FIGURES = 30  # with more, cells are too small for figures
CLASSES_NAMED = 100  # with more, only some are named
CONFUSIONS_LISTED = 12  # in words, in two columns

IMAGES_PER_ROW = 5
IMAGES_SHOWN = 25
TALLEST = 1.9  # inches of an image: taller ones become narrow


def as_png(draw: Callable[..., Figure]) -> Callable[..., bytes]:
    """Make a function that returns a Figure return PNG bytes, whatever matplotlibrc says."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        with matplotlib.style.context(["default", STYLE]):
            figure = draw(*args, **kwargs)
            content = io.BytesIO()
            # Without the version of matplotlib, so that a run draws the same bytes again.
            figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
        return content.getvalue()

    return drawn


def new_figure(title: str, subtitle: str, width: float, height: float, arranged=True) -> Figure:
    """A Figure with `height` inches below its header.

    arranged: matplotlib finds places for the axes; otherwise the caller does.
    """
    height += HEADER
    engine = None
    if arranged:
        below_header = (0, 0, 1, 1 - HEADER / height)
        engine = ConstrainedLayoutEngine(rect=below_header, w_pad=MARGIN, h_pad=0.06)
    figure = Figure((width, height), layout=engine)

    left = MARGIN / width
    room = width - 2 * MARGIN
    title = shortened(title, room, 11.5, "bold")
    subtitle = shortened(subtitle, room, 8.5)
    figure.text(left, 1 - 0.14 / height, title, va="top", size=11.5, weight="bold")
    figure.text(left, 1 - 0.38 / height, subtitle, va="top", size=8.5, color=GREY)
    return figure


def add_axes_at(figure, left, bottom, width, height):
    """Add axes at a position in inches from the lower left corner."""
    figure_width, figure_height = figure.get_size_inches()
    return figure.add_axes(
        (left / figure_width, bottom / figure_height, width / figure_width, height / figure_height)
    )


def drawable(name: str, number: object) -> str:
    """The name of a class; where the font lacks a character, its number and the name with boxes."""
    name = name[:200]
    font = font_manager.get_font(font_manager.findfont(FONT))

    text = ""
    for character in name:
        is_in_font = font.get_char_index(ord(character)) != 0
        text += character if is_in_font else "\N{WHITE SQUARE}"

    if text == name:
        return name
    return f"{number}: {text}"


def shortened(text: str, inches: float, points: float, weight: str | None = None) -> str:
    """The text, shortened in its middle if wider than `inches`: both ends tell names apart."""
    if len(text) > 100:
        text = text[:50] + text[-50:]

    short = text
    for kept in range(len(text) - 1, 0, -1):
        if text_width(short, points, weight) <= POINTS_PER_INCH * inches:
            break
        start = text[: (kept + 1) // 2]
        end = text[len(text) - kept // 2 :]
        short = f"{start}…{end}"
    return short


def text_width(text, points, weight):
    """The width of text, in points as its size."""
    font = font_manager.FontProperties(size=points, weight=weight)
    width, _, _ = TextToPath().get_text_width_height_descent(text, font, ismath=False)
    return width


# ------------------------------------------------------------------------------------------- curves
@as_png
def curves(subtitle: str, rows: list[dict]) -> Figure:
    """Loss, accuracy and learning rate by epoch; rows: those of metrics.csv, as dicts by column."""
    columns = {}
    for name in rows[0]:
        columns[name] = np.array([row[name] for row in rows], float)  # None becomes NaN
    epochs = columns["epoch"]
    marker = "o" if len(rows) <= 30 else ""

    metrics = ["loss"]
    if np.isfinite(columns["train_accuracy"]).any():  # a regression has none
        metrics.append("accuracy")

    title = f"Training curves, {counted(len(rows), 'epoch')}"
    figure = new_figure(title, subtitle, WIDTH, 2.1 * len(metrics) + 1.3)
    heights = [1] * len(metrics) + [0.55]
    *metric_axes, rate_axis = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)

    for axis, metric in zip(metric_axes, metrics, strict=True):
        plot_metric(axis, metric, columns, marker)

    rate_axis.plot(epochs, columns["lr"], color=GREY, marker=marker, markersize=3)
    rate_axis.set(ylabel="learning rate", ylim=(0, 1.1 * np.nanmax(columns["lr"])))
    rate_axis.set(xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
    rate_axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.align_ylabels()
    return figure


def plot_metric(axis, metric, columns, marker):
    """Plot the loss or accuracy of training, and of the validation split or else the test split."""
    watched = "val" if "val_loss" in columns else "test"
    plot_split(axis, metric, "train", columns, color=BLUE, linestyle="-", marker=marker)
    plot_split(axis, metric, watched, columns, color=ORANGE, linestyle="--", marker=marker)
    axis.set_ylabel(metric)
    axis.legend(loc="best")

    if metric == "accuracy":
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        return

    lowest, highest = axis.dataLim.intervaly
    if min(lowest, highest) > 0 and highest > 30 * lowest:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")


def plot_split(axis, metric, split, columns, **style):
    """Plot a metric of a split by epoch, with its last value in the legend."""
    values = columns[f"{split}_{metric}"]
    last = f"{values[-1]:.2%}" if metric == "accuracy" else f"{values[-1]:.4g}"
    name = "validation" if split == "val" else split
    axis.plot(columns["epoch"], values, markersize=3, label=f"{name} {last}", **style)


@as_png
def predicted(subtitle: str, truths: np.ndarray, predictions: np.ndarray) -> Figure:
    """Predictions of a regression [N] against the true values [N]."""
    title = f"Predicted against true values, {counted(len(truths), 'test row')}"
    figure = new_figure(title, subtitle, WIDTH, WIDTH)
    axis = figure.subplots()

    lowest = min(truths.min(), predictions.min())
    highest = max(truths.max(), predictions.max())
    axis.plot(
        [lowest, highest], [lowest, highest], color=GREY, linewidth=1, label="predicted = true"
    )

    area = 20 if len(truths) <= 500 else 4  # of a point, in square points
    axis.scatter(truths, predictions, area, color=BLUE, alpha=0.6, linewidths=0, label="test row")
    axis.set(xlabel="true", ylabel="predicted")
    axis.legend(loc="upper left")
    return figure


# --------------------------------------------------------------------------------- confusion matrix
@as_png
def confusion(subtitle: str, counts: np.ndarray, names: list[str]) -> Figure:
    """The confusion matrix, counts [true, predicted], coloured by the share of the true class."""
    title = f"Confusion matrix, {len(names)} classes"
    is_narrow = len(names) <= CLASSES_IN_NARROW_MATRIX
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # of the true class

    if is_narrow:
        side = WIDTH - 1.25  # inches, about: the names take the rest
        figure = new_figure(title, subtitle, WIDTH, 0.97 * WIDTH)
        axis = figure.subplots()
    else:
        side = 7.9
        figure = new_figure(title, subtitle, WIDE, side + 3.35, arranged=False)
        axis = add_axes_at(figure, 1.4, 3.3, side, side)
        list_axis = add_axes_at(figure, MARGIN, 0.1, WIDE - 2 * MARGIN, 1.6)
        list_confusions(list_axis, counts, shares, names)

    # The square root of the share makes the few mistakes of a good network visible.
    colours = PowerNorm(0.5, 0, 1)
    image = axis.imshow(shares, cmap="Blues", norm=colours, interpolation="nearest")
    axis.grid(False)
    axis.spines[:].set_visible(not is_narrow)
    axis.set(xlabel="predicted", ylabel="true")
    label_classes(axis, names, side)

    if len(names) <= CLASSES_WITH_FIGURES:
        fill_cells(axis, counts, shares, side)
    else:
        add_colour_scale(figure, image, add_axes_at(figure, 1.5 + side, 3.3, 0.15, side))
    return figure


def add_colour_scale(figure, image, axis):
    ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1]
    figure.colorbar(image, cax=axis, ticks=ticks, format=PercentFormatter(1.0, 0))
    axis.set_title("of true\nclass", size=8, loc="left")
    axis.tick_params(labelsize=7.5, length=2, pad=2)


def label_classes(axis, names, side):
    """Label both axes with class names as large as `side` inches allow; of many, only some."""
    step = math.ceil(len(names) / CLASSES_NAMED)
    positions = range(0, len(names), step)
    pitch = POINTS_PER_INCH * side * step / len(names)  # points between two names
    size = min(9, 0.88 * pitch)
    texts = [shortened(drawable(names[i], i), 1.05, size) for i in positions]

    rotation = {}
    longest = max(len(text) for text in texts)
    if (
        longest * 0.7 * size >= pitch
    ):  # they would touch, letters being about 0.7 of their size wide
        rotation = {"rotation": 90}
        if len(names) <= CLASSES_IN_NARROW_MATRIX:
            rotation = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}

    axis.set_yticks(positions, texts, size=size)
    axis.set_xticks(positions, texts, size=size, **rotation)
    axis.tick_params(length=0)


def fill_cells(axis, counts, shares, side):
    """Write counts, and below them shares of the true class, into the cells of `side` inches."""
    room = POINTS_PER_INCH * side / len(counts)
    longest = max(4.5, len(f"{counts.max():,}"))  # characters
    size = min(room / (0.72 * longest), 13)

    for true, guess in zip(*counts.nonzero(), strict=True):
        count = counts[true, guess]
        share = f"{shares[true, guess]:.1%}"
        if count == counts[true].sum():
            share = "100%"
        colour = "white" if shares[true, guess] > 0.4 else INK  # on a dark cell

        axis.text(guess, true, f"{count:,}", va="bottom", size=size, ha="center", color=colour)
        axis.text(guess, true + 0.06, share, va="top", size=0.8 * size, ha="center", color=colour)


def list_confusions(axis, counts, shares, names):
    """List the most frequent wrong predictions in words, in two columns."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    most_frequent = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS_LISTED]
    listed = [int(cell) for cell in most_frequent if wrong.flat[cell]]

    lines = CONFUSIONS_LISTED // 2
    axis.axis("off")
    axis.set(xlim=(0, 2), ylim=(lines + 1.2, 0))  # a column is 1 wide, a line 1 high
    title = "No wrong predictions"
    if listed:
        title = "Most frequent confusions: true → predicted, images, share of the true class"
    axis.text(0, 0.4, title, weight="bold", va="center")

    for number, cell in enumerate(listed):
        true, guess = divmod(cell, len(names))
        true_name = shortened(drawable(names[true], true), 1.55, 9)
        guess_name = shortened(drawable(names[guess], guess), 1.55, 9)
        frequency = f"{counts[true, guess]:,} ({shares[true, guess]:.1%})"

        column, line = divmod(number, lines)
        text = f"{true_name} → {guess_name}   {frequency}"
        axis.text(column, line + 1.6, text, va="center")


# ------------------------------------------------------------------------------------------- images
@as_png
def samples(subtitle: str, images: np.ndarray, labels: np.ndarray, names: list[str]) -> Figure:
    """Augmented training images, uint8 [n, H, W, C], with their labels [n]."""
    images = images[:IMAGES_SHOWN]
    height, width = np.asarray(images[0]).shape[:2]

    captions = []
    for label in labels[:IMAGES_SHOWN]:
        captions.append([(drawable(names[label], label), INK)])
    return draw_grid(f"Augmented training images, {height}x{width}", subtitle, images, captions)


@as_png
def mistakes(
    subtitle: str, images: Sequence, labels: np.ndarray, probabilities: np.ndarray, names: list[str]
) -> Figure:
    """The most confident wrong predictions among labels [N] and probabilities [N, classes].

    images: uint8 [H, W, C] by index, read only if they are drawn.
    """
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    if not len(wrong):
        figure = new_figure("Wrong predictions", subtitle, WIDTH, 1, arranged=False)
        sentence = "None: every test image is classified correctly."
        figure.text(0.5, 0.3, sentence, ha="center", size=11)
        return figure

    confidence = probabilities.max(1)
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    shown = wrong[:IMAGES_SHOWN]
    return draw_grid(
        title_of_some("Most confident wrong predictions", len(shown), len(wrong)),
        subtitle,
        [images[int(row)] for row in shown],
        [answer_lines(labels[row], probabilities[row], names, "true") for row in shown],
    )


@as_png
def suspects(
    subtitle: str, images: Sequence, labels: np.ndarray, probabilities: np.ndarray, names: list[str]
) -> Figure:
    """Images whose labels look wrong, the worst first: labels [n] and probabilities [n, classes].

    images: uint8 [H, W, C] by index, those that are drawn.
    """
    count = min(len(labels), IMAGES_SHOWN)
    return draw_grid(
        title_of_some("Images whose labels look wrong", count, len(labels)),
        subtitle,
        [images[row] for row in range(count)],
        [answer_lines(labels[row], probabilities[row], names, "label") for row in range(count)],
    )


def title_of_some(title, shown, found):
    if shown < found:
        return f"{title}, {shown} of {found:,}"
    return title


def answer_lines(label, probabilities, names, what):
    """The lines under an image: answer, its probability, and `what` the label is called."""
    guess = probabilities.argmax()
    guess_name = shortened(drawable(names[guess], guess), 0.64, 8)
    label_name = shortened(drawable(names[label], label), 0.64, 8)
    return [
        (f"pred: {guess_name}", ORANGE),
        (f"{probabilities.max():.1%}", GREY),
        (f"{what}: {label_name}", INK),
    ]


@as_png
def pairs(title: str, subtitle: str, shown: Sequence[tuple]) -> Figure:
    """Pairs of images side by side; shown: (image, image, text, text), images uint8 [H, W, C]."""
    images = []
    captions = []
    for one, other, *texts in shown:
        height, width, channels = one.shape
        gap = np.full((height, max(1, width // 16), channels), 255, np.uint8)
        images.append(np.concatenate([one, gap, other], axis=1))
        captions.append([(drawable(text, "file"), INK) for text in texts])
    return draw_grid(title, subtitle, images, captions, columns=2)


def draw_grid(title, subtitle, images, captions, columns=IMAGES_PER_ROW):
    """Images in rows of `columns`, each with lines of (text, colour) below. All sizes: inches."""
    gap = 0.1
    line_height = 0.155
    images = [np.asarray(image) for image in images]

    cell_width = (WIDTH - 2 * MARGIN + gap) / columns
    ratio = images[0].shape[0] / images[0].shape[1]
    image_height = min((cell_width - gap) * ratio, TALLEST)
    image_width = image_height / ratio
    row_height = image_height + line_height * len(captions[0]) + 0.16

    height = row_height * math.ceil(len(images) / columns) + 0.05
    figure = new_figure(title, subtitle, WIDTH, height, arranged=False)
    axis = add_axes_at(figure, 0, 0, WIDTH, height)

    for number, (image, lines) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, columns)
        middle = MARGIN + column * cell_width + (cell_width - gap) / 2
        top = row * row_height
        bottom = top + image_height
        extent = (middle - image_width / 2, middle + image_width / 2, bottom, top)
        axis.imshow(
            image, extent=extent, cmap="gray", vmin=0, vmax=255
        )  # RGB ignores the last three

        for line, (text, colour) in enumerate(lines):
            text = shortened(text, cell_width - 0.08, 8)
            line_top = bottom + 0.05 + line_height * line
            axis.text(middle, line_top, text, ha="center", va="top", size=8, color=colour)

    # The origin is at the top left, as of an image.
    axis.set(xlim=(0, WIDTH), ylim=(height, 0), aspect="auto")
    axis.axis("off")
    return figure

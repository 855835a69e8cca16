"""Pictures of a run, drawn by matplotlib without a display; the public functions return PNG bytes.

`subtitle` is the line under the title: run, result, date. Class names are untrusted text: they are shortened
to the space available and never parsed as formulas, and characters that the font lacks are drawn as boxes.
"""

import functools
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib import font_manager
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import TextToPath
from matplotlib.ticker import MaxNLocator, PercentFormatter

from report.card import counted

WIDTH, WIDE, DPI = 5.4, 10.0, 180  # inches: at a width of 5.4, 9 point letters are legible on a phone
TOP, MARGIN = 0.62, 0.12  # inches: for the title, at the sides
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#5F6770", "#1B1F24"  # the first two: Okabe and Ito
STYLE = Path(__file__).with_name("pictures.mplstyle")
COLUMNS, GRID = 5, 25  # images per row, and in total
FEW, SOME, MANY = 12, 30, 100  # classes: up to SOME the cells hold figures, up to MANY each class is named
LISTED = 12  # confusions listed in words


def as_png(draw):
    """Make a function that returns a Figure return PNG bytes, whatever the user's matplotlibrc says."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        with matplotlib.style.context(["default", STYLE]):
            content = io.BytesIO()
            draw(*args, **kwargs).savefig(content, format="png", dpi=DPI, metadata={"Software": None})
        return content.getvalue()

    return drawn


def new_figure(title, subtitle, width, height, arranged=True):
    """A Figure with `height` inches below its title, whose axes matplotlib arranges unless told otherwise."""
    height += TOP
    engine = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - TOP / height), w_pad=MARGIN, h_pad=0.06)
    figure = Figure((width, height), layout=engine if arranged else None)
    left, room = MARGIN / width, width - 2 * MARGIN
    title, subtitle = fit(title, room, 11.5, "bold"), fit(subtitle, room, 8.5)
    figure.text(left, 1 - 0.14 / height, title, va="top", size=11.5, weight="bold")
    figure.text(left, 1 - 0.38 / height, subtitle, va="top", size=8.5, color=GREY)
    return figure


def add_axes_at(figure, left, bottom, width, height):
    """Add axes at a position in inches from the lower left corner."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def drawable(name, number):
    """The name of a class; where the font lacks a character, its number and the name with boxes."""
    name, font = name[:200], font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    text = "".join(c if font.get_char_index(ord(c)) else "\N{WHITE SQUARE}" for c in name)
    return text if text == name else f"{number}: {text}"


def fit(text, inches, points, weight=None):
    """The text, shortened in its middle if it is wider than `inches`: both ends distinguish names."""
    measure, font = TextToPath(), font_manager.FontProperties(size=points, weight=weight)
    text = text if len(text) <= 100 else text[:50] + text[-50:]
    short = text
    for keep in range(len(text) - 1, 0, -1):
        if measure.get_text_width_height_descent(short, font, False)[0] <= inches * 72:
            break
        short = f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
    return short


# ----------------------------------------------------------------------------------------------------- curves
@as_png
def curves(subtitle: str, rows: list[dict]) -> bytes:
    """Loss, accuracy and learning rate by epoch; rows: those of metrics.csv, as dicts by column."""
    columns = {key: np.array([row[key] for row in rows], float) for key in rows[0]}  # None becomes NaN
    epochs, marker = columns["epoch"], "o" if len(rows) <= 30 else ""
    metrics = ["loss", "accuracy"] if np.isfinite(columns["train_accuracy"]).any() else ["loss"]
    title, heights = f"Training curves, {counted(len(rows), 'epoch')}", [1] * len(metrics) + [0.55]
    figure = new_figure(title, subtitle, WIDTH, 2.1 * len(metrics) + 1.3)
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for axis, metric in zip(axes, metrics, strict=False):
        plot_metric(axis, metric, columns, marker)
    axes[-1].plot(epochs, columns["lr"], color=GREY, marker=marker, markersize=3)
    axes[-1].set(ylabel="learning rate", ylim=(0, 1.1 * np.nanmax(columns["lr"])))
    axes[-1].set(xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.align_ylabels()
    return figure


def plot_metric(axis, metric, columns, marker):
    """Plot the loss or accuracy of the training split, and of the validation split or else the test split."""
    watched = "val" if "val_loss" in columns else "test"
    for split, colour, line in (("train", BLUE, "-"), (watched, ORANGE, "--")):
        values = columns[f"{split}_{metric}"]
        last = f"{values[-1]:.2%}" if metric == "accuracy" else f"{values[-1]:.4g}"
        label = f"{'validation' if split == 'val' else split} {last}"
        axis.plot(columns["epoch"], values, line, color=colour, marker=marker, markersize=3, label=label)
    axis.set_ylabel(metric)
    axis.legend(loc="best")
    if metric == "accuracy":
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    elif np.nanmin(axis.dataLim.intervaly) > 0 and axis.dataLim.y1 > 30 * axis.dataLim.y0:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")


@as_png
def predicted(subtitle: str, truths: np.ndarray, predictions: np.ndarray) -> bytes:
    """Predictions of a regression [N] against the true values [N]."""
    title = f"Predicted against true values, {counted(len(truths), 'test row')}"
    figure = new_figure(title, subtitle, WIDTH, WIDTH)
    axis = figure.subplots()
    ends = [min(truths.min(), predictions.min()), max(truths.max(), predictions.max())]
    axis.plot(ends, ends, color=GREY, linewidth=1, label="predicted = true")
    size = 20 if len(truths) <= 500 else 4
    axis.scatter(truths, predictions, size, color=BLUE, alpha=0.6, linewidths=0, label="test row")
    axis.set(xlabel="true", ylabel="predicted")
    axis.legend(loc="upper left")
    return figure


# ------------------------------------------------------------------------------------------- confusion matrix
@as_png
def confusion(subtitle: str, counts: np.ndarray, names: list[str]) -> bytes:
    """The confusion matrix, counts [true, predicted], coloured by the share of the true class."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    title, few = f"Confusion matrix, {len(names)} classes", len(names) <= FEW
    if few:
        figure = new_figure(title, subtitle, WIDTH, 0.97 * WIDTH)
        axis, side = figure.subplots(), WIDTH - 1.25
    else:
        side = 7.9
        figure = new_figure(title, subtitle, WIDE, side + 3.35, arranged=False)
        axis = add_axes_at(figure, 1.4, 3.3, side, side)
        list_confusions(add_axes_at(figure, MARGIN, 0.1, WIDE - 2 * MARGIN, 1.6), counts, shares, names)
    image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axis.grid(False)
    axis.spines[:].set_visible(not few)
    axis.set(xlabel="predicted", ylabel="true")
    label_classes(axis, names, side)
    if len(names) <= SOME:
        fill_cells(axis, counts, shares, side)
    else:
        scale = add_axes_at(figure, 1.5 + side, 3.3, 0.15, side)
        ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1]
        figure.colorbar(image, cax=scale, ticks=ticks, format=PercentFormatter(1.0, 0))
        scale.set_title("of true\nclass", size=8, loc="left")
        scale.tick_params(labelsize=7.5, length=2, pad=2)
    return figure


def label_classes(axis, names, side):
    """Ticks with class names as large as `side` inches allow; beyond MANY classes only some are named."""
    step = -(-len(names) // MANY)
    pitch = 72 * side * step / len(names)  # points
    size, positions = min(9, 0.88 * pitch), range(0, len(names), step)
    texts = [fit(drawable(names[i], i), 1.05, size) for i in positions]
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    turned = slanted if len(names) <= FEW else {"rotation": 90}
    wide = max(map(len, texts)) * 0.7 * size >= pitch
    axis.set_yticks(positions, texts, size=size)
    axis.set_xticks(positions, texts, size=size, **(turned if wide else {}))
    axis.tick_params(length=0)


def fill_cells(axis, counts, shares, side):
    """Write counts, and below them shares of the true class, into cells that divide `side` inches."""
    room = 72 * side / len(counts)  # points
    size = min(room / (0.72 * max(4.5, len(f"{counts.max():,}"))), 13)
    for i, j in zip(*counts.nonzero(), strict=True):
        style = {"ha": "center", "color": "white" if shares[i, j] > 0.4 else INK}
        share = "100%" if counts[i, j] == counts[i].sum() else f"{shares[i, j]:.1%}"
        axis.text(j, i, f"{counts[i, j]:,}", va="bottom", size=size, **style)
        axis.text(j, i + 0.06, share, va="top", size=0.8 * size, **style)


def list_confusions(axis, counts, shares, names):
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    pairs = [divmod(int(k), len(names)) for k in order if wrong.flat[k]]
    title = "Most frequent confusions: true → predicted, images, share of the true class"
    axis.axis("off")
    axis.set(xlim=(0, 2), ylim=(LISTED // 2 + 1.2, 0))
    axis.text(0, 0.4, title if pairs else "No wrong predictions", weight="bold", va="center")
    for k, (i, j) in enumerate(pairs):
        true, guess = (fit(drawable(names[c], c), 1.55, 9) for c in (i, j))
        column, line = divmod(k, LISTED // 2)
        text = f"{true} → {guess}   {counts[i, j]:,} ({shares[i, j]:.1%})"
        axis.text(column, line + 1.6, text, va="center")


# ----------------------------------------------------------------------------------------------------- images
@as_png
def samples(subtitle: str, images: np.ndarray, labels: np.ndarray, names: list[str]) -> bytes:
    """Augmented training images, uint8 [n, H, W, C], with their labels [n]."""
    size = "x".join(map(str, np.asarray(images[0]).shape[:2]))
    captions = [[(drawable(names[label], label), INK)] for label in labels[:GRID]]
    return draw_grid(f"Augmented training images, {size}", subtitle, images[:GRID], captions)


@as_png
def mistakes(subtitle, images: Sequence, labels: np.ndarray, probabilities: np.ndarray, names, title=None):
    """The most confident wrong predictions; images: uint8 [H, W, C] by index, read only if drawn.

    title: of images that are in order, and whose labels may be wrong.
    """
    guesses, confidence = probabilities.argmax(1), probabilities.max(1)
    wrong = np.flatnonzero(guesses != labels)
    chosen = (wrong if title else wrong[np.argsort(-confidence[wrong], kind="stable")])[:GRID]
    if not len(chosen):
        figure = new_figure("Wrong predictions", subtitle, WIDTH, 1, arranged=False)
        figure.text(0.5, 0.3, "None: every test image is classified correctly.", ha="center", size=11)
        return figure
    captions, kind = [], "label" if title else "true"
    for i in chosen:
        guess, true = (fit(drawable(names[c], c), 0.64, 8) for c in (guesses[i], labels[i]))
        lines = (f"pred: {guess}", ORANGE), (f"{confidence[i]:.1%}", GREY), (f"{kind}: {true}", INK)
        captions.append(lines)
    of_all = f", {len(chosen)} of {len(wrong):,}" if len(chosen) < len(wrong) else ""
    chosen = [images[int(i)] for i in chosen]
    return draw_grid(f"{title or 'Most confident wrong predictions'}{of_all}", subtitle, chosen, captions)


@as_png
def pairs(title: str, subtitle: str, pairs: list[tuple]) -> bytes:
    """Pairs of images side by side; pairs: (image, image, text, text), images uint8 [H, W, C]."""
    both = []
    for one, other, *_ in pairs:
        gap = np.full((len(one), max(1, one.shape[1] // 16), one.shape[2]), 255, np.uint8)
        both.append(np.concatenate([one, gap, other], axis=1))
    captions = [[(drawable(name, "file"), INK) for name in pair[2:]] for pair in pairs]
    return draw_grid(title, subtitle, both, captions, columns=2)


def draw_grid(title, subtitle, images, captions, columns=COLUMNS):
    """Images in rows of `columns`, each with its lines of (text, colour) under it."""
    gap, line, images = 0.1, 0.155, [np.asarray(image) for image in images]  # the numbers: inches
    cell, ratio = (WIDTH - 2 * MARGIN + gap) / columns, images[0].shape[0] / images[0].shape[1]
    image_height = (cell - gap) * min(ratio, 2)
    image_width = image_height / ratio
    step = image_height + line * len(captions[0]) + 0.16
    height = step * -(-len(images) // columns) + 0.05
    figure = new_figure(title, subtitle, WIDTH, height, arranged=False)
    axis = add_axes_at(figure, 0, 0, WIDTH, height)
    for k, (image, lines) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(k, columns)
        middle, bottom = MARGIN + column * cell + (cell - gap) / 2, row * step + image_height
        extent = (middle - image_width / 2, middle + image_width / 2, bottom, row * step)
        axis.imshow(image, extent=extent, cmap="gray", vmin=0, vmax=255)  # the last three: if it is grey
        for number, (text, colour) in enumerate(lines):
            text, below = fit(text, cell - 0.08, 8), bottom + 0.05 + line * number
            axis.text(middle, below, text, ha="center", va="top", size=8, color=colour)
    axis.set(xlim=(0, WIDTH), ylim=(height, 0), aspect="auto")
    axis.axis("off")
    return figure

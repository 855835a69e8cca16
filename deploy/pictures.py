"""Pictures of a run, drawn by matplotlib without a display; every function returns the bytes of a PNG.

`about` is the line under each title: run, result, date. Names and labels come from strangers: they are cut to the room
there is, never read as formulas, and what the font has no glyph for becomes a box with the number of its class.
"""

import functools
import io
import math

import matplotlib.style
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import TextToPath
from matplotlib.ticker import MaxNLocator, PercentFormatter

WIDTH, WIDE, DPI = 5.4, 10.0, 180  # inches: on a phone 5.4 of them leave 9 point letters legible
TOP, MARGIN = 0.62, 0.12  # inches: for the title, at the sides
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#5F6770", "#1B1F24"  # blue and orange: Okabe and Ito's
STYLE = {
    "font.family": "DejaVu Sans",  # matplotlib brings it along
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": "#B6BCC4",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E9ED",
    "xtick.color": "#B6BCC4",
    "ytick.color": "#B6BCC4",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}
COLUMNS, GRID = 5, 25  # images a row and in all
FEW, SOME, MANY = 12, 30, 100  # classes: up to SOME cells hold figures, up to MANY each is named


def picture(draw):
    """Make a function that returns a Figure return PNG bytes, whatever the user's matplotlibrc says."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        with matplotlib.style.context(["default", STYLE]):
            content = io.BytesIO()
            draw(*args, **kwargs).savefig(content, format="png", dpi=DPI, metadata={"Software": None})
        return content.getvalue()

    return drawn


def new_figure(title, about, width, height, arranged=True):
    """A Figure with so many inches below its title; its axes are arranged by matplotlib, or placed by `place`."""
    height += TOP
    engine = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - TOP / height), w_pad=MARGIN, h_pad=0.06)
    figure = Figure((width, height), layout=engine if arranged else None)
    FigureCanvasAgg(figure)
    for text, down, points, look in (
        (title, 0.14, 11.5, {"weight": "bold"}),
        (about, 0.38, 8.5, {"color": GREY}),
    ):
        text = fit(text, width - 2 * MARGIN, points, look.get("weight"))
        figure.text(MARGIN / width, 1 - down / height, text, va="top", size=points, **look)
    return figure


def place(figure, left, bottom, width, height):
    """Axes at a place in inches from the lower left corner."""
    wide, high = figure.get_size_inches()
    return figure.add_axes((left / wide, bottom / high, width / wide, height / high))


# ----------------------------------------------------------------------------------------------------------- names


@functools.cache
def typeface():
    return font_manager.get_font(font_manager.findfont("DejaVu Sans"))


def drawable(name, number):
    """The name of a class, or its number and boxes where the font lacks a character."""
    shown = "".join(c if typeface().get_char_index(ord(c)) else "\N{WHITE SQUARE}" for c in name[:200])
    return shown if shown == name[:200] else f"{number}: {shown}"


def fit(text, inches, points, weight=None):
    """The text, shortened in its middle where it would be wider; both ends tell names apart."""
    measure, font = TextToPath(), font_manager.FontProperties(size=points, weight=weight)
    text = text if len(text) <= 100 else text[:50] + text[-50:]
    for keep in range(len(text), 0, -1):
        short = text if keep == len(text) else f"{text[: (keep + 1) // 2]}…{text[len(text) - keep // 2 :]}"
        if measure.get_text_width_height_descent(short, font, False)[0] <= inches * 72:
            break
    return short


# ---------------------------------------------------------------------------------------------------------- curves


@picture
def curves(about, rows):
    """Loss, accuracy and learning rate over the epochs; rows: those of metrics.csv, as dicts by column."""
    column = {
        k: np.array([math.nan if row[k] in (None, "") else float(row[k]) for row in rows]) for k in rows[0]
    }
    epochs, watched = column["epoch"], "val" if "val_loss" in column else "test"
    panels = ["loss", "accuracy", "lr"] if np.isfinite(column["train_accuracy"]).any() else ["loss", "lr"]
    title = f"Training over {len(rows)} epoch{'s' if len(rows) > 1 else ''}"
    figure = new_figure(title, about, WIDTH, 2.1 * len(panels) - 0.8)
    heights = [0.55 if panel == "lr" else 1 for panel in panels]
    axes = figure.subplots(len(panels), 1, sharex=True, gridspec_kw={"height_ratios": heights})
    marker = "o" if len(rows) <= 30 else ""
    for axis, panel in zip(axes, panels, strict=True):
        if panel == "lr":
            axis.plot(epochs, column["lr"], color=GREY, marker=marker, markersize=3)
            axis.set_ylim(0, 1.1 * np.nanmax(column["lr"]))
            axis.set_ylabel("learning rate")
            continue
        for split, colour, line in (("train", BLUE, "-"), (watched, ORANGE, "--")):
            values = column[f"{split}_{panel}"]
            last = f"{values[-1]:.2%}" if panel == "accuracy" else f"{values[-1]:.4g}"
            label = f"{'validation' if split == 'val' else split} {last}"
            axis.plot(epochs, values, line, color=colour, marker=marker, markersize=3, label=label)
        axis.set_ylabel(panel)
        axis.legend(loc="best")
        if panel == "accuracy":
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        elif np.nanmin(axis.dataLim.intervaly) > 0 and axis.dataLim.y1 > 30 * axis.dataLim.y0:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
    figure.align_ylabels()
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes[-1].set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    return figure


@picture
def predicted(about, truths, predictions):
    """Predictions of a regression [N] against the truth [N]."""
    figure = new_figure(f"Predicted against true, {len(truths):,} test rows", about, WIDTH, WIDTH)
    axis = figure.subplots()
    ends = [min(truths.min(), predictions.min()), max(truths.max(), predictions.max())]
    axis.plot(ends, ends, color=GREY, linewidth=1, label="equal")
    size = 20 if len(truths) <= 500 else 4
    axis.scatter(truths, predictions, size, color=BLUE, alpha=0.6, linewidths=0, label="a test row")
    axis.set_xlabel("true")
    axis.set_ylabel("predicted")
    axis.legend(loc="upper left")
    return figure


# ------------------------------------------------------------------------------------------------------- confusion


@picture
def confusion(about, counts, names):
    """Counts [true, answered] as a matrix, coloured by the share of the true class."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    title, few = f"What was taken for what, {len(names)} classes", len(names) <= FEW
    if few:
        figure = new_figure(title, about, WIDTH, 0.97 * WIDTH)
        axis, side = figure.subplots(), WIDTH - 1.25
    else:
        side = 7.9
        figure = new_figure(title, about, WIDE, side + 3.35, arranged=False)
        axis = place(figure, 1.4, 3.3, side, side)
        list_confusions(place(figure, MARGIN, 0.1, WIDE - 2 * MARGIN, 1.6), counts, shares, names)
    image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axis.grid(False)
    axis.spines[:].set_visible(not few)
    axis.set(xlabel="answer", ylabel="truth")
    name_axes(axis, names, side)
    if len(names) <= SOME:
        fill_cells(axis, counts, shares, side)
    else:
        scale = place(figure, 1.5 + side, 3.3, 0.15, side)
        ticks = [0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1]
        figure.colorbar(image, cax=scale, ticks=ticks, format=PercentFormatter(1.0, 0))
        scale.set_title("of the\ntruth", size=8, loc="left")
        scale.tick_params(labelsize=7.5, length=2, pad=2)
    return figure


def name_axes(axis, names, side):
    """Ticks with names as large as there is room for on `side` inches, every one up to MANY classes."""
    step = -(-len(names) // MANY)
    pitch = 72 * side * step / len(names)  # points
    size, places = min(9, 0.88 * pitch), range(0, len(names), step)
    few = len(names) <= FEW
    texts = [fit(drawable(names[i], i), 1.05, size) for i in places]
    upright = max(len(text) for text in texts) * 0.7 * size < pitch
    turned = (
        {}
        if upright
        else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        if few
        else {"rotation": 90}
    )
    axis.set_yticks(places, texts, size=size)
    axis.set_xticks(places, texts, size=size, **turned)
    axis.tick_params(length=0)


def fill_cells(axis, counts, shares, side):
    """Counts with the shares of the true class below them, in cells that share `side` inches."""
    room = 72 * side / len(counts)  # points
    size = min(room / (0.72 * max(4.5, len(f"{counts.max():,}"))), 13)
    for i, j in zip(*counts.nonzero(), strict=True):
        colour = "white" if shares[i, j] > 0.4 else INK
        share = "100%" if counts[i, j] == counts[i].sum() else f"{shares[i, j]:.1%}"
        axis.text(j, i, f"{counts[i, j]:,}", ha="center", va="bottom", size=size, color=colour)
        axis.text(j, i + 0.06, share, ha="center", va="top", size=0.8 * size, color=colour)


def list_confusions(axis, counts, shares, names, most=12):
    """The most frequent wrong pairs in words, in two columns."""
    axis.axis("off")
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(k), len(names)) for k in order if wrong.flat[k]]
    axis.set(xlim=(0, 2), ylim=(most // 2 + 1.2, 0))
    title = (
        "Most frequent confusions: truth → answer, images, share of the true class"
        if pairs
        else "No wrong answer"
    )
    axis.text(0, 0.4, title, weight="bold", va="center")
    for k, (i, j) in enumerate(pairs):
        truth, answer = (fit(drawable(names[c], c), 1.55, 9) for c in (i, j))
        side, line = divmod(k, most // 2)
        axis.text(
            side, line + 1.6, f"{truth} → {answer}   {counts[i, j]:,} ({shares[i, j]:.1%})", va="center"
        )


# ---------------------------------------------------------------------------------------------------------- images


@picture
def samples(about, images, labels, names):
    """Augmented training images, uint8 [n, H, W, C], with their labels [n]."""
    size = "x".join(map(str, np.asarray(images[0]).shape[:2]))
    captions = [[(drawable(names[label], label), INK)] for label in labels[:GRID]]
    return grid(f"Augmented training images, {size}", about, images[:GRID], captions)


@picture
def mistakes(about, images, labels, probabilities, names):
    """The surest wrong answers; images: anything that gives uint8 [H, W, C] by its index, only these are read."""
    guesses = probabilities.argmax(1)
    wrong = np.flatnonzero(guesses != labels)
    sure = probabilities[wrong, guesses[wrong]]
    chosen = wrong[np.argsort(-sure, kind="stable")][:GRID]
    if not len(chosen):
        figure = new_figure("Wrong answers", about, WIDTH, 1, arranged=False)
        figure.text(
            0.5, 0.3, f"None: all {len(labels):,} test images were answered rightly.", ha="center", size=11
        )
        return figure
    captions = [
        [
            (drawable(names[guesses[i]], guesses[i]), ORANGE),
            (f"{probabilities[i, guesses[i]]:.1%} sure", GREY),
            (f"is {drawable(names[labels[i]], labels[i])}", INK),
        ]
        for i in chosen
    ]
    which = f"The {len(chosen)} surest of {len(wrong):,}" if len(chosen) < len(wrong) else f"{len(wrong):,}"
    title = f"{which} wrong answer{'s' * (len(wrong) > 1)} among {len(labels):,}"
    return grid(title, about, [images[int(i)] for i in chosen], captions)


def grid(title, about, images, captions):
    """Images in rows of COLUMNS, each with its lines of (text, colour) under it."""
    gap, line = 0.1, 0.155  # inches
    cell = (WIDTH - 2 * MARGIN + gap) / COLUMNS
    images = [thin(np.asarray(image)) for image in images]
    ratio = images[0].shape[0] / images[0].shape[1]
    tall = (cell - gap) * min(ratio, 2)
    wide = tall / ratio
    step = tall + line * len(captions[0]) + 0.16
    height = step * -(-len(images) // COLUMNS) + 0.05
    figure = new_figure(title, about, WIDTH, height, arranged=False)
    axis = place(figure, 0, 0, WIDTH, height)
    for k, (image, lines) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(k, COLUMNS)
        middle, top = MARGIN + column * cell + (cell - gap) / 2, row * step
        extent = (middle - wide / 2, middle + wide / 2, top + tall, top)
        grey = {"cmap": "gray", "vmin": 0, "vmax": 255} if image.shape[2] == 1 else {}
        axis.imshow(image.squeeze(2) if grey else image, extent=extent, **grey)
        for number, (text, colour) in enumerate(lines):
            below = top + tall + 0.05 + line * number
            axis.text(
                middle, below, fit(text, cell - 0.08, 8.5), ha="center", va="top", size=8.5, color=colour
            )
    axis.set(xlim=(0, WIDTH), ylim=(height, 0), aspect="auto")
    axis.axis("off")
    return figure


def thin(image, most=256):
    """Every k-th pixel of a large image: a cell of the grid shows no more."""
    k = -(-max(image.shape[:2]) // most)
    return image[::k, ::k]

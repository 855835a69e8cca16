"""Pictures of how far a model's outputs can be trusted; they return PNG bytes, see pictures.py."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from inference import metrics
from inference.metrics import KEPT
from report.pictures import BLUE, GREY, LIGHT_GREY, ORANGE, WIDTH, as_png, new_figure
from report.text import counted, rounded_down

FEW_ANSWERS = 20  # of fewer, one mistake counts too much for a curve
LEAST_RANGE = 0.01  # of accuracies that an axis shows
ROUND_STEPS = [1, 2, 2.5, 5, 10]  # between ticks, times a power of ten


def percent(value: float, position: int | None = None) -> str:
    """A share as a tick label, with the decimals that it needs; matplotlib passes the position."""
    return f"{100 * value:.6g}%"


# -------------------------------------------------------------------------------------- reliability
@as_png
def reliability(
    subtitle: str, labels: np.ndarray, probabilities: np.ndarray, temperature: float | None
) -> Figure:
    """The reliability diagram of probabilities [N, classes] for labels [N].

    temperature: if it was divided by, the diagram before that stands beside it.
    """
    columns = {"Not calibrated": probabilities}
    if temperature:
        columns = {
            "Before calibration": metrics.with_temperature(probabilities, 1 / temperature),
            f"After, temperature {temperature:.2f}": probabilities,
        }

    title = f"Reliability of the probabilities, {counted(len(labels), 'test image')}"
    figure = new_figure(title, subtitle, WIDTH, 4.1)
    axes = figure.subplots(
        2, len(columns), sharex=True, sharey="row", squeeze=False, height_ratios=(2.2, 1)
    )
    diagrams, histograms = axes

    # All axes start at the tenth below the lowest confidence.
    confidence = min(column.max(1).min() for column in columns.values())
    lowest = max(np.floor(10 * confidence - 1e-6) / 10, 0)

    for number, (name, column) in enumerate(columns.items()):
        plot_reliability(diagrams[number], name, column, labels, lowest)
        plot_confidence(histograms[number], column, lowest)

    bottom, _ = diagrams[0].get_ylim()
    diagrams[0].set(ylabel="accuracy", ylim=(min(bottom, lowest), 1 + 0.03 * (1 - lowest)))
    histograms[0].set_ylabel("test images")
    figure.align_ylabels()
    handles, texts = diagrams[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def plot_reliability(axis, name, probabilities, labels, lowest):
    """Plot the accuracy of each bin against its confidence, beside what perfect ones would show."""
    answer_confidence, is_right = metrics.first_answers(probabilities, labels)  # [N] each
    confidence, accuracy, count = metrics.reliability_bins(answer_confidence, is_right)  # [bins]

    # 95 % of the bins of perfect probabilities lie within 1.96 standard deviations.
    chance = 1.96 * np.sqrt(confidence * (1 - confidence) / count)
    low = np.clip(confidence - chance, 0, 1)
    high = np.clip(confidence + chance, 0, 1)

    axis.plot([lowest, 1], [lowest, 1], color=GREY, linewidth=1, label="perfect")
    axis.vlines(confidence, low, high, color=LIGHT_GREY, linewidth=2, label="range of chance (95%)")
    sizes = np.unique([count.min(), count.max()])  # two if the images cannot be divided equally
    axis.plot(
        confidence,
        accuracy,
        "o",
        color=BLUE,
        markersize=3.5,
        clip_on=False,
        zorder=3,
        label=f"{images_in_each(sizes)} each",
    )

    error = metrics.calibration_error(probabilities, labels)
    axis.set_title(f"{name}\ncalibration error {error:.2%}", size=9, loc="left")
    axis.yaxis.set_major_formatter(percent)


def images_in_each(sizes):
    """How many images are in each bin, in words, given the different numbers in order."""
    last = counted(round(sizes[-1]), "image")
    return last if len(sizes) == 1 else f"{sizes[0]:,.0f} to {last}"


def plot_confidence(axis, probabilities, lowest):
    """Plot how many answers have which probability."""
    axis.hist(probabilities.max(1), np.linspace(lowest, 1, 21), color=BLUE)
    axis.set(xlabel="probability of the answer", xlim=(lowest, 1))
    axis.xaxis.set_major_locator(MaxNLocator(4, steps=ROUND_STEPS))
    axis.xaxis.set_major_formatter(percent)
    axis.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axis.yaxis.set_major_formatter("{x:,.0f}")


# ----------------------------------------------------------------------------------------- coverage
@as_png
def coverage(subtitle: str, labels: np.ndarray, probabilities: np.ndarray) -> Figure:
    """Accuracy of the most probable answers against their share, of probabilities [N, classes]."""
    accuracy, _ = metrics.coverage_curve(probabilities, labels)  # [N], of the k most probable
    count = len(accuracy)
    shares = np.arange(1, count + 1) / count
    start = max(min(FEW_ANSWERS, count // 2), 1) - 1

    title = "Accuracy if only the most probable answers are given"
    figure = new_figure(title, subtitle, WIDTH, 4.1)
    axis = figure.subplots()
    axis.plot(
        shares[start:],
        accuracy[start:],
        color=BLUE,
        clip_on=False,
        label=f"100% answered: {accuracy[-1]:.2%} right",
    )

    for share, found in metrics.accuracy_at_coverage(probabilities, labels).items():
        right = f"{float(share):.0%} answered: {found['accuracy']:.2%} right"
        label = f"{right}, probability {rounded_down(found['probability'])} or more"
        # Of few images, no number is just that share: the dot lies where the curve has it.
        answered = max(1, round(float(share) * count)) / count
        axis.plot(answered, found["accuracy"], "o", color=ORANGE, markersize=5, label=label)

    axis.set(xlabel="share of test images answered", xlim=(0, 1.02))
    axis.set_ylabel("accuracy of these answers")
    limit_shares(axis, accuracy[start:])
    axis.xaxis.set_major_formatter(percent)
    figure.legend(loc="outside lower center", fontsize=8.5)
    return figure


def limit_shares(axis, shares):
    """Let the y axis show shares, with some room around them but no label below 0 or above 1."""
    low = max(min(shares.min(), shares.max() - LEAST_RANGE), 0)
    high = max(shares.max(), low + LEAST_RANGE)
    room = 0.08 * (high - low)
    ticks = MaxNLocator(5, steps=ROUND_STEPS).tick_values(low - room, high + room)
    shown = (ticks >= max(low - room, 0)) & (ticks <= min(high + room, 1))

    axis.set_ylim(low - room, high + room)
    axis.set_yticks(ticks[shown])
    axis.yaxis.set_major_formatter(percent)


# -------------------------------------------------------------------------------------- familiarity
@as_png
def familiar(subtitle: str, kinds: dict[str, dict]) -> Figure:
    """Histograms of `known`, one for each kind of image: `familiar` of parity.json."""
    figure = new_figure("How familiar images look", subtitle, WIDTH, 0.72 * len(kinds) + 0.4)
    axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, kind) in zip(axes, kinds.items(), strict=True):
        plot_familiar(axis, name, kind)

    axes[-1].set_xlabel("known: the share of held-out images that look less familiar")
    figure.supylabel("share of the images", size=9)
    return figure


def plot_familiar(axis, name, kind):
    shares = np.array(kind["histogram"]) / kind["images"]
    bins = len(shares)
    left_edges = np.arange(bins) / bins
    axis.bar(left_edges, shares, 1 / bins, align="edge", color=BLUE, edgecolor="white")
    # What is called unknown is a part of the first bin: the lower part of its bar.
    axis.bar(0, kind["unknown"], 1 / bins, align="edge", color=ORANGE, edgecolor="white")

    highest = shares.max()
    axis.set(xlim=(0, 1), ylim=(0, 1.1 * highest))
    axis.set_yticks([0, highest], ["0", f"{highest:.0%}"], size=8)
    axis.grid(False, axis="y")

    unknown = percent(round(kind["unknown"], 3))
    title = f"{name}, {counted(kind['images'], 'image')}: {unknown} unknown at --reject {KEPT[0]:g}"
    axis.set_title(title, size=8.5, loc="left", pad=3)

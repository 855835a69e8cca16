"""Pictures of how far a model's outputs can be trusted; the functions return PNG bytes, see pictures.py."""

import numpy as np
from matplotlib.ticker import MaxNLocator

from inference import metrics as measured
from report.card import counted, threshold
from report.pictures import BLUE, GREY, ORANGE, WIDTH, as_png, new_figure


def percent(value, position=None):
    """A share as a tick label, with the decimals that it needs."""
    return f"{100 * value:.6g}%"


@as_png
def reliability(subtitle: str, labels: np.ndarray, probabilities: np.ndarray, temperature: float | None):
    """The reliability diagram of probabilities [N, classes] for labels [N], also before `temperature`."""
    parts = {"Not calibrated": probabilities}
    if temperature:
        before = measured.with_temperature(probabilities, 1 / temperature)
        parts = {"Before calibration": before, f"After, temperature {temperature:.2f}": probabilities}
    title = f"Reliability of the probabilities, {counted(len(labels), 'test image')}"
    figure = new_figure(title, subtitle, WIDTH, 4.1)
    axes = figure.subplots(2, len(parts), sharex=True, sharey="row", squeeze=False, height_ratios=(2.2, 1))
    lowest = max(np.floor(10 * min(part.max(1).min() for part in parts.values()) - 1e-6) / 10, 0)
    for column, (name, part) in zip(axes.T, parts.items(), strict=True):
        plot_reliability(*column, name, part, labels, lowest)
    axes[0, 0].set(ylabel="accuracy", ylim=(min(axes[0, 0].get_ylim()[0], lowest), 1 + 0.03 * (1 - lowest)))
    axes[1, 0].set_ylabel("test images")
    figure.align_ylabels()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def plot_reliability(diagram, histogram, name, probabilities, labels, lowest):
    confidence, accuracy, count = measured.reliability_bins(*measured.first_answers(probabilities, labels))
    chance = 1.96 * np.sqrt(confidence * (1 - confidence) / count)
    ends = np.clip([confidence - chance, confidence + chance], 0, 1)
    diagram.plot([lowest, 1], [lowest, 1], color=GREY, linewidth=1, label="perfect")
    diagram.vlines(confidence, *ends, color="#B6BCC4", linewidth=2, label="perfect, but for chance (95%)")
    each = " to ".join(f"{number:,.0f}" for number in np.unique([count.min(), count.max()]))
    style = {"color": BLUE, "markersize": 3.5, "clip_on": False, "zorder": 3}
    diagram.plot(confidence, accuracy, "o", **style, label=f"{each} images each")
    title = f"{name}\ncalibration error {measured.calibration_error(probabilities, labels):.2%}"
    diagram.set_title(title, size=9, loc="left")
    diagram.yaxis.set_major_formatter(percent)
    histogram.hist(probabilities.max(1), np.linspace(lowest, 1, 21), color=BLUE)
    histogram.set(xlabel="probability of the answer", xlim=(lowest, 1))
    histogram.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    histogram.xaxis.set_major_formatter(percent)
    histogram.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    histogram.yaxis.set_major_formatter("{x:,.0f}")


@as_png
def coverage(subtitle: str, labels: np.ndarray, probabilities: np.ndarray) -> bytes:
    """Accuracy of the most probable answers against their share, of probabilities [N, classes]."""
    accuracy, _ = measured.coverage_curve(probabilities, labels)
    shares = np.arange(1, len(accuracy) + 1) / len(accuracy)
    figure = new_figure("Accuracy if only the most probable answers are given", subtitle, WIDTH, 4.1)
    axis = figure.subplots()
    axis.plot(shares, accuracy, color=BLUE, label=f"100% answered: {accuracy[-1]:.2%} right")
    for share, found in measured.accuracy_at_coverage(probabilities, labels).items():
        label = f"{float(share):.0%} answered: {found['accuracy']:.2%} right, probability from "
        label += threshold(found["probability"])
        axis.plot(float(share), found["accuracy"], "o", color=ORANGE, markersize=5, label=label)
    low, high = accuracy[len(accuracy) // 2 :].min(), accuracy.max()  # one mistake of few counts too much
    room = 0.08 * max(high - low, 0.01)
    axis.set(xlabel="share of the test images that is answered", ylabel="accuracy of these answers")
    axis.set(xlim=(0, 1.02), ylim=(low - room, high + room))
    axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    for line in (axis.xaxis, axis.yaxis):
        line.set_major_formatter(percent)
    figure.legend(loc="outside lower center", fontsize=8.5)
    return figure


@as_png
def familiar(subtitle: str, kinds: dict[str, dict]) -> bytes:
    """Histograms of `known`, one for each kind of image: see comparing.trust."""
    figure = new_figure("How familiar images look", subtitle, WIDTH, 0.72 * len(kinds) + 0.4)
    axes = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, kind) in zip(axes, kinds.items(), strict=True):
        shares = np.array(kind["histogram"]) / kind["images"]
        edges, colours = np.arange(len(shares)) / len(shares), [ORANGE] + [BLUE] * (len(shares) - 1)
        axis.bar(edges, shares, 1 / len(shares), align="edge", color=colours, edgecolor="white")
        axis.set(xlim=(0, 1), ylim=(0, 1.1 * shares.max()))
        axis.set_yticks([0, shares.max()], ["0", f"{shares.max():.0%}"], size=8)
        axis.grid(False, axis="y")
        unknown = f"{percent(round(kind['unknown'], 3))} unknown at --reject 0.99"
        axis.set_title(f"{name}, {counted(kind['images'], 'image')}: {unknown}", size=8.5, loc="left", pad=3)
    axes[-1].set_xlabel("known: the share of held-out images that look less familiar")
    figure.supylabel("share of the images", size=9)
    return figure

"""Write the tables of all README files from the benchmarks' results. Run by hand after a benchmark.

    python tests/benchmarks/render.py            # rewrites what has changed and names it
    python tests/benchmarks/render.py --check    # exit code 1 if anything would change

A page marks the place of a table:

    <!-- results: accuracy -->
    <!-- end -->

What lies between the markers is replaced by what the function of this name in TABLES returns. A
figure that nobody has measured is left out, and a table without any figure says so.
tests/test_figures_fresh.py checks all pages.
"""

import argparse
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.bench_pretrained import COUNTS, USUAL_EPOCHS  # noqa: E402
from benchmarks.bench_tutorials import TUTORIALS  # noqa: E402
from benchmarks.results import RESULTS, read_results  # noqa: E402

PAGES = ("README.md", "data/README.md", "deploy/README.md", "tests/benchmarks/README.md")
MARKED = re.compile(r"(<!-- results: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet."
OURS = "step1, step2"  # as bench_pretrained.py names it
FASTAI_AS_LONG = "fastai for step1's time"


# ------------------------------------------------------------------------------- pieces of Markdown


def table(head: list[str], rows: list[list[str]], right_from: int | None = None) -> list[str]:
    """The lines of a Markdown table; columns from `right_from` on are aligned to the right."""
    # Numbers are compared down a column, which their digits must line up for.
    rules = ["---"] * len(head)
    if right_from is not None:
        rules[right_from:] = ["---:"] * (len(head) - right_from)

    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(rules) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return lines


def percent(fraction: float | None, digits: int = 2) -> str:
    return "-" if fraction is None else f"{100 * fraction:.{digits}f} %"


def percents(fractions: list[float]) -> str:
    """Several figures with one sign: 99.44, 100.00, 99.72 %."""
    return ", ".join(f"{100 * fraction:.2f}" for fraction in fractions) + " %"


def megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"


def quantity(value: float, unit: str) -> str:
    """Three digits, without an exponent for a large value."""
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def small(value: float) -> str:
    """A difference: 1e-06."""
    return f"{value:.0e}"


def where(result: dict) -> str:
    """When, at which commit and on what a result was measured."""
    processor = result["processor"]
    cores = processor["cores"]
    named = [f"{package} {version}" for package, version in result["versions"].items()]
    about = ", ".join([processor["name"], *processor["instructions"]])
    machine = f"{cores} CPU core{'s' if cores > 1 else ''} ({about})"
    return f"Measured on {result['date']} at {commit(result)} on {machine}, with {', '.join(named)}"


def commit(result: dict) -> str:
    """commit `1234567`, as the pages name it."""
    if result["commit"] is None:
        return "an unknown commit"
    # "with changes" follows the revision if the code was not that of the commit.
    revision, *changes = result["commit"].split(" ", 1)
    return " ".join([f"commit `{revision[:7]}`", *(f"({change})" for change in changes)])


def short_source(result: dict, page: str, at: str | None = None) -> list[str]:
    """The line below a table outside the benchmarks' own page.

    page: the path of that page, relative to the one with the table. at: which commits measured it,
    if the result's own did not measure all.
    """
    versions = result["versions"]
    named = [f"{name} {versions[name]}" for name in ("torch", "onnxruntime") if name in versions]
    processor = result["processor"]
    cores = processor["cores"]
    machine = f"{cores} CPU core{'s' if cores > 1 else ''} ({processor['name']}), without a GPU"
    return [
        "",
        f"Measured at {at or commit(result)} on {machine}, with {' and '.join(named)} "
        f"([details]({page})).",
    ]


def full_source(result: dict) -> list[str]:
    """The lines below a table on the benchmarks' own page."""
    return ["", f"{where(result)}:", "", f"    {result['command']}"]


# ----------------------------------------------------------- tables of README.md, data/ and deploy/

Results = dict[str, dict]  # what write_result() wrote, by name


def accuracy(results: Results) -> list[str]:
    """README.md: what the three steps reach with their defaults."""
    result = results.get("accuracy")
    if result is None:
        return []

    titles = {
        "digits": ("bundled digits (8x8)", "step1_train.py"),
        "mnist": ("MNIST, {} epochs", "step1_train.py --dataset mnist --epochs {}"),
        "cifar": (
            "CIFAR-10 as JPEG files, {} epochs",
            "step1_train.py --data-dir cifar10 --epochs {}",
        ),
    }
    rows = []
    for key, (title, command) in titles.items():
        if key not in result["figures"]:
            continue
        runs = result["figures"][key]
        epochs = runs[0]["epochs"]
        seeds = ", ".join(str(run["seed"]) for run in runs)
        plural = "s" if len(runs) > 1 else ""

        # Seeds differ in accuracy, but hardly in time and not in size.
        took = statistics.median(run["train_seconds"] for run in runs)
        sizes = f"{megabytes(runs[0]['bytes'])}, int8 {megabytes(runs[0]['int8_bytes'])}"
        rows.append(
            [
                title.format(epochs),
                f"{percents([run['accuracy'] for run in runs])} (seed{plural} {seeds})",
                seconds(took),
                sizes,
                f"`{command.format(epochs)}`",
            ]
        )
    head = ["data, with the default network", "accuracy of the file", "training", "file", "command"]
    return table(head, rows) + short_source(result, "tests/benchmarks/README.md#accuracy")


def device(results: Results) -> list[str]:
    """README.md: what step3 takes on the machine that measured it."""
    result = results.get("inference")
    if result is None:
        return []

    figures = result["figures"]
    by_key = {row["key"]: row for row in figures["rows"]}
    rows = []
    if "cold" in by_key:
        rows.append(["a cold `step3_infer.py image.png`", f"{by_key['cold']['ours']:.2f} s"])
    if "cold memory" in by_key:
        rows.append(["its memory", f"{by_key['cold memory']['ours']:.0f} MB"])
    if "clocks" in figures:
        latency = figures["clocks"]["benchmark"]["latency_p50_ms"]
        rows.append(["each further 32x32 image", f"{latency:.1f} ms"])
    if not rows:
        return []
    head = ["prediction, with the CIFAR-10 file", ""]
    return table(head, rows) + short_source(result, "tests/benchmarks/README.md#inference")


def photos(results: Results) -> list[str]:
    """README.md: what few photos and a pretrained network reach, beside fastai."""
    result = results.get("pretrained")
    if result is None:
        return []

    figures = result["figures"]
    rows = []
    for images, programs in sorted(pretrained_runs(figures["rows"]).items()):
        ours = programs[OURS]
        fastai = programs.get(FASTAI_AS_LONG)
        rows.append(
            [
                f"{images:,}",
                percents([run["accuracy"] for run in ours]),
                percents([run["calibration_error"] for run in ours]),
                f"{statistics.fmean(run['cpu'] for run in ours):.0f}",
                percents([run["accuracy"] for run in fastai]) if fastai else "-",
            ]
        )
    said = (
        f"Few photos and pretrained weights: `{figures['model']}` at {figures['size']} px, photos "
        f"of CIFAR-10's classes, {figures['judged']:,} test images, one figure for each seed. "
        "fastai starts from the same weights and takes as long:"
    )
    head = ["photos", "accuracy of the file", "calibration error", "CPU seconds", "fastai"]
    page = "tests/benchmarks/README.md#few-photos-and-pretrained-weights"
    source = short_source(result, page, at="several commits")
    return [said, "", *table(head, rows, right_from=3), *source]


def int8(results: Results) -> list[str]:
    """deploy/README.md: what int8 saves and costs."""
    result = results.get("export")
    if result is None:
        return []
    rows = int8_rows(result)
    head = [
        "network",
        "size / float32",
        "accuracy, float32",
        "accuracy, int8",
        *throughput_heads(result),
    ]
    return table(head, rows) + short_source(result, "../tests/benchmarks/README.md#export")


def int8_rows(result: dict) -> list[list[str]]:
    rows = []
    for run in result["figures"]["runs"]:
        faster = [f"{times['speedup']:.1f}x" for times in run["speedups"].values()]
        rows.append(
            [
                f"`{run['run']}`, {run['parameters']:,} parameters",
                f"{run['int8_bytes'] / run['bytes']:.2f}",
                percent(run["accuracy"]),
                percent(run["int8_accuracy"]),
                *faster,
            ]
        )
    return rows


def throughput_heads(result: dict) -> list[str]:
    sizes = result["figures"]["runs"][0]["speedups"]
    return [f"throughput, batch {size}" for size in sizes]


def engines(results: Results) -> list[str]:
    """deploy/README.md: the largest difference of each engine over all sizes, and what changed."""
    result = results.get("engines")
    if result is None:
        return []

    files = [
        "model.onnx",
        "model.fixed.onnx",
        "model.int8.onnx",
        "model.fixed.int8.onnx",
        "model.pt",
        "model.pt2",
    ]
    # One row for an engine, one column for a file: the results have a row for each pair.
    by_engine: dict[str, dict[str, str]] = {}
    for row in result["figures"]["rows"]:
        name = f"{row['engine']} {row['version']}"
        by_engine.setdefault(name, {})[row["file"]] = worst_difference(row)

    measured = {file for cells in by_engine.values() for file in cells}
    shown = [file for file in files if file in measured]
    rows = []
    for name, cells in by_engine.items():
        rows.append([name, *(cells.get(file, "") for file in shown)])
    head = ["engine", *(f"`{file}`" for file in shown)]
    return table(head, rows) + short_source(
        result, "../tests/benchmarks/README.md#one-file-every-engine"
    )


def worst_difference(row: dict) -> str:
    """The cell of an engine and a file: the largest difference, and how many answers changed."""
    if "failed" in row:
        return "refused"
    # An engine that raised at a size has the error's name there instead of a number.
    numbers = [value for value in row["max"].values() if not isinstance(value, str)]
    if len(numbers) < len(row["max"]):
        return "fails at some sizes"
    changed = f", {row['changed']} of {row['answers']} answers" if row["changed"] else ""
    return small(max(numbers)) + changed


def leaks(results: Results) -> list[str]:
    """data/README.md: what the doctor finds in a dataset as it is, and of planted copies."""
    result = results.get("doctor")
    if result is None:
        return []
    figures = result["figures"]
    lines = [
        f"In the {figures['images']:,} images of `{figures['folder']}`, {figures['leaked']} "
        "test images are also in the training split. Of copies planted on purpose, step1 finds:",
        "",
    ]
    return [
        *lines,
        *copies_table(figures),
        *short_source(result, "../tests/benchmarks/README.md#the-doctor-for-datasets"),
    ]


def copies_table(figures: dict) -> list[str]:
    rows = [[row["copies"], f"{row['found']} of {row['planted']}"] for row in figures["copies"]]
    return table(["copies", "found"], rows)


# ------------------------------------------------------------- tables of tests/benchmarks/README.md


def bench_accuracy(results: Results) -> list[str]:
    result = results.get("accuracy")
    if result is None:
        return []

    rows = []
    for key, runs in result["figures"].items():
        for run in runs:
            # Runs without calibration images have neither a temperature nor `known`.
            kept = "-"
            if run["kept"]:
                kept = percents([run["kept"]["0.99"], run["kept"]["0.95"]])
            calibration = ", ".join(
                percent(run[name])
                for name in (
                    "calibration_error_uncalibrated",
                    "calibration_error",
                    "calibration_error_floor",
                )
            )
            rows.append(
                [
                    f"{key}, {run['epochs']} epochs, seed {run['seed']}",
                    percent(run["accuracy"]),
                    percent(run["int8_accuracy"]),
                    seconds(run["train_seconds"]),
                    f"{run['bytes']:,}",
                    f"{run['int8_bytes']:,}",
                    calibration,
                    kept,
                ]
            )
    head = [
        "run",
        "accuracy",
        "int8",
        "training",
        "bytes",
        "int8",
        "calibration error before, after, floor",
        "kept at 99, 95 %",
    ]
    return table(head, rows) + full_source(result)


def bench_training(results: Results) -> list[str]:
    result = results.get("training")
    if result is None:
        return []
    figures = result["figures"]

    rows = []
    if "cifar" in figures:
        rows += cifar_rows(figures["cifar"])
    if "mnist" in figures:
        rows += mnist_rows(figures["mnist"])
    lines = table(["", "the tutorial's loop", "step1"], rows)
    if figures["short"]:
        lines += ["", "One epoch each (`--short`): these accuracies are those of one epoch."]
    return lines + full_source(result)


def loop_cell(figures: dict) -> str:
    cell = f"{figures['tutorial_epoch_seconds']:.1f} s an epoch"
    if figures["tutorial_accuracy"] is not None:
        cell += f", {percent(figures['tutorial_accuracy'])} after ten"
    return cell


def cifar_rows(figures: dict) -> list[list[str]]:
    mynet = figures["mynet"]
    took = statistics.median(figures["train_seconds"]) / figures["epochs"]
    ours = f"{took:.1f} s an epoch, {percents(figures['accuracies'])} after {figures['epochs']}"
    reached = f"{percent(mynet['accuracy'])} after {mynet['epochs']}"
    theirs = f"{mynet['epoch_seconds']:.1f} s an epoch, {reached}"
    if mynet["seconds_to_tutorial"] is not None:
        theirs += f"; past the tutorial's accuracy after {mynet['seconds_to_tutorial']:.1f} s"

    share = figures["peak"] / figures["allowed"]
    return [
        ["CIFAR-10, default network", loop_cell(figures) + " (MyNet, batch 10)", ours],
        ["CIFAR-10, the tutorial's MyNet", "the same", theirs],
        [
            "peak memory, CIFAR-10, default network",
            "",
            f"{figures['peak'] / 1e9:.2f} GB, {share:.2f} of the dataset as uint8 + 1.2 GB",
        ],
        [
            "time outside forward, backward and step",
            "",
            f"{percent(figures['outside'], 1)} of an epoch",
        ],
    ]


def mnist_rows(figures: dict) -> list[list[str]]:
    took = statistics.median(figures["train_seconds"]) / figures["epochs"]
    ours = f"{took:.1f} s an epoch, {percents(figures['accuracies'])} after {figures['epochs']}"
    return [["MNIST, default network", loop_cell(figures) + " (ResBlock, batch 512)", ours]]


def bench_tutorials(results: Results) -> list[str]:
    """All set-ups, because their commands are worth reading; "-" where one was not measured."""
    result = results.get("tutorials")
    figures = result["figures"] if result else {}

    rows = []
    for tutorial in TUTORIALS:
        row = figures.get(tutorial.key)
        here = "-"
        if row and "accuracy" in row:
            here = percent(row["accuracy"])
        elif row:
            ratio = row["last_loss"] / row["first_loss"]
            here = f"loss {row['first_loss']:.0f} to {row['last_loss']:.0f} ({ratio:.3f})"
        rows.append([tutorial.title, tutorial.published, here, f"`{tutorial.command()}`"])

    lines = table(["tutorial", "published", "here", "command"], rows)
    return lines + full_source(result) if result else lines


def bench_memory(results: Results) -> list[str]:
    result = results.get("memory")
    if result is None:
        return []
    figures = result["figures"]
    limited = figures["limited"]
    size = limited["image_size"]
    rows = [
        ["decoding by step1", f"{figures['step1_rate']:,.0f} files a second"],
        ["Pillow alone, one core", f"{figures['pillow_rate']:,.0f} files a second"],
        ["one epoch of MyNet, decoding included", seconds(figures["first_seconds"])],
        ["the same from the cache", seconds(figures["cached_seconds"])],
        [
            f"the same at {size}x{size}, from a cache of {limited['cache_mb']:,.0f} MB, with "
            f"{limited['limit_mb']:,} MB of memory",
            seconds(limited["seconds"]),
        ],
    ]
    return table([f"{figures['files']:,} JPEG files", ""], rows) + full_source(result)


def bench_resume(results: Results) -> list[str]:
    result = results.get("resume")
    if result is None:
        return []
    figures = result["figures"]
    rows = [
        ["kills at random moments", f"{figures['killed']}"],
        ["checkpoints that could not be read", f"{figures['unreadable']}"],
        ["completed epochs that were lost", f"{figures['lost']}"],
        ["runs that reached their end", f"{figures['finished']}"],
        ["of these, with other weights or metrics", f"{figures['different']}"],
    ]
    return table(["", ""], rows) + full_source(result)


def bench_export(results: Results) -> list[str]:
    result = results.get("export")
    if result is None:
        return []
    runs = result["figures"]["runs"]

    head = ["", *(f"`{run['run']}`, {run['parameters']:,} parameters" for run in runs)]
    rows = [
        ["int8 file / float32 file", *(f"{run['int8_bytes'] / run['bytes']:.3f}" for run in runs)],
    ]
    for size in runs[0]["speedups"]:
        label = f"throughput int8 / float32, batch {size}, {runs[0]['threads']} thread(s)"
        rows.append([label, *(f"{run['speedups'][size]['speedup']:.2f}" for run in runs)])
    rows += [
        ["accuracy, float32", *(percent(run["accuracy"]) for run in runs)],
        ["accuracy, int8", *(percent(run["int8_accuracy"]) for run in runs)],
        ["answers changed by int8", *(f"{run['changed']} of {run['images']:,}" for run in runs)],
        ["CPU seconds of exporting ONNX", *(f"{run['onnx_cpu']:.0f}" for run in runs)],
        ["CPU seconds of exporting int8", *(f"{run['int8_cpu']:.0f}" for run in runs)],
        ["`--self-test` of the bundle", *(seconds(run["self_test_wall"]) for run in runs)],
    ]
    return table(head, rows, right_from=1) + full_source(result)


def bench_micro(results: Results) -> list[str]:
    result = results.get("micro")
    if result is None:
        return []
    runs = result["figures"]["runs"]

    head = ["", *(f"`{run['run']}`, `{run['model']}`" for run in runs)]
    arenas = [run["arena"] for run in runs]
    rows = [
        ["multiply-adds", *(f"{run['multiply_adds'] / 1e6:.1f} M" for run in runs)],
        ["instructions of an image, x86-64 reference kernels", *map(instructions_of, runs)],
        ["file, bytes", *(f"{run['file_bytes']:,}" for run in runs)],
        ["of it in flash, bytes", *(f"{run['flash_bytes']:,}" for run in runs)],
        ["arena, bytes", *(f"{arena:,}" if arena else "not measured" for arena in arenas)],
        ["images in the micro runtime", *(f"{run['images']:,}" for run in runs)],
        ["accuracy on them, float32", *(percent(run["accuracy_float"]) for run in runs)],
        ["accuracy on them, micro int8", *(percent(run["accuracy"]) for run in runs)],
        ["images in ONNX Runtime", *(f"{run['onnx_images']:,}" for run in runs)],
        ["accuracy on them, float32", *(percent(run["onnx_accuracy_float"]) for run in runs)],
        ["accuracy on them, ONNX int8", *(percent(run["onnx_accuracy"]) for run in runs)],
        ["largest difference to float32", *(f"{run['largest_difference']:.3f}" for run in runs)],
        ["mean difference to float32", *(f"{run['mean_difference']:.4f}" for run in runs)],
        ["export with its proof, CPU seconds", *(f"{run['export_cpu']:.0f}" for run in runs)],
    ]
    return table(head, rows, right_from=1) + full_source(result)


def instructions_of(run: dict) -> str:
    counted = run.get("instructions")
    return f"{counted / 1e6:.0f} M" if counted else "not counted"


def bench_inference(results: Results) -> list[str]:
    result = results.get("inference")
    if result is None:
        return []

    rows = []
    for row in result["figures"]["rows"]:
        sign = ">=" if row["higher_is_better"] else "<="
        aim = f"{sign} {row['target']:.3g}"
        rows.append(
            [
                row["what"],
                quantity(row["ours"], row["unit"]),
                quantity(row["baseline"], row["unit"]),
                f"{row['ours'] / row['baseline']:.3g}",
                aim if row["reached"] else f"{aim}, missed",
            ]
        )
    return table(["step3 / baseline", "step3", "baseline", "ratio", "aim"], rows) + full_source(
        result
    )


def bench_engines(results: Results) -> list[str]:
    result = results.get("engines")
    if result is None:
        return []
    figures = result["figures"]

    rows = []
    for row in figures["rows"]:
        label = f"{row['engine']} {row['version']}, {row['file']}"
        if "failed" in row:
            cells = [row["failed"].replace("|", "\\|"), *[""] * (len(figures["sizes"]) + 1)]
        else:
            cells = []
            for size in figures["sizes"]:
                worst = row["max"].get(size, "")
                cells.append(worst if isinstance(worst, str) else small(worst))
            cells.append(f"{row['changed']} of {row['answers']}")
            cells.append(f"{row['run'] / row['onnxruntime']:.2g}")
        rows.append([label, *cells])

    head = ["engine, file", *figures["sizes"], "answers changed", "time / onnxruntime"]
    return table(head, rows, right_from=1) + full_source(result)


def bench_robustness(results: Results) -> list[str]:
    result = results.get("robustness")
    if result is None:
        return []
    figures = result["figures"]

    rows = []
    for change in figures["changes"]:
        star = "" if change["resembled"] else " *"
        cells = []
        for row in change["strengths"]:
            cells.append(f"{row['strength']}: {percent(row['accuracy'])}")
        rows.append([change["change"] + star, *cells])

    clean = percent(figures["clean"]["accuracy"])
    nine = percent(statistics.fmean(figures["nine"]))
    return [
        *table(["change", "mild", "medium", "strong"], rows),
        "",
        f"{figures['images']:,} test images of `{figures['export']}`; unchanged {clean}, "
        f"mean of the nine {nine}.",
        *full_source(result),
    ]


def bench_unknown(results: Results) -> list[str]:
    result = results.get("unknown")
    if result is None:
        return []
    figures = result["figures"]

    rows = []
    for row in [*figures["kinds"], {"kind": "mean", "images": "", **figures["mean"]}]:
        rows.append(
            [
                row["kind"],
                str(row["images"]),
                percent(row["auroc"], 1),
                percent(row["auroc_of_probability"], 1),
                percent(row["unknown"], 1),
            ]
        )
    head = ["kind", "images", "AUROC of `known`", "of the largest probability", "called unknown"]
    kept = percent(figures["kept"])
    told = f"The threshold for 99 % keeps {kept} of the test images of `{figures['export']}`."
    return [*table(head, rows, right_from=1), "", told, *full_source(result)]


def bench_field(results: Results) -> list[str]:
    result = results.get("field")
    if result is None:
        return []
    exports = result["figures"]["exports"]

    rows = []
    for figures in exports:
        cost = figures["cost"]["watching"] / figures["cost"]["predicting"]
        memory = list(figures["memory"].values())
        rows.append(
            [
                f"`{figures['export']}`",
                f"{figures['compared']:,}",
                f"{figures['false_alarms']:,} of {figures['streams']:,}",
                f"{figures['repeated']} of 100 ({figures['repeated_each']})",
                percent(cost, 1),
                f"{memory[-1]['mb'] - memory[0]['mb']:.1f} MB",
            ]
        )
    head = [
        "export",
        "images of the reference",
        "false alarms",
        "if frames repeat (betting on each)",
        "CPU of predicting",
        "memory from 10,000 to 1,000,000 frames",
    ]
    lines = table(head, rows, right_from=1)
    for number, figures in enumerate(exports):
        changes, told = field_changes(figures)
        if number == 0:  # those of the others are in the results
            lines += ["", *changes]
        lines += ["", told]
    return [*lines, *full_source(result)]


def field_changes(figures: dict) -> tuple[list[str], str]:
    """The table of one export's changes, and what they come to."""
    rows = []
    missed = []
    medians = []
    errors = []
    for row in figures["changes"]:
        has_accuracy = row["accuracy"] is not None
        costs_much = has_accuracy and figures["accuracy"] - row["accuracy"] >= 0.1
        if costs_much:
            medians.append(row["median"] or float("inf"))
        if costs_much and row["found"] < 1:
            missed.append(row["change"])
        if has_accuracy and row["found"] < 1 and not row["change"].startswith("only"):
            errors.append(100 * abs(row["accuracy"] - row["estimate"]))
        rows.append(
            [
                row["change"],
                percent(row["accuracy"], 1),
                percent(row["estimate"], 1) if row["found"] < 1 else "withheld",
                percent(row["found"], 0),
                "-" if row["median"] is None else f"{row['median']:.0f}",
            ]
        )

    head = ["change", "accuracy", "estimated", "streams with an alarm", "images until then"]
    told = f"`{figures['export']}`, {figures['images']:,} test images."
    if medians:
        told += (
            f" Changes that cost 10 points or more: {len(medians)}, missed in some stream: "
            f"{', '.join(missed) or 'none'}; images to the alarm: {statistics.median(medians):.0f} "
            f"in the median, {max(medians):.0f} at most."
        )
    if figures["late"]:
        late = statistics.median(median or float("inf") for median in figures["late"])
        told += f" If they come after {figures['length']:,} images: {late:.0f} in the median."
    if errors:
        told += (
            " Error of the estimate where some stream raises no alarm: "
            f"{statistics.fmean(errors):.1f} points in the mean, {max(errors):.1f} at most."
        )
    return table(head, rows, right_from=1), told


def bench_promise(results: Results) -> list[str]:
    result = results.get("promise")
    if result is None:
        return []

    # Networks of the same data have the same classes, and a promise is as hard to keep for each.
    classes: dict[str, set] = {}
    for row in result["figures"]["rows"]:
        classes.setdefault(row["network"], set()).add(row["class"])
    alike: dict[frozenset, list[str]] = {}
    for network, names in classes.items():
        alike.setdefault(frozenset(names), []).append(network)

    lines = []
    for networks in alike.values():
        rows = [row for row in result["figures"]["rows"] if row["network"] in networks]
        lines += promise_table(rows)
        told = f"Means over {', '.join(networks)}; of recall, over the classes as well."
        lines += ["", told, ""]
    return [*lines[:-1], *full_source(result)]


def promise_table(figures: list[dict]) -> list[str]:
    """The table of networks that were trained on the same data."""
    groups: dict[tuple, list[dict]] = {}
    for row in figures:
        key = (row["kind"], row["share"], row["held_out"])
        groups.setdefault(key, []).append(row)

    rows = []
    for (kind, share, held_out), members in sorted(groups.items()):
        rows.append([f"{kind} {percent(share, 0)}", f"{held_out:,}", *promise_cells(members)])
    head = [
        "promise",
        "held-out images",
        "none found (worst)",
        "at best",
        "broken (worst)",
        "without chance (worst)",
        "answered, or false alarms",
        "in hindsight",
        "of it",
    ]
    return table(head, rows, right_from=1)


def promise_cells(rows: list[dict]) -> list[str]:
    """The figures of one promise with one number of held-out images, over networks and classes."""
    cells = [mean_and_worst([row["parts"]["none"] for row in rows])]
    at_best = [row["none_at_best"] for row in rows if "none_at_best" in row]
    cells.append(percent(statistics.fmean(at_best), 1) if at_best else "-")
    for kind in ("parts", "drawn"):
        cells.append(mean_and_worst([row[kind]["broken"] for row in rows]))

    found = [row["parts"] for row in rows if row["parts"]["cost"] is not None]
    if not found:
        return [*cells, "-", "-", "-"]
    cost = statistics.fmean(figures["cost"] for figures in found)
    best = statistics.fmean(figures["best"] for figures in found)
    return [*cells, percent(cost, 1), percent(best, 1), f"{cost / best:.2f}"]


def mean_and_worst(shares: list[float]) -> str:
    return f"{percent(statistics.fmean(shares), 1)} ({percent(max(shares), 1)})"


def bench_collect(results: Results) -> list[str]:
    lines = []
    for name, title in (
        ("collect", "The default network at half its width, trained from scratch:"),
        ("collect_pretrained", "`tf_efficientnet_lite0`, fine-tuned:"),
    ):
        if name in results:
            lines += ["", title, "", *gains_by_collecting(results[name])]
    return lines[1:]


def gains_by_collecting(result: dict) -> list[str]:
    figures = result["figures"]
    rows = []
    gains = []
    for row in figures["seeds"]:
        gains.append(row["collected"] - row["random"])
        rows.append(
            [
                str(row["seed"]),
                percent(row["first"]),
                percent(row["collected"]),
                percent(row["random"]),
                f"{100 * gains[-1]:+.2f} points",
            ]
        )
    head = ["seed", "trained on 2,000", "and 500 collected", "and 500 at random", "gain"]
    told = f"Mean gain: {100 * statistics.fmean(gains):+.2f} points. Aim: at least 1 point."
    return [*table(head, rows, right_from=1), "", told, *full_source(result)]


def bench_doctor(results: Results) -> list[str]:
    result = results.get("doctor")
    if result is None:
        return []
    figures = result["figures"]
    share = percent(figures["doctor_cpu"] / figures["decoding_cpu"], 1)
    told = (
        f"{figures['images']:,} images of `{figures['folder']}`: "
        f"decoding took {figures['decoding_cpu']:.1f} s of CPU time "
        f"and the doctor {figures['doctor_cpu']:.2f} s ({share}). "
        f"{figures['leaked']} test images are in the training split as they are."
    )
    return [*copies_table(figures), "", told, *full_source(result)]


def bench_honest(results: Results) -> list[str]:
    result = results.get("honest")
    if result is None:
        return []
    figures = result["figures"]
    rows = []
    for kind, row in figures["kinds"].items():
        warned = ", ".join(f"{name}: {count}" for name, count in sorted(row["warned"].items()))
        rows.append([kind, f"{row['sets']}", f"{row['refused']}", warned or "none"])

    fewest, most = figures["images"]
    told = (
        f"{figures['sets']} sets of {fewest:,} to {most:,} images, "
        f"{figures['int8']} of them exported as int8 as well. "
        "Faults planted into some of the exports:"
    )
    faults = []
    for name, row in figures["faults"].items():
        faults.append([name, f"{row['planted']}", f"{row['caught']}"])
    return [
        *table(["sets", "number", "refused", "sets with a warning, by what it is about"], rows),
        "",
        told,
        "",
        *table(["fault", "planted", "caught"], faults, right_from=1),
        *full_source(result),
    ]


def bench_fuzz(results: Results) -> list[str]:
    result = results.get("fuzz")
    if result is None:
        return []
    rows = []
    for row in result["figures"]["rows"]:
        rows.append([row["what"], f"{row['given']:,}", f"{row['refused']:,}", f"{row['faults']}"])
    head = ["damaged", "given", "refused with an error line", "faults"]
    return table(head, rows, right_from=1) + full_source(result)


def bench_arm64(results: Results) -> list[str]:
    result = results.get("arm64")
    if result is None:
        return []
    head = [
        "processor",
        "file",
        "self-test",
        "images",
        "decoded otherwise",
        "answers changed",
        "largest difference",
        "above 1e-4",
        "`known`",
        "",
    ]
    rows = []
    for row in result["figures"]["rows"]:
        rows.append([*row, *[""] * (len(head) - len(row))])
    return [
        *table(head, rows),
        "",
        "; ".join(result["figures"]["notes"]) + ".",
        *full_source(result),
    ]


def bench_pretrained(results: Results) -> list[str]:
    result = results.get("pretrained")
    if result is None:
        return []
    figures = result["figures"]
    measured = pretrained_runs(figures["rows"])
    rows = []
    for images, programs in sorted(measured.items()):
        for program, runs in programs.items():
            accuracies = percents([run["accuracy"] for run in runs])
            cpu = ", ".join(f"{run['cpu']:.0f}" for run in runs)
            errors = [run["calibration_error"] for run in runs if "calibration_error" in run]
            calibrated = percents(errors) if errors else ""
            rows.append([f"{images:,}", program, accuracies, calibrated, cpu])

    for images in COUNTS:
        if images not in measured:
            rows.append([f"{images:,}", "not measured yet", "", "", ""])
    said = (
        f"`{figures['model']}` at {figures['size']} px; the accuracy on {figures['judged']:,} test "
        "images, one figure for each seed."
    )
    head = ["images", "program", "accuracy", "calibration error", "CPU seconds"]
    return [said, "", *table(head, rows, right_from=2), *full_source(result)]


def pretrained_runs(rows: list[dict]) -> dict[int, dict[str, list[dict]]]:
    """Rows of bench_pretrained.py by the number of images and the program."""
    measured = {}
    for row in rows:
        program = row["program"]
        if program.startswith("fastai") and row["epochs"] != USUAL_EPOCHS:
            program = FASTAI_AS_LONG  # another number of epochs with each seed
        measured.setdefault(row["images"], {}).setdefault(program, []).append(row)
    return measured


TABLES = {
    "accuracy": accuracy,
    "device": device,
    "photos": photos,
    "int8": int8,
    "engines": engines,
    "leaks": leaks,
    "bench-accuracy": bench_accuracy,
    "bench-training": bench_training,
    "bench-tutorials": bench_tutorials,
    "bench-memory": bench_memory,
    "bench-resume": bench_resume,
    "bench-export": bench_export,
    "bench-micro": bench_micro,
    "bench-inference": bench_inference,
    "bench-engines": bench_engines,
    "bench-robustness": bench_robustness,
    "bench-unknown": bench_unknown,
    "bench-field": bench_field,
    "bench-promise": bench_promise,
    "bench-pretrained": bench_pretrained,
    "bench-collect": bench_collect,
    "bench-doctor": bench_doctor,
    "bench-honest": bench_honest,
    "bench-fuzz": bench_fuzz,
    "bench-arm64": bench_arm64,
}


# ---------------------------------------------------------------------------------------- the pages


def render(text: str, results: Results) -> str:
    """A page with its marked places filled. Raises KeyError for a marker without a table."""

    def fill(found: re.Match) -> str:
        lines = TABLES[found["name"]](results)
        if not lines:
            lines = [NOT_MEASURED]
        # Without the blank lines, GitHub takes the Markdown for a part of the comment.
        return found[1] + "\n" + "\n".join(lines) + "\n\n" + found[4]

    return MARKED.sub(fill, text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()

    results = read_results(args.results)
    stale = []
    for name in PAGES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        rendered = render(text, results)
        if rendered == text:
            continue
        stale.append(name)
        if not args.check:
            path.write_text(rendered, encoding="utf-8")

    for name in stale:
        print(f"{'stale' if args.check else 'rewrote'}: {name}")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

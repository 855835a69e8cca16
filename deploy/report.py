"""report.html of a run, and the pictures inside it.

step1 calls `draw_run` and `write_report` after training; step2 calls `write_report` again after an export.
"""

import base64
import csv
import html
import json
import os
import string
import struct

import numpy as np

from deploy.card import busy, confusion_matrix, formatted, without_empty_columns
from deploy.card import per_class as per_class  # for step1, which imports this module only
from deploy.reliability import calibration_error as calibration_error
from step3_infer import printable, replacing, sha256

CAPTIONS = {
    "curves.png": "Training figures are averages of an epoch, with augmentation and label smoothing if any.",
    "predicted.png": "Predictions on the test split against the true values; points on the line are exact.",
    "confusion.png": "Confusion matrix of the test split, coloured by the share of the true class (row).",
    "mistakes.png": "Wrong predictions on the test split: predicted class, its probability, and true class.",
    "samples.png": "Training images with their labels, after augmentation, as the network receives them.",
}
PASSED, FAILED = "<span class=good>passed</span>", "<span class=bad>FAILED</span>"


def draw_run(
    run_dir: str,
    spec: dict,
    rows: list[dict],
    labels: np.ndarray,
    outputs: np.ndarray,
    images=None,
    augmented: np.ndarray | None = None,
    augmented_labels: np.ndarray | None = None,
) -> list[str]:
    """Draw the pictures of a finished run into its directory and return their paths.

    spec: the run's; rows: those of metrics.csv, as dicts. Of the test split: labels, whole numbers [N];
    outputs, the probabilities [N, classes]; images, uint8 [H, W, C] by index, read only if they are drawn.
    augmented: uint8 [n, H, W, C] of the training split with their labels [n]. For a regression, labels and
    outputs are [N, 1], and there are no images. Raises ImportError without matplotlib, or OSError.
    """
    from deploy import pictures  # importing matplotlib takes a second, and it may be missing

    run, date, drawn = printable(os.path.basename(os.path.normpath(run_dir))), spec["created"][:10], {}
    if spec["task"] == "regression":
        subtitle = f"{run} · test loss {((labels - outputs) ** 2).mean():.4g} · {date}"
        drawn["predicted.png"] = pictures.predicted(subtitle, labels[:, 0], outputs[:, 0])
    else:
        subtitle = f"{run} · test accuracy {spec['test_accuracy']:.2%} · {date}"
        names = [printable(name) for name in spec["classes"]]
        counts = confusion_matrix(labels, outputs.argmax(1), len(names))
        drawn["confusion.png"] = pictures.confusion(subtitle, counts, names)
        drawn["mistakes.png"] = pictures.mistakes(subtitle, images, labels, outputs, names)
        if augmented is not None and len(augmented):
            drawn["samples.png"] = pictures.samples(subtitle, augmented, augmented_labels, names)
    drawn["curves.png"] = pictures.curves(subtitle, rows)
    for name, content in drawn.items():
        with replacing(os.path.join(run_dir, name)) as file:
            file.write(content)
    return [os.path.join(run_dir, name) for name in drawn]


def write_report(run_dir: str, runs_dir: str, exports_dir: str, export_dir: str | None = None) -> str:
    """Write report.html into the run's directory, one file with its pictures inside, and return its path.

    It is built from the run's config.json, summary.json, metrics.csv and pictures; from the export of its
    current checkpoint in `export_dir` (default: the run's name under exports_dir); and from all runs on the
    same data under runs_dir. Missing or malformed files are left out. Raises OSError if it cannot be written.
    """
    run = os.path.basename(os.path.normpath(run_dir))
    config, summary = read_run(run_dir)
    sections = [
        *picture_sections(run_dir),
        classes_section(summary.get("per_class", {})),
        export_section(run, read_export(run_dir, export_dir or os.path.join(exports_dir, run))),
        configuration_section(config),
        epochs_section(run_dir),
        runs_section(run, config, runs_dir, exports_dir),
    ]
    with open(os.path.join(os.path.dirname(__file__), "report.html.template"), encoding="utf-8") as file:
        template = string.Template(file.read())
    parts = {"run": text(run), "about": header(config, summary), "tiles": tiles(summary)}
    path = os.path.join(run_dir, "report.html")
    with replacing(path) as file:
        file.write(template.substitute(parts, sections="\n".join(sections)).encode())
    return path


def read_json(path):
    """The dict in a JSON file; an empty one if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_run(run_dir):
    """(config, summary) of a run's directory, each an empty dict if its file is missing or malformed."""
    return tuple(read_json(os.path.join(run_dir, name)) for name in ("config.json", "summary.json"))


def read_export(run_dir, export_dir):
    """{format: its figures in parity.json, and its path} of the exports of the run's current checkpoint."""
    try:
        checkpoint = sha256(os.path.join(run_dir, "checkpoint.pt"))
    except OSError:
        return {}
    found = {}
    for name, figures in read_json(os.path.join(export_dir, "parity.json")).items():
        if isinstance(figures, dict) and figures.get("checkpoint_sha256") == checkpoint:
            found[name] = {**figures, "path": os.path.join(export_dir, str(figures.get("file", "")))}
    return found


def text(value):
    """Any value as text for HTML."""
    return html.escape(printable(str(value)))


def duration(seconds):
    if not isinstance(seconds, (int, float)) or seconds < 60:
        return formatted(seconds, ".3g", " s")
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


def file_size(path):
    if not os.path.isfile(path):
        return "-"
    size = os.path.getsize(path)
    return f"{size:,} bytes" if size < 1e5 else f"{size / 1e6:.2f} MB"


def table(head, rows, marked=None):
    """An HTML table that scrolls if it is wide; cells are HTML, `marked` is the index of the row to mark."""
    head, rows = without_empty_columns(head, rows)
    head = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    lines = []
    for number, (first, *cells) in enumerate(rows):
        cells = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)
        mark = " class=mark aria-current=true" if number == marked else ""
        lines.append(f"<tr{mark}><th scope=row>{first}</th>{cells}</tr>\n")
    body = f"<thead><tr>{head}</tr></thead><tbody>\n{''.join(lines)}</tbody>"
    return f"<div class=scroll><table>{body}</table></div>"


def header(config, summary):
    """The line under the title."""
    data = text(config.get("dataset")) + (f" ({text(config['data_dir'])})" if config.get("data_dir") else "")
    parts = [f"{text(config.get('model'))} trained on {data}", text(str(summary.get("created", ""))[:10])]
    parts += [text(config.get(key, "")) for key in ("device_used", "precision_used")]
    return " · ".join(filter(None, [*parts, "" if summary else "not finished"]))


def tiles(summary):
    """The main figures, one tile each, without those that are missing: a regression has no accuracy."""
    epochs, best = summary.get("epochs"), summary.get("epoch_kept")
    figures = {
        "test accuracy": formatted(summary.get("test_accuracy"), ".2%"),
        "balanced accuracy": formatted(summary.get("balanced_accuracy"), ".2%"),
        "macro F1": formatted(summary.get("macro_f1"), ".2%"),
        "test loss": formatted(summary.get("test_loss"), ".4g"),
        "training time": duration(summary.get("train_seconds")),
        "epochs": formatted(epochs, ","),
        "best epoch": "-" if best == epochs else formatted(best, ","),
        "parameters": formatted(summary.get("parameters"), ","),
    }
    tile = "<div><span class=soft>{}</span><b>{}</b></div>"
    return "".join(tile.format(name, figure) for name, figure in figures.items() if figure != "-")


def picture_sections(run_dir):
    """The pictures in the run's directory: small ones side by side, then each wide one by itself."""
    small, wide = [], []
    for name, caption in CAPTIONS.items():
        try:
            with open(os.path.join(run_dir, name), "rb") as file:
                content = file.read()
            width, height = struct.unpack(">II", content[16:24])  # PNG's header
        except (OSError, struct.error):
            continue
        size = f'width="{width}" height="{height}"' + (" class=wide" if width > 1200 else "")
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        image = f'<div class=scroll><img {size} alt="{caption}" src="{source}"></div>'
        figure = f"<section><figure>{image}<figcaption>{caption}</figcaption></figure></section>"
        (wide if width > 1200 else small).append(figure)
    return [f"<div class=pair>{''.join(small)}</div>", *wide]


def classes_section(figures):
    """Precision, recall and F1 of each class as bars, after the classes with the lowest recall."""
    rows, recalls = [], []
    for number, (name, row) in enumerate(figures.items()):
        shares = [formatted(row[key], ".1%") for key in ("precision", "recall", "f1")]
        bars = [f'<td class=bar style="--part: {share}">{share}</td>' for share in shares]
        number = "" if name == str(number) else f"<span class=soft>{number}</span> "
        name = f"<bdi>{text(name)}</bdi>"
        rows.append([number + name, *bars, formatted(row["support"], ",")])
        recalls.append((row["recall"], name))
    if not rows:
        return ""
    lowest = [f"{name} ({recall:.1%})" for recall, name in sorted(recalls)[:3] if recall < 1]
    lowest = f"<p>Lowest recall: {', '.join(lowest)}.</p>" if lowest else ""
    inner = table(["class", "precision", "recall", "F1", "test images"], rows)
    return f"<section><h2>Classes</h2>{lowest}{inner}</section>"


def export_section(run, export):
    """The figures of each exported file, its failures and its warning."""
    rows, remarks = [], []
    for name, figures in export.items():
        probes = [probe["max_abs_diff"] for probe in figures.get("probes", {}).values()]
        on_probes = max(probes) if probes and None not in probes else None
        speedup = ", ".join(f"{times:.2f}x" for times in figures.get("speedup", {}).values())
        verdict = PASSED if figures.get("passed") else FAILED
        row = [text(name), text(figures.get("file", "-")), file_size(figures["path"]), verdict]
        row += [formatted(value, ".1e") for value in (figures.get("max_abs_diff"), on_probes)]
        row += [formatted(figures.get(key), ".2%") for key in ("top1_agreement", "accuracy")]
        rows.append([*row, speedup or "-", formatted(figures.get("latency_ms"), ".3g", " ms")])
        lines = filter(None, [*figures.get("failures", ()), figures.get("warning"), busy(figures)])
        remarks += [f"<li>{text(name)}: {text(line)}</li>" for line in lines]
    if not rows:
        command = f"<code>python step2_export.py --run {text(run)}</code>"
        return f"<section><h2>Export</h2><p>Not exported yet: {command}</p></section>"
    head = "format,file,size,parity,largest difference,on probes,top-1 agreement,accuracy"
    inner = table([*head.split(","), "speedup (batch 1; 64)", "latency (batch 1)"], rows)
    return (
        "<section><h2>Export</h2><p>Each file was compared with the trained network on the test split and on "
        f"synthetic probes.</p>{inner}<ul class=bad>{''.join(remarks)}</ul></section>"
    )


def configuration_section(config):
    """The arguments of step1 that say something."""
    lines = []
    for key, value in config.items():
        if key in ("name", "run") or value is None or value is False or value == []:
            continue
        if isinstance(value, list):
            value = ("x" if key == "image_size" else " ").join(map(str, value))
        value = f"{value:.6g}" if isinstance(value, float) else value
        lines.append(f"<div><dt>{text(key).replace('_', ' ')}</dt><dd>{text(value)}</dd></div>")
    return f"<section><h2>Configuration</h2><dl>{''.join(lines)}</dl></section>"


def epochs_section(run_dir):
    try:
        with open(os.path.join(run_dir, "metrics.csv"), newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
            rows = [[formatted(float(cell), ".5g") if cell else "-" for cell in row] for row in rows]
    except (OSError, ValueError, csv.Error):
        return ""
    inner = table([text(name).replace("_", " ") for name in head], rows)
    return f"<section><details><summary>Metrics of every epoch</summary>{inner}</details></section>"


def runs_section(run, config, runs_dir, exports_dir):
    """All runs on the same data side by side, the best first."""
    found = []
    for name in os.listdir(runs_dir) if os.path.isdir(runs_dir) else ():
        run_dir = os.path.join(runs_dir, name)
        other, summary = read_run(run_dir)
        if other and data_key(other) == data_key(config):
            export = read_export(run_dir, os.path.join(exports_dir, name))
            found.append((rank(summary), name, run_cells(name, other, summary, export)))
    found.sort()
    names, rows = [name for _, name, _ in found], [cells for _, _, cells in found]
    marked = names.index(run) if run in names else None
    head = "run,network,test accuracy,test loss,training time,epochs,parameters,file size,latency,date"
    return f"<section><h2>Runs on this dataset</h2>{table(head.split(','), rows, marked)}</section>"


def data_key(config):
    """What two comparable runs have in common: the dataset, and the directory of a user's own images."""
    own = config.get("dataset") in ("folder", "csv")
    return config.get("dataset"), os.path.abspath(str(config.get("data_dir"))) if own else None


def rank(summary):
    """A sort key: finished runs first, then by accuracy, then by loss."""
    accuracy, loss = summary.get("test_accuracy"), summary.get("test_loss")
    accuracy = accuracy if isinstance(accuracy, float) else 0.0
    return not summary, -accuracy, loss if isinstance(loss, float) else float("inf")


def run_cells(name, config, summary, export):
    """The cells of one run; file size and latency are those of its ONNX file, or else of its first file."""
    figures = export.get("onnx") or next(iter(export.values()), {"path": ""})
    cells = [f"<bdi>{text(name)}</bdi>" + ("" if summary else " <span class=soft>(not finished)</span>")]
    cells += [text(config.get("model", "-")), formatted(summary.get("test_accuracy"), ".2%")]
    cells += [formatted(summary.get("test_loss"), ".4g"), duration(summary.get("train_seconds"))]
    cells += [formatted(summary.get(key), ",") for key in ("epochs", "parameters")]
    cells += [file_size(figures["path"]), formatted(figures.get("latency_ms"), ".3g", " ms")]
    return [*cells, text(str(summary.get("created", "-"))[:10])]

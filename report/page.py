"""report.html of a run: one file, with its pictures inside.

step1 calls `write_report` after training; step2 calls it again after an export.
"""

import base64
import csv
import html
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

from inference.files import replacing, sha256
from report.drawing import PICTURES, draw_familiar
from report.promises import HEAD, promise_cells
from report.text import (
    MISSING,
    as_shown,
    busy_note,
    camera_table,
    cells,
    filled,
    formatted,
    without_empty_columns,
)

PASSED = "<span class=good>passed</span>"
FAILED = "<span class=bad>FAILED</span>"
WIDE = 1200  # pixels: wider pictures have no room beside another


def write_report(
    run_dir: str, runs_dir: str, exports_dir: str, export_dir: str | None = None
) -> str:
    """Write report.html into the run's directory and return its path. Raises OSError.

    It is built from the run's config.json, summary.json, metrics.csv and pictures; from the export
    of its current checkpoint in `export_dir` (default: the run's name under exports_dir), which
    familiar.png shows; and from all runs on the same data under runs_dir. Missing or malformed
    files are left out.
    """
    run = os.path.basename(os.path.normpath(run_dir))
    config = read_json(run_dir, "config.json")
    summary = read_json(run_dir, "summary.json")
    export = read_export(run_dir, export_dir or os.path.join(exports_dir, run))
    draw_familiar(run_dir, export)

    sections = [
        *picture_sections(run_dir),
        built(classes_section, summary.get("per_class", {})),
        built(export_section, run, export),
        built(promises_section, export),
        built(camera_section, export),
        built(configuration_section, config),
        built(epochs_section, run_dir),
        runs_section(run, config, runs_dir, exports_dir),
    ]
    page = filled(
        "report.html.template",
        run=escaped(run),
        about=built(header, config, summary),
        tiles=built(tiles, summary),
        warnings=built(warnings_list, summary),
        sections="\n".join(sections),
    )

    path = os.path.join(run_dir, "report.html")
    with replacing(path) as file:
        file.write(page.encode())
    return path


def built(make: Callable[..., str | list], *shown) -> str | list:
    """What `make` makes of values that were read; nothing if they are not such as we write."""
    try:
        return make(*shown)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError):
        return ""


# ------------------------------------------------------------------------------------- what is read
def read_json(directory: str, name: str) -> dict:
    """The dict in a JSON file; an empty one if there is none."""
    try:
        value = json.loads(Path(directory, name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_export(run_dir: str, export_dir: str) -> dict[str, dict]:
    """Exports of the run's current checkpoint by format: figures of parity.json, and `path`."""
    try:
        checkpoint = sha256(os.path.join(run_dir, "checkpoint.pt"))
    except OSError:
        return {}

    found = {}
    for name, figures in read_json(export_dir, "parity.json").items():
        if isinstance(figures, dict) and figures.get("checkpoint_sha256") == checkpoint:
            path = os.path.join(export_dir, str(figures.get("file", "")))
            found[name] = {**figures, "path": path}
    return found


# ------------------------------------------------------------------------------ the top of the page
def header(config, summary):
    """One line: network, data, date, machine."""
    data = escaped(config.get("dataset"))
    if config.get("data_dir"):
        data += f" ({escaped(config['data_dir'])})"

    parts = [
        f"{escaped(config.get('model'))} trained on {data}",
        escaped(date_of(summary, "")),
        escaped(config.get("device_used", "")),
        escaped(config.get("precision_used", "")),
    ]
    if not summary:
        parts.append("not finished")
    return " · ".join(part for part in parts if part)


def tiles(summary):
    """The main figures, one tile each, without those that a run lacks, as a regression accuracy."""
    epochs = summary.get("epochs")
    best_epoch = summary.get("epoch_kept")
    if best_epoch == epochs:  # the last one, as without a validation split
        best_epoch = None

    figures = [  # name, figure, note
        ("test accuracy", formatted(summary.get("test_accuracy"), ".2%"), accuracy_note(summary)),
        ("balanced accuracy", formatted(summary.get("balanced_accuracy"), ".2%"), ""),
        ("macro F1", formatted(summary.get("macro_f1"), ".2%"), ""),
        ("test loss", formatted(summary.get("test_loss"), ".4g"), ""),
        (
            "calibration error",
            formatted(summary.get("calibration_error"), ".2%"),
            calibration_note(summary),
        ),
        ("not seen of an image", unseen(summary), "cut away by --fit crop"),
        ("training time", duration(summary.get("train_seconds")), ""),
        ("epochs", formatted(epochs, ","), ""),
        ("best epoch", formatted(best_epoch, ","), ""),
        ("parameters", formatted(summary.get("parameters"), ","), ""),
    ]
    return "".join(tile(*figure) for figure in figures if figure[1] != MISSING)


def warnings_list(summary):
    """What step1 has warned of."""
    lines = [f"<p><b>Warning:</b> {escaped(warning)}</p>" for warning in summary["warnings"]]
    return "".join(lines)


def tile(name, figure, note):
    return (
        f"<div><span class=soft>{name}</span><b>{figure}</b><small class=soft>{note}</small></div>"
    )


def unseen(summary):
    """The part of the average image that is cut away, if any is."""
    return formatted(summary.get("unseen") or None, ".1%")


def accuracy_note(summary):
    """What the accuracy is of, where the curves show another one, and what leaks make of it."""
    notes = [leak_note(summary)]
    if summary.get("averaged_with_twin"):
        notes.append("of the average of several networks; the curves are those of one")
    return "; ".join(note for note in notes if note)


def leak_note(summary):
    """The accuracy without the test images that are also in the training split, if any are."""
    count = summary.get("test_images_in_train")
    if not count:
        return ""
    without = formatted(summary.get("test_accuracy_without_them"), ".2%")
    noun = "image" if count == 1 else "images"
    return f"{without} without {formatted(count, ',')} {noun} also in the training split"


def calibration_note(summary):
    if "temperature" not in summary:
        return "not calibrated"
    floor = formatted(summary.get("calibration_error_floor"), ".2%")
    return "" if floor == MISSING else f"noise floor {floor}"


# ------------------------------------------------------------------------------------- its sections
def picture_sections(run_dir: str) -> list[str]:
    """The pictures of the run: small ones side by side, then each wide one by itself."""
    small = []
    wide = []
    for picture in PICTURES:
        try:
            content = Path(run_dir, picture.file).read_bytes()
            width, height = struct.unpack(">II", content[16:24])  # PNG's header
        except (OSError, struct.error):
            continue

        size = f'width="{width}" height="{height}"'
        if width > WIDE:
            size += " class=wide"
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        image = f'<div class=scroll><img {size} alt="{picture.caption}" src="{source}"></div>'
        caption = f"<figcaption>{picture.caption}</figcaption>"
        section = f"<section><figure>{image}{caption}</figure></section>"

        if width > WIDE:
            wide.append(section)
        else:
            small.append(section)
    return [f"<div class=pair>{''.join(small)}</div>", *wide]


def classes_section(per_class):
    """The figures of each class, and which classes are recognised worst."""
    if not per_class:
        return ""

    styles = {"precision": ".1%", "recall": ".1%", "f1": ".1%"}
    rows = []
    for number, (name, figures) in enumerate(per_class.items()):
        row = [numbered(name, number)]
        for share in cells(figures, styles):
            row.append(f'<td class=bar style="--part: {share}">{share}</td>')
        row.append(formatted(figures.get("support"), ","))
        rows.append(row)

    inner = table(["class", "precision", "recall", "F1", "test images"], rows)
    return f"<section><h2>Classes</h2>{lowest_recall(per_class)}{inner}</section>"


def numbered(name, number):
    """The name of a class, with its number unless that is the name."""
    shown = f"<bdi>{escaped(name)}</bdi>"
    if name == str(number):
        return shown
    return f"<span class=soft>{number}</span> {shown}"


def lowest_recall(per_class):
    by_recall = sorted(
        (figures["recall"], f"<bdi>{escaped(name)}</bdi>") for name, figures in per_class.items()
    )
    lowest = [f"{name} ({recall:.1%})" for recall, name in by_recall[:3] if recall < 1]
    if not lowest:
        return ""
    return f"<p>Lowest recall: {', '.join(lowest)}.</p>"


def remarks_on(figures):
    """What is wrong with an exported file, and what to know of it; some may be empty."""
    warnings = [f"warning: {text}" for text in figures.get("warnings", ())]
    return [
        *figures.get("failures", ()),
        *warnings,
        figures.get("warning"),
        busy_note(figures),
    ]


def export_section(run, export):
    """The exported files, each with how it compares to the trained network, and remarks on them."""
    if not export:
        command = f"<code>python step2_export.py --run {escaped(run)}</code>"
        return f"<section><h2>Export</h2><p>Not exported yet: {command}</p></section>"

    rows = []
    remarks = []
    for name, figures in export.items():
        rows.append(export_row(name, figures))
        for remark in remarks_on(figures):
            if remark:
                remarks.append(f"<li>{escaped(name)}: {escaped(remark)}</li>")

    head = [
        "format",
        "file",
        "size",
        "parity",
        "largest difference",
        "on probes",
        "top-1 agreement",
        "accuracy",
        "speedup (batch 1; 64)",
        "latency (batch 1)",
    ]
    about = (
        "Each file was compared with the trained network on the test split and on synthetic probes."
    )
    remarks = f"<ul class=bad>{''.join(remarks)}</ul>"
    return f"<section><h2>Export</h2><p>{about}</p>{table(head, rows)}{remarks}</section>"


def export_row(name, figures):
    on_probes = [probe["max_abs_diff"] for probe in figures.get("probes", {}).values()]
    largest_on_probes = None
    if on_probes and None not in on_probes:
        largest_on_probes = max(on_probes)

    speedup = ", ".join(f"{factor:.2f}x" for factor in figures.get("speedup", {}).values())
    return [
        escaped(name),
        escaped(figures.get("file", MISSING)),
        file_size(figures["path"]),
        PASSED if figures.get("passed") else FAILED,
        formatted(figures.get("max_abs_diff"), ".1e"),
        formatted(largest_on_probes, ".1e"),
        formatted(figures.get("top1_agreement"), ".2%"),
        formatted(figures.get("accuracy"), ".2%"),
        speedup or MISSING,
        formatted(figures.get("latency_ms"), ".3g", " ms"),
    ]


def promises_section(export):
    """What each file promises, and how that held on the test split."""
    rows = []
    for name, figures in export.items():
        for promise in figures.get("promises") or ():
            rows.append([escaped(name), *map(escaped, promise_cells(promise))])
    if not rows:
        return ""
    about = (
        "Each holds with 95 % confidence for images drawn like those that its threshold was chosen "
        "on, which are neither in the training nor in the test split."
    )
    return f"<section><h2>Promises</h2><p>{about}</p>{table(['format', *HEAD], rows)}</section>"


def camera_section(export):
    """What everyday changes of a picture cost, as step2 measured it."""
    measured = {}
    for name, figures in export.items():
        if figures.get("camera"):
            measured[name] = figures["camera"]
    if not measured:
        return ""

    formats, rows = camera_table(measured, {"accuracy": ".1%", "known": ".2f"})
    head = ["change"]
    for name in formats:
        prefix = f"{escaped(name)}: " if name else ""
        head += [f"{prefix}accuracy", "mean of known"]
    rows = [[escaped(change), *figures] for change, *figures in rows]

    about = "Accuracy on some test images after changes that cameras make in everyday use."
    inner = table(head, rows)
    return f"<section><h2>Changes that cameras make</h2><p>{about}</p>{inner}</section>"


def configuration_section(config):
    lines = []
    for key, value in config.items():
        says_nothing = value is None or value is False or value == []
        if says_nothing or key in ("name", "run"):
            continue

        if isinstance(value, list):
            separator = "x" if key == "image_size" else " "
            value = separator.join(str(part) for part in value)
        elif isinstance(value, float):
            value = f"{value:.6g}"
        name = escaped(key).replace("_", " ")
        lines.append(f"<div><dt>{name}</dt><dd>{escaped(value)}</dd></div>")
    return f"<section><h2>Configuration</h2><dl>{''.join(lines)}</dl></section>"


def epochs_section(run_dir):
    """The table of metrics.csv, folded."""
    try:
        with open(os.path.join(run_dir, "metrics.csv"), newline="", encoding="utf-8") as file:
            head, *lines = csv.reader(file)
        rows = []
        for line in lines:
            rows.append([formatted(float(cell), ".5g") if cell else MISSING for cell in line])
    except (OSError, ValueError, csv.Error):
        return ""

    inner = table([escaped(name).replace("_", " ") for name in head], rows)
    return f"<section><details><summary>Metrics by epoch</summary>{inner}</details></section>"


# ---------------------------------------------------------------------------- runs on the same data
def runs_section(run, config, runs_dir, exports_dir):
    """All runs on the same data, the best first; that of this page is marked."""
    names = os.listdir(runs_dir) if os.path.isdir(runs_dir) else []
    found = []
    for name in names:
        run_dir = os.path.join(runs_dir, name)
        other = read_json(run_dir, "config.json")
        if not other or data_key(other) != data_key(config):
            continue
        summary = read_json(run_dir, "summary.json")
        export = read_export(run_dir, os.path.join(exports_dir, name))
        row = built(run_row, name, other, summary, export)
        if row:
            found.append((rank(summary), name, row))
    found.sort()

    marked = None
    rows = []
    for number, (_, name, row) in enumerate(found):
        rows.append(row)
        if name == run:
            marked = number

    head = [
        "run",
        "network",
        "test accuracy",
        "test loss",
        "training time",
        "epochs",
        "parameters",
        "file size",
        "latency",
        "date",
    ]
    return f"<section><h2>Runs on this dataset</h2>{table(head, rows, marked)}</section>"


def data_key(config):
    """What comparable runs have in common: the dataset, and the directory of one's own images."""
    dataset = config.get("dataset")
    if dataset in ("folder", "csv"):
        return dataset, os.path.abspath(str(config.get("data_dir")))
    return dataset, None


def rank(summary):
    """A sort key: finished runs first, then by accuracy, then by loss."""
    accuracy = summary.get("test_accuracy")
    if not isinstance(accuracy, float):
        accuracy = 0.0
    loss = summary.get("test_loss")
    if not isinstance(loss, float):
        loss = float("inf")
    is_unfinished = not summary
    return is_unfinished, -accuracy, loss


def run_row(name, config, summary, export):
    """The cells of a run; file size and latency are those of its ONNX file, or else its first."""
    figures = {"path": ""}
    if export:
        figures = export.get("onnx") or next(iter(export.values()))

    shown = f"<bdi>{escaped(name)}</bdi>"
    if not summary:
        shown += " <span class=soft>(not finished)</span>"
    return [
        shown,
        escaped(config.get("model", MISSING)),
        formatted(summary.get("test_accuracy"), ".2%"),
        formatted(summary.get("test_loss"), ".4g"),
        duration(summary.get("train_seconds")),
        formatted(summary.get("epochs"), ","),
        formatted(summary.get("parameters"), ","),
        file_size(figures["path"]),
        formatted(figures.get("latency_ms"), ".3g", " ms"),
        escaped(date_of(summary, MISSING)),
    ]


# ------------------------------------------------------------------------------------- text as HTML
def escaped(value: object) -> str:
    """Untrusted text as HTML."""
    return html.escape(as_shown(value))


def date_of(summary, missing):
    return str(summary.get("created", missing))[: len("2026-01-02")]


def duration(seconds: object) -> str:
    if not isinstance(seconds, (int, float)) or seconds < 60:
        return formatted(seconds, ".3g", " s")
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


def file_size(path: str) -> str:
    if not os.path.isfile(path):
        return MISSING
    size = os.path.getsize(path)
    if size < 100_000:
        return f"{size:,} bytes"
    return f"{size / 1e6:.2f} MB"


def table(head: list[str], rows: list[list[str]], marked: int | None = None) -> str:
    """An HTML table that scrolls if it is wide.

    Cells are HTML, those that start with <td as they are. marked: the index of the row to mark.
    """
    head, rows = without_empty_columns(head, rows)
    columns = "".join(f"<th scope=col>{cell}</th>" for cell in head)

    lines = []
    for number, (first, *others) in enumerate(rows):
        mark = " class=mark aria-current=true" if number == marked else ""
        line = f"<tr{mark}><th scope=row>{first}</th>"
        for cell in others:
            line += cell if cell.startswith("<td") else f"<td>{cell}</td>"
        lines.append(f"{line}</tr>\n")

    body = f"<thead><tr>{columns}</tr></thead><tbody>\n{''.join(lines)}</tbody>"
    return f"<div class=scroll><table>{body}</table></div>"

"""report.html of a run, and the pictures inside it.

step1 calls `write_report` after training; step2 calls it again after an export.
"""

import csv
import html
import json
import os
from pathlib import Path

from inference.command_line import printable
from inference.files import replacing, sha256
from report.card import (
    busy,
    camera_rows,
    cells,
    filled,
    formatted,
    without_empty_columns,
)
from report.drawing import draw_familiar, picture_sections

# For training/result.py, which receives this module.
PASSED, FAILED = "<span class=good>passed</span>", "<span class=bad>FAILED</span>"


def write_report(run_dir: str, runs_dir: str, exports_dir: str, export_dir: str | None = None) -> str:
    """Write report.html into the run's directory, one file with its pictures inside, and return its path.

    It is built from the run's config.json, summary.json, metrics.csv and pictures; from the export of its
    current checkpoint in `export_dir` (default: the run's name under exports_dir), which familiar.png shows;
    and from all runs on the same data under runs_dir, without missing or malformed files. Raises OSError.
    """
    run = os.path.basename(os.path.normpath(run_dir))
    config, summary = (read_json(run_dir, name) for name in ("config.json", "summary.json"))
    export = read_export(run_dir, export_dir or os.path.join(exports_dir, run))
    draw_familiar(run_dir, export)
    sections = [*picture_sections(run_dir), classes_section(summary.get("per_class", {}))]
    sections += [export_section(run, export), camera_section(export), configuration_section(config)]
    sections += [epochs_section(run_dir), runs_section(run, config, runs_dir, exports_dir)]
    parts = {"run": text(run), "about": header(config, summary), "tiles": tiles(summary)}
    page = filled("report.html.template", **parts, sections="\n".join(sections))
    path = os.path.join(run_dir, "report.html")
    with replacing(path) as file:
        file.write(page.encode())
    return path


def read_json(directory, name):
    """The dict in a JSON file; an empty one if there is none."""
    try:
        value = json.loads(Path(directory, name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_export(run_dir, export_dir):
    """{format: its figures in parity.json, and its path} of the exports of the run's current checkpoint."""
    try:
        checkpoint = sha256(os.path.join(run_dir, "checkpoint.pt"))
    except OSError:
        return {}
    found = {}
    for name, figures in read_json(export_dir, "parity.json").items():
        if isinstance(figures, dict) and figures.get("checkpoint_sha256") == checkpoint:
            found[name] = {**figures, "path": os.path.join(export_dir, str(figures.get("file", "")))}
    return found


def header(config, summary):
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
        "calibration error": formatted(summary.get("calibration_error"), ".2%"),
        "training time": duration(summary.get("train_seconds")),
        "epochs": formatted(epochs, ","),
        "best epoch": "-" if best == epochs else formatted(best, ","),
        "parameters": formatted(summary.get("parameters"), ","),
    }
    floor = formatted(summary.get("calibration_error_floor"), ".2%")
    note = "" if floor == "-" else f"noise floor {floor}"
    notes = {"calibration error": note if "temperature" in summary else "not calibrated"}
    if count := summary.get("test_images_in_train"):
        without = formatted(summary.get("test_accuracy_without_them"), ".2%")
        notes["test accuracy"] = f"{without} without {formatted(count, ',')} that also lie in train"
    known = [(name, figure, notes.get(name, "")) for name, figure in figures.items() if figure != "-"]
    tile = "<div><span class=soft>{}</span><b>{}</b><small class=soft>{}</small></div>"
    return "".join(tile.format(*cells) for cells in known)


def classes_section(figures):
    if not figures:
        return ""
    rows = []
    for number, (name, row) in enumerate(figures.items()):
        shares = cells(row, precision=".1%", recall=".1%", f1=".1%")
        bars = [f'<td class=bar style="--part: {share}">{share}</td>' for share in shares]
        number = "" if name == str(number) else f"<span class=soft>{number}</span> "
        rows.append([f"{number}<bdi>{text(name)}</bdi>", *bars, *cells(row, support=",")])
    lowest = sorted((row["recall"], f"<bdi>{text(name)}</bdi>") for name, row in figures.items())[:3]
    lowest = [f"{name} ({recall:.1%})" for recall, name in lowest if recall < 1]
    lowest = f"<p>Lowest recall: {', '.join(lowest)}.</p>" if lowest else ""
    inner = table(["class", "precision", "recall", "F1", "test images"], rows)
    return f"<section><h2>Classes</h2>{lowest}{inner}</section>"


def export_section(run, export):
    rows, remarks = [], []
    for name, figures in export.items():
        probes = [probe["max_abs_diff"] for probe in figures.get("probes", {}).values()]
        on_probes = max(probes) if probes and None not in probes else None
        speedup = ", ".join(f"{times:.2f}x" for times in figures.get("speedup", {}).values())
        verdict = PASSED if figures.get("passed") else FAILED
        row = [text(name), text(figures.get("file", "-")), file_size(figures["path"]), verdict]
        row += [*cells(figures, max_abs_diff=".1e"), formatted(on_probes, ".1e")]
        row += [*cells(figures, top1_agreement=".2%", accuracy=".2%"), speedup or "-"]
        rows.append([*row, formatted(figures.get("latency_ms"), ".3g", " ms")])
        lines = filter(None, [*figures.get("failures", ()), figures.get("warning"), busy(figures)])
        remarks += [f"<li>{text(name)}: {text(line)}</li>" for line in lines]
    if not rows:
        command = f"<code>python step2_export.py --run {text(run)}</code>"
        return f"<section><h2>Export</h2><p>Not exported yet: {command}</p></section>"
    head = "format,file,size,parity,largest difference,on probes,top-1 agreement,accuracy"
    inner = table([*head.split(","), "speedup (batch 1; 64)", "latency (batch 1)"], rows)
    about = "Each file was compared with the trained network on the test split and on synthetic probes."
    remarks = f"<ul class=bad>{''.join(remarks)}</ul>"
    return f"<section><h2>Export</h2><p>{about}</p>{inner}{remarks}</section>"


def camera_section(export):
    measured = {name: figures["camera"] for name, figures in export.items() if figures.get("camera")}
    if not measured:
        return ""
    rows = camera_rows(list(measured.values()), accuracy=".1%", known=".2f")
    head = ["change", *(cell for name in measured for cell in (f"{text(name)}: accuracy", "mean of known"))]
    about = "Some images of the test split, changed as cameras change them in everyday use."
    inner = table(head, [[text(first), *others] for first, *others in rows])
    return f"<section><h2>Pictures as a camera changes them</h2><p>{about}</p>{inner}</section>"


def configuration_section(config):
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
    found = []
    for name in os.listdir(runs_dir) if os.path.isdir(runs_dir) else ():
        run_dir = os.path.join(runs_dir, name)
        other, summary = (read_json(run_dir, name) for name in ("config.json", "summary.json"))
        if other and data_key(other) == data_key(config):
            export = read_export(run_dir, os.path.join(exports_dir, name))
            found.append((rank(summary), name, run_cells(name, other, summary, export)))
    found.sort()
    marked = next((number for number, (_, name, _) in enumerate(found) if name == run), None)
    rows = [row for *_, row in found]
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
    first = f"<bdi>{text(name)}</bdi>" + ("" if summary else " <span class=soft>(not finished)</span>")
    row = [first, text(config.get("model", "-")), *cells(summary, test_accuracy=".2%", test_loss=".4g")]
    row += [duration(summary.get("train_seconds")), *cells(summary, epochs=",", parameters=",")]
    row += [file_size(figures["path"]), formatted(figures.get("latency_ms"), ".3g", " ms")]
    return [*row, text(str(summary.get("created", "-"))[:10])]


def text(value):
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
    for number, (first, *others) in enumerate(rows):
        others = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in others)
        mark = " class=mark aria-current=true" if number == marked else ""
        lines.append(f"<tr{mark}><th scope=row>{first}</th>{others}</tr>\n")
    body = f"<thead><tr>{head}</tr></thead><tbody>\n{''.join(lines)}</tbody>"
    return f"<div class=scroll><table>{body}</table></div>"

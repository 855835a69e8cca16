"""What a person looks at of a run: its pictures, and report.html.

`draw_run` and `write_report` are called by step1 after training, `write_report` once more by step2 after an export:
it reads all it shows back from the files of the run. Everything here is handed plain values and paths.
"""

import base64
import contextlib
import csv
import hashlib
import html
import json
import os
import string
import struct

import numpy as np

from deploy.card import FILES, count_pairs, model_card, per_class, printable, shown, without_empty

__all__ = ["draw_run", "model_card", "per_class", "write_report"]

CAPTIONS = {
    "curves.png": "By epoch. The training figures are taken while training, with its augmentation and label smoothing: "
    "they may look worse than those of the test split.",
    "predicted.png": "Predictions over the test split; on the line they equal the truth.",
    "confusion.png": "Rows are the truth, columns the answers: how many test images, and their share of the row.",
    "mistakes.png": "The wrong answers that the network was surest of: its answer, how sure it was, and the truth.",
    "samples.png": "Images of the training split as the network sees them, with their labels.",
}


# ------------------------------------------------------------------------------------------------------- pictures


def draw_run(run_dir, spec, rows, labels, outputs, images=None, augmented=None, augmented_labels=None):
    """Draw the pictures of a finished run into its directory. -> their paths.

    spec: the run's; rows: those of metrics.csv, as dicts. Of the test split: labels, whole numbers [N]; outputs, the
    probabilities [N, classes]; images, uint8 by index, of which only the wrongly answered are read. augmented: uint8
    [n, H, W, C] of the training split with their labels [n]. For a regression: labels and outputs are [N, 1], and there
    are no images. Raises ImportError without matplotlib, OSError where a file cannot be written.
    """
    from deploy import pictures  # importing matplotlib takes a second, and it may be missing

    labels, outputs = np.asarray(labels), np.asarray(outputs)
    run = printable(os.path.basename(os.path.normpath(run_dir)))
    drawn = {}
    if spec["task"] == "regression":
        about = f"{run} · test loss {((labels - outputs) ** 2).mean():.4g} · {spec['created'][:10]}"
        drawn["predicted.png"] = pictures.predicted(about, labels[:, 0], outputs[:, 0])
    else:
        about = f"{run} · test accuracy {spec['test_accuracy']:.2%} · {spec['created'][:10]}"
        names = [printable(name) for name in spec["classes"]]
        drawn["confusion.png"] = pictures.confusion(
            about, count_pairs(labels, outputs.argmax(1), len(names)), names
        )
        drawn["mistakes.png"] = pictures.mistakes(about, images, labels, outputs, names)
        if augmented is not None and len(augmented):
            drawn["samples.png"] = pictures.samples(about, augmented, np.asarray(augmented_labels), names)
    drawn["curves.png"] = pictures.curves(about, rows)
    for name, content in drawn.items():
        write_whole(os.path.join(run_dir, name), content)
    return [os.path.join(run_dir, name) for name in drawn]


def write_whole(path, content):
    """Write bytes beside `path`, then swap them in."""
    try:
        with open(path + ".tmp", "wb") as file:
            file.write(content)
        os.replace(path + ".tmp", path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path + ".tmp")
        raise


# --------------------------------------------------------------------------------------------------------- report


def write_report(run_dir, runs_dir, exports_dir, export_dir=None):
    """Write report.html into the run's directory: one file with its pictures inside. -> its path.

    It shows what lies there: config.json, summary.json, metrics.csv and the pictures; the export of this very
    checkpoint in `export_dir` (by default the run's name under exports_dir); and all runs of the same data under
    runs_dir side by side. What is missing, broken or another program's is left out. Raises OSError where the report
    cannot be written.
    """
    run = os.path.basename(os.path.normpath(run_dir))
    config, summary = read_run(run_dir)
    sections = [
        *pictures_of(run_dir),
        classes_section(summary.get("per_class", {})),
        export_section(run, read_export(run_dir, export_dir or os.path.join(exports_dir, run))),
        configuration_section(config),
        epochs_section(run_dir),
        runs_section(run, config, runs_dir, exports_dir),
    ]
    with open(os.path.join(os.path.dirname(__file__), "report.html.template"), encoding="utf-8") as file:
        template = string.Template(file.read())
    parts = {"run": text(run), "about": about(config, summary), "tiles": tiles(summary)}
    path = os.path.join(run_dir, "report.html")
    write_whole(path, template.substitute(parts, sections="\n".join(sections)).encode())
    return path


def read_json(path):
    """The dict in a JSON file, an empty one where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_run(run_dir):
    """(config, summary) of a run's directory: empty where it is none, or is not finished."""
    return tuple(read_json(os.path.join(run_dir, name)) for name in ("config.json", "summary.json"))


def read_export(run_dir, export_dir):
    """{format: (path, its figures in parity.json)} of what was exported from this run's checkpoint as it is now."""
    try:
        with open(os.path.join(run_dir, "checkpoint.pt"), "rb") as file:
            checkpoint = hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return {}
    parity, found = read_json(os.path.join(export_dir, "parity.json")), {}
    for form, name in FILES.items():
        figures = parity.get(form)
        if isinstance(figures, dict) and figures.get("checkpoint_sha256") == checkpoint:
            found[form] = os.path.join(export_dir, name), figures
    return found


# ----------------------------------------------------------------------------------------------------- HTML parts


def text(value):
    """Anything at all as text for HTML."""
    return html.escape(printable(value))


def duration(seconds):
    if not isinstance(seconds, (int, float)) or seconds < 60:
        return shown(seconds, ".3g", " s")
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


def file_size(path):
    return shown(os.path.getsize(path) / 1e6, ".2f", " MB") if os.path.isfile(path) else "-"


def table(head, rows, marked=None):
    """An HTML table that scrolls by itself where it is wide; cells are HTML, `marked` is the number of a row."""
    head, rows = without_empty(head, rows)
    lines = ["".join(f"<th scope=col>{cell}</th>" for cell in head)]
    for number, (first, *cells) in enumerate(rows):
        cells = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)
        mark = " class=mark aria-current=true" if number == marked else ""
        lines.append(f"<tr{mark}><th scope=row>{first}</th>{cells}</tr>")
    body = "\n".join(lines[1:])
    return (
        f"<div class=scroll><table><thead><tr>{lines[0]}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def about(config, summary):
    """The line under the title."""
    data = text(config.get("dataset")) + (f" ({text(config['data_dir'])})" if config.get("data_dir") else "")
    parts = [f"{text(config.get('model'))} trained on {data}", text(str(summary.get("created", ""))[:10])]
    parts += [text(config.get(key, "")) for key in ("device_used", "precision_used")]
    return " · ".join(filter(None, [*parts, "" if summary else "not finished"]))


def tiles(summary):
    """The figures that one looks for first."""
    kept, epochs = summary.get("epoch_kept"), summary.get("epochs")
    values = {
        "test accuracy": shown(summary.get("test_accuracy"), ".2%"),
        "test loss": shown(summary.get("test_loss"), ".4g"),
        "training": duration(summary.get("train_seconds")),
        "epochs": shown(epochs, ",") + ("" if kept in (None, epochs) else f", best {shown(kept, ',')}"),
        "parameters": shown(summary.get("parameters"), ","),
    }
    if summary and summary.get("test_accuracy") is None:  # a regression
        del values["test accuracy"]
    return "".join(
        f"<div><span class=soft>{name}</span><b>{value}</b></div>" for name, value in values.items()
    )


def pictures_of(run_dir):
    """The pictures that lie in the run: small ones side by side, then each wide one by itself."""
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
    rows, recalls = [], []
    for number, (name, row) in enumerate(figures.items()):
        bars = [shown(row[key], ".1%") for key in ("precision", "recall", "f1")]
        bars = [f'<td class=bar style="--part: {bar}">{bar}</td>' for bar in bars]
        number = "" if name == str(number) else f"<span class=soft>{number}</span> "
        name = f"<bdi>{text(name)}</bdi>"
        rows.append([number + name, *bars, shown(row["support"], ",")])
        recalls.append((row["recall"], name))
    if not rows:
        return ""
    missed = ", ".join(f"{name} ({recall:.1%} found)" for recall, name in sorted(recalls)[:3] if recall < 1)
    missed = f"<p>Most often missed: {missed}.</p>" if missed else ""
    head = ["class", "precision", "recall", "F1", "images"]
    return f"<section><h2>Each class</h2>{missed}{table(head, rows)}</section>"


def export_section(run, export):
    rows, failures = [], []
    for form, (path, figures) in export.items():
        odd = [probe["max_abs_diff"] for probe in figures.get("probes", {}).values()]
        odd = max(odd) if odd and None not in odd else None
        proof = "<span class=good>passed</span>" if figures.get("passed") else "<span class=bad>FAILED</span>"
        row = [form, os.path.basename(path), file_size(path), proof]
        row += [shown(value, ".1e") for value in (figures.get("max_abs_diff"), odd)]
        row += [shown(figures.get(key), ".2%") for key in ("top1_agreement", "accuracy")]
        row += [", ".join(f"{times}x" for times in figures.get("speedup", {}).values()) or "-"]
        rows.append([*row, shown(figures.get("latency_ms"), ".3g", " ms")])
        said = filter(None, [*figures.get("failures", ()), figures.get("warning")])
        failures += [f"<li>{form}: {text(line)}</li>" for line in said]
    if not rows:
        command = f"<code>python step2_export.py --run {text(run)}</code>"
        return f"<section><h2>Export</h2><p>Not exported yet: {command}</p></section>"
    head = "format,file,size,proof,largest difference,on probes,same answer,accuracy,times as fast (batch 1; 64),one image"
    return (
        "<section><h2>Export</h2><p>Each file was run against the trained network: over the whole test split, and on "
        f"probes, random, black and white inputs of several sizes.</p>{table(head.split(','), rows)}"
        f"<ul class=bad>{''.join(failures)}</ul></section>"
    )


def configuration_section(config):
    lines = []
    for key, value in config.items():
        if key in ("name", "run") or value in (None, False, []):
            continue
        value = (
            ("x" if key == "image_size" else " ").join(map(str, value)) if isinstance(value, list) else value
        )
        value = f"{value:.6g}" if isinstance(value, float) else value
        lines.append(f"<div><dt>{text(key).replace('_', ' ')}</dt><dd>{text(value)}</dd></div>")
    return f"<section><h2>Configuration</h2><dl>{''.join(lines)}</dl></section>"


def epochs_section(run_dir):
    try:
        with open(os.path.join(run_dir, "metrics.csv"), newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
            rows = [[shown(float(cell), ".5g") if cell else "-" for cell in row] for row in rows]
    except (OSError, ValueError, csv.Error):
        return ""
    inner = table([text(name).replace("_", " ") for name in head], rows)
    return f"<section><details><summary>The figures of every epoch</summary>{inner}</details></section>"


def runs_section(run, config, runs_dir, exports_dir):
    """All runs of the same data side by side, the best first."""
    found = []
    for name in sorted(os.listdir(runs_dir)) if os.path.isdir(runs_dir) else ():
        theirs, summary = read_run(os.path.join(runs_dir, name))
        if not theirs or data_of(theirs) != data_of(config):
            continue
        export = read_export(os.path.join(runs_dir, name), os.path.join(exports_dir, name))
        path, figures = next(iter(export.values()), ("", {}))
        accuracy, loss = summary.get("test_accuracy"), summary.get("test_loss")
        better = [
            -accuracy if isinstance(accuracy, float) else 0,
            loss if isinstance(loss, float) else float("inf"),
        ]
        cells = [f"<bdi>{text(name)}</bdi>" + ("" if summary else " <span class=soft>(not finished)</span>")]
        cells += [text(theirs.get("model", "-")), shown(accuracy, ".2%"), shown(loss, ".4g")]
        cells += [duration(summary.get("train_seconds"))]
        cells += [shown(summary.get(key), ",") for key in ("epochs", "parameters")]
        cells += [file_size(path), shown(figures.get("latency_ms"), ".3g", " ms")]
        cells += [text(str(summary.get("created", "-"))[:10])]
        found.append((not summary, better, name, cells))
    found.sort()
    mark = next((number for number, (*_, name, _) in enumerate(found) if name == run), None)
    head = "run,network,test accuracy,test loss,training,epochs,parameters,file size,one image,date".split(
        ","
    )
    return f"<section><h2>All runs of this data</h2>{table(head, [row for *_, row in found], mark)}</section>"


def data_of(config):
    """What makes two runs comparable: the dataset, and for one's own images where they lie."""
    own = config.get("dataset") in ("folder", "csv")
    return config.get("dataset"), os.path.abspath(str(config.get("data_dir"))) if own else None

"""Which pictures a run has: they are drawn into its directory, and shown in its report."""

import base64
import json
import os
import struct
from pathlib import Path

from inference.command_line import printable
from inference.files import replacing
from inference.metrics import confusion_matrix

TITLES, CAPTIONS = json.loads(Path(__file__).with_name("captions.json").read_text(encoding="utf-8")).values()


def draw_run(
    run_dir, spec, rows, labels, outputs, images=None, augmented=None, pairs=None, suspects=None
) -> list[str]:
    """Draw the pictures of a finished run into its directory and return their paths.

    spec: the run's; rows: those of metrics.csv, as dicts. Of the test split: labels, whole numbers [N];
    outputs, the probabilities [N, classes]; images, uint8 [H, W, C] by index, read only if they are drawn.
    augmented: uint8 [n, H, W, C] of the training split, and their labels [n]. pairs: by a name of TITLES what
    is shown side by side, (image, image, text, text). suspects: as training/suspects.py finds them, if any.
    For a regression, labels and outputs are [N, 1], and there are no images. Raises ImportError without
    matplotlib, or OSError.
    """
    from report import (  # importing matplotlib takes a second; it may be missing
        pictures,
        trust_pictures,
    )

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
        temperature = spec.get("temperature")
        drawn["reliability.png"] = trust_pictures.reliability(subtitle, labels, outputs, temperature)
        drawn["coverage.png"] = trust_pictures.coverage(subtitle, labels, outputs)
        if augmented is not None and len(augmented[0]):
            drawn["samples.png"] = pictures.samples(subtitle, *augmented, names)
    if suspects:
        drawn["suspects.png"] = pictures.mistakes(subtitle, **suspects, names=names, title=TITLES["suspects"])
    for name, shown in (pairs or {}).items():
        if shown:
            named = [(*pair[:2], *map(printable, pair[2:])) for pair in shown]
            drawn[f"{name}.png"] = pictures.pairs(TITLES[name], subtitle, named)
    drawn["curves.png"] = pictures.curves(subtitle, rows)
    for name, content in drawn.items():
        with replacing(os.path.join(run_dir, name)) as file:
            file.write(content)
    return [os.path.join(run_dir, name) for name in drawn]


def draw_familiar(run_dir: str, export: dict[str, dict]) -> None:
    """Draw familiar.png from the figures of the first exported file that has any; else remove an earlier one.

    export: figures of parity.json by format. Raises OSError.
    """
    path, run = os.path.join(run_dir, "familiar.png"), os.path.basename(os.path.normpath(run_dir))
    proven = [figures for figures in export.values() if figures.get("passed") and figures.get("familiar")]
    try:
        subtitle, kinds = f"{printable(run)} · {printable(proven[0].get('file', ''))}", proven[0]["familiar"]
        from report import trust_pictures  # only now, as importing matplotlib takes a second

        content = trust_pictures.familiar(subtitle, kinds)
    except (ImportError, AttributeError, LookupError, TypeError, ValueError):
        Path(path).unlink(missing_ok=True)  # nothing to draw, no matplotlib, or other figures than the gate's
        return
    with replacing(path) as file:
        file.write(content)


def picture_sections(run_dir):
    """The pictures in the run's directory: small ones side by side, then each wide one by itself."""
    small, wide = [], []
    for name, caption in CAPTIONS.items():
        try:
            content = Path(run_dir, name).read_bytes()
            width, height = struct.unpack(">II", content[16:24])  # PNG's header
        except (OSError, struct.error):
            continue
        size = f'width="{width}" height="{height}"' + (" class=wide" if width > 1200 else "")
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        image = f'<div class=scroll><img {size} alt="{caption}" src="{source}"></div>'
        figure = f"<section><figure>{image}<figcaption>{caption}</figcaption></figure></section>"
        (wide if width > 1200 else small).append(figure)
    return [f"<div class=pair>{''.join(small)}</div>", *wide]

"""How answers are written: a row for each input, as text, JSON or CSV."""

import json
from collections.abc import Iterator

import numpy as np

from inference.command_line import encodable, printable, say
from inference.errors import problems
from inference.predict import Model
from inference.tables import csv_line


def write_images(results: Iterator, output_format: str, top_k: int, out) -> int:
    """Write the rows of predict_files() to `out`; return the exit code, 1 if some are errors."""
    if output_format == "csv":
        columns = ["path", "error", "label", "probability", "known"]
        for rank in range(1, top_k + 1):
            columns += [f"label_{rank}", f"probability_{rank}"]
        out.write(csv_line(columns))

    code = 0
    for rows in results:
        for row in rows:
            # Errors go to standard error in every format; JSON and CSV have a row for them as well.
            if "error" in row:
                code = 1
                say(f"error: {row['path']}: {row['error']}")
            out.write(result_line(output_format, row, top_k))
        out.flush()  # so that a reader of a pipe gets each list at once
    return code


def result_line(output_format: str, row: dict, top_k: int) -> str:
    """One image's row; as text an error has no line, since standard error has it."""
    if output_format == "json":
        return json.dumps(encodable(row)) + "\n"
    if output_format == "csv":
        cells = [row.get(key) for key in ("path", "error", "label", "probability", "known")]
        for entry in row.get("top", []):
            cells += [entry["label"], entry["probability"]]
        if "error" in row:
            cells += [None, None] * top_k
        return csv_line(cells)
    return "" if "error" in row else text_line(row)


def text_line(row: dict) -> str:
    """path, "unknown" or "unsure" if it is, the best labels, and `known`."""
    cells = [row["path"]]
    # The label differs from the best guess where a threshold decided.
    if row["label"] != row["top"][0]["label"]:
        cells.append(row["label"])
    for entry in row["top"]:
        cells.append(f"{entry['label']} {entry['probability']:.2%}")
    if row["known"] is not None:
        cells.append(f"known {row['known']:.1%}")
    return "  ".join(map(printable, cells)) + "\n"


def write_values(model: Model, rows: list[str], output_format: str, out) -> int:
    """Predict from the rows of --values, "0.1,0.2", and write them to `out`; return 0.

    Raises Problem for a row that is not a list of as many numbers as the model has features.
    """
    count = model.spec["channels"]
    features = []
    for row in rows:
        fault = f"--values {row} is not a list of {count} finite numbers with commas between"
        with problems(fault, ValueError, 2, "{}"):
            values = np.array(row.split(","), np.float32).reshape(count)
            if not np.isfinite(values).all():
                raise ValueError(row)
        features.append(values)
    predictions = model.predict(np.stack(features))[:, 0].tolist()  # of [batch, 1]

    if output_format == "csv":
        out.write("values,prediction\n")
    for row, values, prediction in zip(rows, features, predictions, strict=True):
        if output_format == "json":
            line = json.dumps({"values": values.tolist(), "prediction": prediction})
        elif output_format == "csv":
            line = f'"{row}",{prediction}'
        else:
            line = f"{row}  {prediction:.6g}"
        out.write(line + "\n")
    return 0


def write_figures(figures: dict, output_format: str, out) -> None:
    """Write figures as one line of JSON, or as text: a line for each value or row of a list.

    Text leaves out what is not known. A tuple is a range of milliseconds.
    """
    if output_format == "json":
        out.write(json.dumps(encodable(figures)) + "\n")
        return

    # A list, such as the images that changed, gets a line for each of its rows.
    for name, value in figures.items():
        if value is None:
            continue
        if isinstance(value, tuple):
            low, high = value
            value = f"{low:g} to {high:g} ms"
        rows = value if isinstance(value, list) else [value]
        for row in rows:
            text = str(row)
            if isinstance(row, dict):
                known = {key: cell for key, cell in row.items() if cell is not None}
                text = "  ".join(f"{key} {cell}" for key, cell in known.items())
            out.write(f"{name:18}  {printable(text)}\n")

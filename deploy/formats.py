"""The formats that step2 writes: one table, which the parser, the export and the bundle read.

A new format is a function in deploy/exporters.py and a row here; a loader in inference/engines.py
runs its files. Nothing heavy is imported: step2 --help does not wait for torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from deploy import exporters


@dataclass(frozen=True)
class Format:
    """One kind of file.

    name: of --format, and in parity.json. file: its name in exports/<name>/. export: writes it.
    runs_with: the package that runs it. options: of step2 that have an effect on it.
    fixed: it takes images of the network's own size only. batch: its only batch size unless
    --fixed N says otherwise, None for any. fixed_version_of: the format that --fixed writes this
    one for; None for a format that can be named. quantized: it holds integers, and the gate allows
    a loss of accuracy instead of a difference. beside: other files that `export` writes. micro: it
    is proven in the runtime of microcontrollers.
    """

    name: str
    file: str
    export: Callable[[exporters.Source, str], dict | None]
    runs_with: str
    options: tuple[str, ...] = ()
    fixed: bool = False
    batch: int | None = None
    fixed_version_of: str | None = None
    quantized: bool = False
    beside: tuple[str, ...] = ()
    micro: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all its files in exports/<name>/."""
        return (self.file, *self.beside)


# The options of single formats, with their defaults.
DEFAULTS = {
    "opset": 18,
    "tolerance": 1e-4,
    "max_drop": None,
    "small_arena": False,
    "fixed": None,
    "input": "uint8",
}
MAX_DROP = 0.5  # points of accuracy that int8 may lose without --max-drop, besides chance

TABLE = (
    Format(
        name="torchscript",
        file="model.pt",
        export=exporters.export_torchscript,
        runs_with="torch",
        options=("tolerance", "fixed", "input"),
    ),
    Format(
        name="onnx",
        file="model.onnx",
        export=exporters.export_onnx,
        runs_with="onnxruntime",
        options=("opset", "tolerance", "fixed", "input"),
    ),
    Format(
        name="onnx-int8",
        file="model.int8.onnx",
        export=exporters.export_int8,
        runs_with="onnxruntime",
        options=("opset", "max_drop", "fixed", "input"),
        quantized=True,
    ),
    Format(
        name="pt2",
        file="model.pt2",
        export=exporters.export_pt2,
        runs_with="torch",
        options=("tolerance",),
    ),
    Format(
        name="executorch",
        file="model.pte",
        export=exporters.export_executorch,
        runs_with="executorch",
        options=("tolerance", "fixed", "input"),
        fixed=True,
        batch=1,
    ),
    Format(
        name="litert",
        file="model.tflite",
        export=exporters.export_litert,
        runs_with="ai-edge-litert",
        options=("tolerance", "fixed", "input"),
        fixed=True,
        batch=1,
    ),
    Format(
        name="tflite-micro",
        file="model.int8.tflite",
        export=exporters.export_micro,
        runs_with="ai-edge-litert",
        options=("max_drop", "small_arena"),
        fixed=True,
        batch=1,
        quantized=True,
        beside=("model_data.h", "model_data.cc"),
        micro=True,
    ),
    Format(
        name="torchscript-fixed",
        file="model.fixed.pt",
        export=exporters.export_torchscript,
        runs_with="torch",
        fixed=True,
        fixed_version_of="torchscript",
    ),
    Format(
        name="onnx-fixed",
        file="model.fixed.onnx",
        export=exporters.export_onnx,
        runs_with="onnxruntime",
        fixed=True,
        fixed_version_of="onnx",
    ),
    Format(
        name="onnx-int8-fixed",
        file="model.fixed.int8.onnx",
        export=exporters.export_int8,
        runs_with="onnxruntime",
        fixed=True,
        fixed_version_of="onnx-int8",
        quantized=True,
    ),
)
FORMATS = {row.name: row for row in TABLE}
NAMES = tuple(row.name for row in TABLE if row.fixed_version_of is None)  # of --format


def chosen_formats(names: list[str], with_fixed: bool) -> list[Format]:
    """The formats of these names, each once.

    with_fixed: followed by their versions of fixed size.
    """
    names = list(dict.fromkeys(names))
    chosen = [FORMATS[name] for name in names]
    if with_fixed:
        for name in names:
            chosen += [row for row in FORMATS.values() if row.fixed_version_of == name]
    return chosen


def formats_with(option: str) -> list[str]:
    """The names of the formats that an option has an effect on."""
    return [name for name in NAMES if option in FORMATS[name].options]

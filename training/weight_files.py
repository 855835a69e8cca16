"""Weights in files that any program wrote: a state_dict, wherever the file keeps it.

A file is read as plain weights, so no code in it is executed. What training programs keep beside
the weights is passed over, and the names of the weights are brought to those of the network.
"""

import re
from collections import Counter
from collections.abc import Iterable

import torch

from data.notes import note
from training.runs import load_plain

DEPTH = 8  # of dicts in dicts; no program nests its weights deeper
# Of the modules that torch wraps around a network or a part of it; the weights are the same.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Averaged weights: what timm and torchvision evaluate, and publish the accuracy of.
AVERAGED = re.compile(r"(^|[._])ema([._]|$)")


class PassedOver:
    """Takes the place of an object beside the weights. Nothing is kept or executed of it."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


class PlainDict:
    """Takes the place of a class of dicts: what is made is a dict."""

    def __new__(cls, *_):
        return {}


# What training programs keep beside the weights: arguments, figures, paths.
BESIDE_WEIGHTS = (
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
    "datetime.datetime",
    "datetime.timedelta",
    "builtins.dict",
    "builtins.list",
    "builtins.int",
)
KINDS_OF_DICTS = (
    "collections.defaultdict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)


def read_weights(path: str, names: Iterable[str]) -> tuple[dict, dict]:
    """The (state_dict, spec) in a file of weights; the spec is empty unless step1 wrote the file.

    names: of the network's own state_dict. The weights may be the content of the file or lie
    anywhere in its dicts, and their names may have any prefix. Raises ValueError.
    """
    content = read_file(path)
    tensors = tensors_in(content)
    if not tensors:
        raise ValueError("is not a state_dict: it holds no tensors under names")

    names = set(names)
    prefix = choose_prefix(path, tensors, names)
    state = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            state[unwrapped(name.removeprefix(prefix), names)] = tensor
    check_finite(state)

    spec = content.get("spec") if prefix == "state_dict." else None
    return state, spec if isinstance(spec, dict) else {}


def check_finite(state: dict[str, torch.Tensor]) -> None:
    """Raise ValueError for weights from which no training can start, naming the first."""
    wrong = []
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            wrong.append(name)
    if wrong:
        count = f"in {len(wrong)} of {len(state)} entries, as {wrong[0]!r}"
        raise ValueError(f"holds weights that are not finite numbers {count}: take another file")


def read_file(path: str) -> dict:
    """What a file of weights holds. Raises ValueError."""
    try:
        if path.lower().endswith(".safetensors"):
            return read_safetensors(path)
        stand_ins = [(PassedOver, name) for name in BESIDE_WEIGHTS]
        stand_ins += [(PlainDict, name) for name in KINDS_OF_DICTS]
        with torch.serialization.safe_globals(stand_ins):
            return load_plain(path)
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except IsADirectoryError:
        raise ValueError("is a directory: give a file, such as checkpoint.pt of a run") from None
    except (OSError, ValueError) as error:
        way_out = "torch.save(network.state_dict(), FILE) writes what can be loaded"
        raise ValueError(f"cannot be loaded as plain weights: {error}; {way_out}") from None


def read_safetensors(path: str) -> dict:
    """The tensors in a .safetensors file by name. Raises OSError, ValueError."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError("the package safetensors is missing: pip install safetensors") from None

    try:
        return load_file(path)
    except SafetensorError as error:  # a missing file is a FileNotFoundError
        raise ValueError(f"it is damaged ({error})") from None


def tensors_in(content) -> dict[str, torch.Tensor]:
    """All tensors in dicts within dicts, by their path of names, with dots."""
    tensors = {}
    seen = set()  # a dict may hold itself

    def walk(values, prefix: str, depth: int) -> None:
        if id(values) in seen or depth > DEPTH:
            return
        seen.add(id(values))
        for name, value in values.items():
            if isinstance(name, str) and isinstance(value, torch.Tensor):
                tensors[prefix + name] = value
            elif isinstance(name, str) and isinstance(value, dict):
                walk(value, f"{prefix}{name}.", depth + 1)

    if isinstance(content, dict):
        walk(content, "", 0)
    return tensors


def choose_prefix(path: str, tensors: Iterable[str], names: set[str]) -> str:
    """The prefix under which most of the names in a file are the network's.

    Of several such places, averaged weights come first, then the shortest prefix.
    """
    found = Counter()
    for name in tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            # A wrapper's name belongs to the prefix.
            if parts[start] not in WRAPPERS and unwrapped(".".join(parts[start:]), names) in names:
                found[".".join([*parts[:start], ""])] += 1
    if not found:
        return ""

    most = max(found.values())
    places = [prefix for prefix, count in found.items() if count == most]
    places.sort(key=lambda prefix: (not AVERAGED.search(prefix), len(prefix)))
    if len(places) > 1:
        chosen = repr(places[0]) if places[0] else "the one without a prefix"
        note(f"{path} holds {len(places)} sets of weights that suit this network: {chosen} is used")
    return places[0].removeprefix(".")


def unwrapped(name: str, names: set[str]) -> str:
    """A name without the wrappers in it, unless the network itself calls a part so."""
    if name in names:
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)

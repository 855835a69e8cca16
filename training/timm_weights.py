"""What timm knows of the weights of its networks: where they are, and what they were trained with.

timm is optional; model.import_timm says so where it is missing.
"""

import contextlib
import importlib.util
import os

import torch

import model
from inference.errors import Problem, one_line

CONNECT_SECONDS = 10  # to wait for the hub's first answer
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # what timm's repositories hold, best first


# --------------------------------------------------------------------------------- preprocessing
def usual_size(name: str) -> int:
    """The image side in pixels that the weights of a network were trained with.

    Of timm's data configuration, size, mean and std are followed, which the network depends on.
    Its crop_pct and interpolation are not: timm enlarges a picture with a bicubic filter and cuts
    an eighth away, which gains a little on ImageNet, where the object is in the middle. Here --fit
    decides what the network sees of a picture, and training, export and device all resize by the
    one bilinear filter that every engine computes alike. Raises ValueError.
    """
    return model.timm_config(name).input_size[1]


def usual_statistics(name: str) -> tuple[list[float], list[float]]:
    """The mean and std of colour images that the weights of a network expect: [3] each."""
    timm = model.import_timm()
    config = timm.data.resolve_data_config({}, pretrained_cfg=model.timm_config(name).to_dict())
    return list(config["mean"]), list(config["std"])


# -------------------------------------------------------------------------------------- downloads
def has_weights(name: str) -> bool:
    """Are weights published for the network of this name?"""
    config = model.timm_config(name)
    return bool(config.hf_hub_id or config.url)


def download(name: str) -> str:
    """The path of the default weights, downloaded unless the hub's or torch's cache has them.

    Raises ValueError if there are none, Problem if the download fails.
    """
    config = model.timm_config(name)
    if config.hf_hub_id:
        files = [config.hf_hub_filename] if config.hf_hub_filename else HUB_FILES
        return download_from_hub(name, config.hf_hub_id, files)
    if config.url:
        return download_from_url(name, config.url)
    raise ValueError(f"{name} has no published weights; --pretrained FILE takes a file of weights")


def cached(name: str) -> str | None:
    """The path of the default weights of a network of timm if the hub's cache has them, and timm is
    installed to use them.

    name: with the tag of its weights, which then is the repository of the hub.
    """
    if importlib.util.find_spec("timm") is None:
        return None
    import huggingface_hub as hub

    path = hub.try_to_load_from_cache(name, HUB_FILES[0])
    return path if isinstance(path, str) else None


def download_from_hub(name: str, repository: str, files: list[str]) -> str:
    """The path of the first of these files of a repository that there is. Raises Problem."""
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    # A file in the cache is taken as it is: without a network, the hub would try for a minute.
    for file in files:
        path = hub.try_to_load_from_cache(repository, file)
        if isinstance(path, str):
            return path

    for file in files:
        url = hub.hf_hub_url(repository, file)
        try:
            # Asked once, since the download tries again and again.
            hub.get_hf_file_metadata(url, timeout=CONNECT_SECONDS)
            return hub.hf_hub_download(repository, file)
        except EntryNotFoundError:
            continue
        except Exception as error:  # of the hub, of HTTP and of the system
            raise cannot_download(name, url, error) from None
    raise Problem(f"{repository} holds none of {', '.join(files)}: give --pretrained FILE")


def download_from_url(name: str, url: str) -> str:
    """The path of a file in torch's cache. Raises Problem."""
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if os.path.exists(path):
        return path
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(url, path)
    except (OSError, RuntimeError) as error:
        raise cannot_download(name, url, error) from None
    return path


def cannot_download(name: str, url: str, error: Exception) -> Problem:
    """The error of a download, with the way out."""
    return Problem(
        f"cannot download the weights of {name} ({one_line(error)}): fetch {url} on a machine with "
        "a network and give it as --pretrained FILE, or train from scratch without --pretrained"
    )


# ------------------------------------------------------------------------------------- conversion
def converted(
    name: str, state: dict, channels: int, image_size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """A state_dict as timm loads it into its network of this name, for these channels and size.

    timm knows the names that the authors of a network gave its weights, and resizes what belongs
    to places of the image, such as position embeddings. Returns the state_dict as it is if timm
    cannot load it.
    """
    config = model.timm_config(name)
    classes = classes_of(state, config)

    def built(**pretrained):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = model.build_timm(name, channels, classes, *image_size, **pretrained)
        return network.state_dict()

    random = built()
    source = {
        "state_dict": dict(state),
        "num_classes": classes,
        "input_size": (channels_of(state, random, channels, config), *config.input_size[1:]),
    }
    with contextlib.suppress(ValueError):
        loaded = built(pretrained=True, pretrained_cfg_overlay=source)
        if not has_random(loaded, random):
            return loaded
    return state


def has_random(loaded: dict, random: dict) -> bool:
    """Has loading left a weight at its random start? Of some networks, timm does not say so."""
    for key, tensor in loaded.items():
        is_random = tensor.ndim > 1 and tensor.is_floating_point() and tensor.std() > 0
        if is_random and torch.equal(tensor, random[key]):
            return True
    return False


def classes_of(state: dict, config) -> int:
    """The number of classes of a state_dict, by its classifier."""
    for weight in weights_of(state, config.classifier):
        return weight.shape[0]
    return config.num_classes


def channels_of(state: dict, own: dict, channels: int, config) -> int:
    """The number of channels that a state_dict takes, by its first convolution.

    own: the state_dict of a network of `channels`.
    """
    given = weights_of(state, config.first_conv)
    wanted = weights_of(own, config.first_conv)
    if given and wanted and given[0].ndim == wanted[0].ndim == 4:
        return given[0].shape[1] * channels // wanted[0].shape[1]
    return config.input_size[0]


def weights_of(state: dict, layers) -> list[torch.Tensor]:
    """The weights of these layers in a state_dict. layers: a name, several, or None."""
    if isinstance(layers, str):
        layers = (layers,)
    return [state[f"{layer}.weight"] for layer in layers or () if f"{layer}.weight" in state]

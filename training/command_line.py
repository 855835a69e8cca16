"""The types of step1's options. Nothing here loads torch."""

import argparse
import re

from data import NO_GROUPS

LARGEST_SIDE = 4096  # pixels


def image_size(text: str) -> tuple[int, int]:
    """An argparse type: '32' or '48x64' as (height, width)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match:
        height = int(match[1])
        width = int(match[2] or height)
        if min(height, width) >= 1 and max(height, width) <= LARGEST_SIDE:
            return height, width

    wanted = f"a size such as 32 or 48x64 (height x width, 1 to {LARGEST_SIDE})"
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")


def checkpoint_interval(text: str) -> int | str:
    """An argparse type: '500' as a number of steps; '10m', minutes, stays text."""
    steps = re.fullmatch(r"[1-9]\d{0,8}", text)
    if steps:
        return int(text)

    minutes = re.fullmatch(r"(\d{1,6}(?:\.\d+)?)m", text)
    if minutes and float(minutes[1]) > 0:
        return text

    message = f"{text!r} is neither a number of steps such as 500 nor of minutes such as 10m"
    raise argparse.ArgumentTypeError(message)


def group_by(text: str) -> str:
    """An argparse type: a regular expression whose first bracket names a group, or 'none'."""
    if text == NO_GROUPS:
        return text
    try:
        pattern = re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        message = f"{text!r} is not a regular expression ({error})"
        raise argparse.ArgumentTypeError(message) from None

    if pattern.groups == 0:
        message = f"{text!r} has no bracket: the first one names the group, as in '(scene[0-9]+)_'"
        raise argparse.ArgumentTypeError(message)
    return text

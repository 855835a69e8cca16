"""Promises of an exported file in words: on the terminal, in the card and in report.html."""

from inference.command_line import printable
from inference.promise import ACCURACY
from report.text import MISSING, formatted

HEAD = ["promise", "threshold", "on the test split", "answered", "false alarms"]


def promise_line(promise: dict) -> str:
    """What is promised, by which threshold, at what cost, and how it held."""
    test = promise["test"]
    if promise["kind"] == ACCURACY:
        threshold = promise["threshold"]
        rule = f"unsure below {threshold:g}" if threshold > 0 else "it makes no answer unsure"
        cost = f"answers {formatted(test['answered'], '.1%')}"
    else:
        rule = f"called so from {promise['threshold']:g} on"
        cost = f"false alarms {formatted(test['false_alarms'], '.2%')}"
    return f"promise {subject(promise)}: {rule}; on the test split {held(promise)}, {cost}"


def subject(promise: dict) -> str:
    """What is promised: accuracy >= 95%."""
    name = promise["kind"]
    if promise["name"] is not None:
        name += f":{printable(promise['name'])}"
    return f"{name} >= {100 * promise['share']:.5g}%"


def held(promise: dict) -> str:
    """How much of it was kept on the test split."""
    test = promise["test"]
    return f"{formatted(test['share'], '.2%')} ({test['kept']:,} of {test['images']:,})"


def promise_cells(promise: dict) -> list[str]:
    """A row below HEAD."""
    test = promise["test"]
    return [
        subject(promise),
        f"{promise['threshold']:g}",
        held(promise),
        formatted(test["answered"], ".1%") if "answered" in test else MISSING,
        formatted(test["false_alarms"], ".2%") if "false_alarms" in test else MISSING,
    ]

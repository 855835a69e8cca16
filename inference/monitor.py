"""Watch a file's answers in the field: counts, accuracy without labels, and an alarm when the
images are no longer like those that the network was tested with.

In a program of one's own:

    from inference.monitor import Monitor

    with Monitor(model, "monitor.json") as monitor:
        row = predict("image.png", model)
        if alarm := monitor.update(row):
            print(alarm)

The file goes on where it ended, and is written once in SAVE_SECONDS and at the end: that does not
wear out a memory card, and a power cut loses a minute. `monitor` in the spec is what the images are
compared with. The accuracy is estimated by average thresholded confidence (Garg et al. 2022): the
share of answers whose probability is above a threshold, which on the reference is the accuracy.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from datetime import datetime, timezone

from inference.command_line import encodable, say
from inference.drift import LIMIT, Drift
from inference.errors import one_line, terminable
from inference.monitor_file import ANSWER, MOST_PROBABLE, SCHEMA, MonitorFile, damaged
from inference.spacing import Spacing
from inference.spec import promised_recalls

SAVE_SECONDS = 60
Z_95 = 1.96  # standard deviations of a 95 % interval


class Monitor:
    """Running statistics of a model's answers.

    path: a JSON file that is continued; without it, nothing is kept. bet_every: bet on one image in
    so many, if neighbouring ones depend on one another; by default, that is derived from the
    images. failed: whether the file could not be written, which is said once. Raises Problem if the
    file cannot be used, or belongs to another model.
    """

    def __init__(self, model, path: str | None = None, bet_every: int | None = None):
        self.classes = model.spec["classes"]
        self.numbers = {name: number for number, name in enumerate(self.classes)}
        self.fingerprint = fingerprint(model.spec)
        self.reference = model.spec["monitor"]
        self.drift = Drift(self.reference) if self.reference else None
        self.estimate_of = MOST_PROBABLE if promised_recalls(model.spec) else ANSWER
        self.spacing = Spacing(bet_every)

        self.started = now()
        self.images = 0
        self.errors = 0
        self.unknown = 0
        self.unsure = 0
        self.answers = [0] * len(self.classes)
        self.above = 0  # images whose probability is above the threshold of the estimate
        self.alarm: dict | None = None

        self.failed = False
        self.file = None
        if path is not None:
            self.file = MonitorFile(path)
            state = self.file.read(self.fingerprint)
            if state is not None:
                self.restore(state)
            else:
                self.save()  # whoever looks at it finds zeros, not an empty file
        self.saved = time.monotonic()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --------------------------------------------------------------------------------- one answer
    def update(self, row: dict) -> str | None:
        """Count what predict() returned for an image, or {"error": why}.

        Returns the alarm in words if this image has raised it, which happens once.
        """
        alarm = None
        if "error" in row:
            self.errors += 1
        else:
            self.count(row)
            if self.drift and not self.alarm:
                alarm = self.bet(row)

        if self.file and (alarm or time.monotonic() - self.saved > SAVE_SECONDS):
            self.save()
        return alarm

    def count(self, row: dict) -> None:
        self.images += 1
        label = row["label"]
        best = row["top"][0]
        if label == "unknown" != best["label"]:
            self.unknown += 1
        elif label == "unsure" != best["label"]:
            self.unsure += 1
        else:
            self.answers[self.numbers[label]] += 1
        if self.reference:
            # row["probability"] is another class's where the file promises a recall.
            self.above += best["probability"] > self.reference["threshold"]

    def bet(self, row: dict) -> str | None:
        """Bet on an image, if it is its turn; returns the alarm if this raises it."""
        best = row["top"][0]
        place = self.drift.place(row["known"], best["probability"])
        if not self.spacing.choose(place):
            return None
        if self.drift.bet(place, self.numbers[best["label"]]) < LIMIT:
            return None

        reason = self.drift.reason(self.classes)
        reference = f"the {self.reference['images']:,} images of {self.reference['source']}"
        message = (
            f"after {self.images:,} images: compared with {reference}, {reason}; "
            "the accuracy is no longer estimated"
        )
        self.alarm = {"message": message, "images": self.images, "time": now()}
        return message

    # ---------------------------------------------------------------------------------- many rows
    def watch(self, results: Iterator[list[dict]]) -> Iterator[list[dict]]:
        """Count lists of rows, and yield them on; the row that raises the alarm gets it as `alarm`.

        The file is written at the end, also after SIGTERM, Ctrl-C or a closed pipe.
        """
        with self, terminable():
            for rows in results:
                for row in rows:
                    alarm = self.update(row)
                    if alarm:
                        row["alarm"] = alarm
                        say(f"alarm: {alarm}")
                yield rows

    # ------------------------------------------------------------------------------------ figures
    def figures(self) -> dict:
        """What is known so far, as the file holds it: see deploy/README.md."""
        answers = dict(zip(self.classes, self.answers, strict=True))
        return {
            "schema": SCHEMA,
            "model": self.fingerprint,
            "started": self.started,
            "updated": now(),
            "images": self.images,
            "errors": self.errors,
            "answers": answers,
            "unknown": self.unknown,
            "unsure": self.unsure,
            "estimated_accuracy": self.estimate(),
            "estimate_of": self.estimate_of,
            "evidence": self.drift.evidence() if self.drift else None,
            "bet_every": self.spacing.every,
            "alarm": self.alarm,
        }

    def estimate(self) -> dict | None:
        """The accuracy, estimated without labels, with a 95 % interval; None if it is withheld.

        The interval allows for the number of images that are far enough apart, and for the size of
        the reference; not for what the method may be off where images have changed a little.
        """
        if not self.reference or self.alarm or not self.images:
            return None

        share = self.above / self.images
        count = max(self.images / self.spacing.every, 1)
        # With two images of each kind more, as the share of few images may be 0 or 1 by chance.
        smooth = (share * count + 2) / (count + 4)
        accuracy = self.reference["accuracy"]
        variance = smooth * (1 - smooth) / (count + 4)
        variance += accuracy * (1 - accuracy) / self.reference["images"]

        margin = Z_95 * math.sqrt(variance)
        low = max(smooth - margin, 0.0)
        high = min(smooth + margin, 1.0)
        return {"value": share, "low": min(low, share), "high": max(high, share)}

    # ---------------------------------------------------------------------------------- the state
    def state(self) -> dict:
        """All that a later process needs to go on: the figures, and `state`."""
        spacing = self.spacing
        state = {
            "above": self.above,
            "frames": spacing.frames,
            "since": spacing.since,
            "step": spacing.step,
            "values": spacing.values,
            "bets": self.drift.images if self.drift else 0,
            "stakes": self.drift.stakes.tolist() if self.drift else [],
        }
        return encodable(self.figures() | {"state": state})

    def restore(self, kept: dict) -> None:
        """Go on from what state() gave. Raises Problem if it is not of as many classes and bets."""
        bets = len(self.drift.stakes) if self.drift else 0
        if len(kept["answers"]) != len(self.classes) or len(kept["state"]["stakes"]) != bets:
            self.file.close()
            raise damaged(self.file.path)

        for name in ("started", "images", "errors", "unknown", "unsure", "alarm"):
            setattr(self, name, kept[name])
        self.answers = list(kept["answers"].values())

        state = kept["state"]
        self.above = state["above"]
        spacing = self.spacing
        if not spacing.given:
            spacing.every = kept["bet_every"]
        spacing.frames = state["frames"]
        spacing.since = state["since"]
        spacing.step = state["step"]
        spacing.values = state["values"]
        if self.drift:
            self.drift.restore(state["stakes"], state["bets"])

    def save(self) -> None:
        """Write the file; if that fails, say so once, and try again later."""
        self.saved = time.monotonic()
        try:
            self.file.write(self.state())
        except OSError as error:
            if not self.failed:
                say(f"error: cannot write {self.file.path}: {one_line(error)}")
            self.failed = True

    def close(self) -> None:
        """Write the file, and let other processes have it."""
        if self.file:
            self.save()
            self.file.close()
            self.file = None


def note_without_reference(model) -> None:
    """Say that a model file without a reference can only be counted for."""
    if model.spec["monitor"]:
        return
    way_out = "the ONNX file of the run has it"
    if not model.spec["micro"]:
        way_out = "step2 adds it when it exports again"
    lacks = "the model file lacks what --monitor compares images with"
    say(f"note: {lacks}: it counts, without alarm and estimate; {way_out}")


def fingerprint(spec: dict) -> str:
    """What tells the files of different exports apart: the SHA-256 of the spec."""
    text = json.dumps(encodable(spec), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

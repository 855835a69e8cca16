"""How far apart frames of a camera must be until one says little about the next: bets need that."""

import numpy as np

FIRST_LOOK = 20  # frames: before, nothing is known of how they depend on one another
KEPT = 256  # values, evenly spread over all frames
LEAST_CORRELATION = 0.2  # that counts, and
DEVIATIONS = 3  # standard deviations of what chance makes of so few values


class Spacing:
    """Chooses one frame in `every`, from the frames before it alone, as bets must not foresee.

    After 20, 40, 80, ... frames, `every` becomes twice the lag at which the values seen so far are
    no longer correlated, if that is more. Until the first 20, no frame is chosen. With a number of
    frames that is given, all of this is left out.
    """

    def __init__(self, given: int | None):
        self.given = given
        self.every = given or 1
        self.frames = 0
        self.since = 0  # frames since the last that was chosen
        self.step = 1  # frames from one of `values` to the next
        self.values: list[tuple[int, ...]] = []  # [kept, signals]

    def choose(self, values: tuple[int, ...]) -> bool:
        """Is this frame, of which these are the signals, one to bet on?"""
        self.frames += 1
        self.since += 1
        is_chosen = self.since >= self.every
        if not self.given:
            is_chosen = is_chosen and self.frames > FIRST_LOOK
            self.look(values)

        if is_chosen:
            self.since = 0
        return is_chosen

    def look(self, values: tuple[int, ...]) -> None:
        """Keep the signals of a frame, and adapt to them from time to time."""
        if self.frames % self.step == 0:
            self.values.append(values)
        if self.frames % FIRST_LOOK == 0:
            looks = self.frames // FIRST_LOOK
            if looks & (looks - 1) == 0:  # 1, 2, 4, ...
                self.adapt()
        if len(self.values) >= KEPT:
            self.values = self.values[1::2]
            self.step *= 2

    def adapt(self) -> None:
        """Choose frames further apart if the values ask for it."""
        apart = frames_apart(self.values)
        # Values that are a step apart say nothing of frames that are closer.
        if apart > 1:
            self.every = max(self.every, apart * self.step)


def frames_apart(values: list[tuple[int, ...]]) -> int:
    """How many of these values [n, signals] apart they must be: 1, or twice the lag at which none
    of the signals is correlated with itself any more. A quarter of n is the largest lag that shows.
    """
    series = np.array(values, float)  # [n, signals]
    count = len(series)
    least = max(LEAST_CORRELATION, DEVIATIONS / count**0.5)
    centred = series - series.mean(0)
    variance = (centred**2).mean(0)

    largest = max(count // 4, 1)
    for lag in range(1, largest + 1):
        products = (centred[lag:] * centred[:-lag]).mean(0)
        # What never changes depends on itself entirely.
        is_free = (variance > 0) & (products < least * variance)
        if is_free.all():
            break
    return 1 if lag == 1 else 2 * lag

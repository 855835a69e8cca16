"""Classes of unequal size: when they are, and how training makes up for it."""

import torch

from data.split import Split

# The part of the logarithms of classes' shares that --class-weights takes. 1: best recall, lowest
# accuracy.
ADJUSTMENT = 0.85
# If one class has more than so many times the images of another, plain accuracy says little of
# small classes.
UNEQUAL = 3


def is_unequal(train: Split, classes: int) -> bool:
    """Do the classes differ so much in size that their mean recall counts, not accuracy?"""
    shares = train.class_shares(classes)
    return bool(shares.max() > UNEQUAL * shares.min())


def log_priors(train: Split, classes: int, device: torch.device) -> torch.Tensor:
    """What --class-weights adds to the logits while training: float32 [classes]."""
    shares = train.class_shares(classes)
    return (ADJUSTMENT * shares.log()).to(device)

"""The loss, and how good a network is on a whole split."""

import torch
import torch.nn.functional as F

from data.split import Split
from inference import metrics
from training import balance
from training.features import Trainee, is_regression
from training.processes import Machine
from training.progress import Evaluation


def criterion(outputs, targets, label_smoothing=0.0, log_priors=None):
    """The cross entropy [batch] of logits [batch, classes] and int64 labels [batch].

    log_priors [classes]: see training/balance.py; added to the logits, so that the network itself
    learns to ignore how frequent classes are (logit adjustment, Menon et al. 2021). Smoothing then
    follows them, too: if spread evenly, it would favour rare classes. Targets of floats [batch, n]:
    the squared error, averaged over n.
    """
    if targets.is_floating_point():
        return F.mse_loss(outputs.float(), targets, reduction="none").mean(1)
    if log_priors is None:
        return F.cross_entropy(
            outputs.float(), targets, label_smoothing=label_smoothing, reduction="none"
        )

    labels = F.one_hot(targets, len(log_priors))  # [batch, classes]
    wanted = (1 - label_smoothing) * labels + label_smoothing * log_priors.softmax(0)
    return F.cross_entropy(outputs.float() + log_priors, wanted, reduction="none")


@torch.inference_mode()
def evaluate(trainee: Trainee, split: Split, machine: Machine) -> Evaluation:
    """The network in eval mode over a whole split, shared by all processes."""
    trainee.deployable.network.eval()
    network = trainee.network
    labels = split.labels[split.members]  # [n]
    share = machine.processes.share

    loss = 0.0
    parts = []
    for images, targets in split.in_order(share):
        logits = network(trainee.normalise(images)).float()  # [batch, classes]
        loss += criterion(logits, targets).sum().item()
        parts.append(logits)

    # Zero for the images of other processes, so that the sum is the whole.
    outputs = torch.zeros(len(labels), trainee.classes, device=labels.device)
    if parts:
        outputs[share] = torch.cat(parts)
    outputs = machine.processes.sum(outputs)
    loss = machine.processes.sum(torch.tensor(loss, device=machine.device)).item() / len(split)

    accuracy = None
    if not is_regression(split):
        accuracy = (outputs.argmax(1) == labels).sum().item() / len(split)
    return Evaluation(loss=loss, accuracy=accuracy, outputs=outputs.cpu().numpy())


def accuracy_to_compare(trainee: Trainee, evaluated: Evaluation) -> float | None:
    """What epochs are compared by on the validation split: balanced accuracy if classes are
    unequal.

    None for a regression.
    """
    if evaluated.accuracy is None:
        return None
    if not balance.is_unequal(trainee.splits["train"], trainee.classes):
        return evaluated.accuracy

    split = trainee.splits["val"]
    labels = split.labels.cpu()[split.members].numpy()
    return metrics.balanced_accuracy(labels, evaluated.outputs.argmax(1))

"""What a small device must hold and compute for one input, from the graph of the network."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

# Operators that can overwrite their input, beside views and what works element by element.
IN_PLACE = ("batch_norm", "dropout", "getitem")


def needs(network: torch.nn.Module, *shape: int) -> dict[str, int]:
    """Numbers of `weights`, of `activations` held at a time, and of `multiply_adds`, for one input.

    network: in eval mode. shape: of the input without the batch. Times 4 for bytes in float32,
    times 1 in int8.
    """
    example = torch.zeros(1, *shape)
    weights = sum(tensor.numel() for tensor in network.state_dict().values())
    return {
        "weights": weights,
        "activations": count_activations(network, example),
        "multiply_adds": count_multiply_adds(network, example),
    }


def count_multiply_adds(network: torch.nn.Module, example: torch.Tensor) -> int:
    """The multiply-adds of all convolutions and matrix products, attention's included.

    Versions of torch differ in the kernel that they choose for attention, and torch's counter does
    not know all of these kernels: what it does not know counts as nothing. So attention is computed
    by its formula, as two matrix products. Gradients stay on because without them a whole layer of
    a transformer becomes one kernel, which the counter does not know, either.
    """
    attention_by_formula = sdpa_kernel(SDPBackend.MATH)
    with torch.enable_grad(), attention_by_formula, FlopCounterMode(display=False) as counter:
        network(example)
    return counter.get_total_flops() // 2


def count_activations(network: torch.nn.Module, example: torch.Tensor) -> int:
    """The most numbers that are held at a time while the network runs, the input included.

    An activation is held until its last use. A step that works element by element overwrites its
    input if nothing else needs that, as engines do.
    """
    program = torch.export.export(network, (example,))
    inputs = program.graph_signature.user_inputs
    last_user = {}
    for node in program.graph.nodes:
        for used in node.all_input_nodes:
            last_user[used] = node

    held = {}  # node -> numbers of its result
    most = 0
    for node in program.graph.nodes:
        is_weight = node.op == "placeholder" and node.name not in inputs
        if is_weight or "val" not in node.meta:  # the node of the output has no value
            continue

        first_held = next((used for used in node.all_input_nodes if used in held), None)
        is_last_use = first_held is not None and last_user[first_held] is node
        if is_last_use and is_in_place(node.target):
            held[node] = held.pop(first_held)
        else:
            held[node] = count_numbers(node.meta["val"])
        most = max(most, sum(held.values()))

        # What no later node uses is released.
        finished = (node, None)
        held = {kept: size for kept, size in held.items() if last_user.get(kept) not in finished}
    return most


def count_numbers(value) -> int:
    """The numbers in all tensors of a value, which may be a tuple."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() for tensor in tensors)


def is_in_place(target) -> bool:
    """Can an operator of torch.export write its result over its first input?"""
    is_operator = isinstance(target, torch._ops.OpOverload)
    if is_operator and (target.is_view or torch.Tag.pointwise in target.tags):
        return True
    name = getattr(target, "__name__", str(target)).split(".")[0]
    return name in IN_PLACE

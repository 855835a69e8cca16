"""What a small device must hold and compute for one image, from the graph of the network."""

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

IN_PLACE = ("batch_norm", "dropout", "getitem")  # beside views and what works element by element


def needs(network: torch.nn.Module, *shape: int) -> dict[str, int]:
    """Numbers of `weights`, of `activations` held at a time, and of `multiply_adds`, for one input.

    network: in eval mode. shape: of the input without the batch. An activation is held until its last use; a
    step that works element by element overwrites it, as engines do. Times 4 for bytes, in int8 times 1.
    """
    example = torch.zeros(1, *shape)
    with FlopCounterMode(display=False) as counter:  # with gradients: attention is one operator without them
        network(example)
    program = torch.export.export(network, (example,))
    nodes, inputs = program.graph.nodes, program.graph_signature.user_inputs
    last_user = {used: node for node in nodes for used in node.all_input_nodes}
    held, most = {}, 0
    for node in nodes:
        if "val" not in node.meta or (node.op == "placeholder" and node.name not in inputs):
            continue  # the output, or weights
        given = next((used for used in node.all_input_nodes if used in held), None)
        if given is not None and last_user[given] is node and is_in_place(node.target):
            held[node] = held.pop(given)
        else:
            tensors = tree_leaves(node.meta["val"])
            held[node] = sum(tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor))
        most = max(most, sum(held.values()))
        held = {other: size for other, size in held.items() if last_user.get(other) not in (node, None)}
    weights = sum(tensor.numel() for tensor in network.state_dict().values())
    return {"weights": weights, "activations": most, "multiply_adds": counter.get_total_flops() // 2}


def is_in_place(target) -> bool:
    """Can an operator of torch.export write its result over its first input?"""
    if isinstance(target, torch._ops.OpOverload) and (target.is_view or torch.Tag.pointwise in target.tags):
        return True
    return getattr(target, "__name__", str(target)).split(".")[0] in IN_PLACE

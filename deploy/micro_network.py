"""A trained network in the form that the runtime of microcontrollers computes best in int8.

The changes are exact, but for GELU, which the runtime does not have: scaling, normalising and the
batch norm after a convolution become part of its weights, and a maximum over whole maps becomes
pooling. They are made in the graph of torch.fx, on a copy of the network.
"""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

# GELU is x * sigmoid(1.702 x) within 0.021 (Hendrycks and Gimpel 2016). So much more of hard-swish:
# hardswish(1.9 x) / 1.9 is within 0.073, and one operator instead of two.
SIGMOID_SLOPE = 1.702
HARDSWISH_SLOPE = 1.9
MAX_POOLS = (nn.MaxPool2d, F.max_pool2d, torch.max_pool2d)
WEIGHTED = (nn.Conv2d, nn.Linear)


class MicroClassifier(nn.Module):
    """Pixels 0..255 as float32 [1, height, width, channels] to float32 probabilities [1, classes].

    small_arena: GELU as one operator, which takes less working memory and is less exact.
    """

    def __init__(self, deployable, small_arena: bool = False):
        super().__init__()
        self.temperature = deployable.temperature
        channels = deployable.mean.numel()
        example = torch.zeros(1, channels, *deployable.image_size)

        # What cannot be traced is converted as it is.
        network = copy.deepcopy(deployable.network).eval()
        graph = traced(network, example)
        self.scale = None
        self.shift = None
        if graph is not None:
            fold_batch_norm(graph)
            pool_whole_maps(graph)
            replace_gelu(graph, small_arena)
            fold_numbers(graph)
            if fold_temperature(graph, self.temperature):
                self.temperature = 1.0
            network = graph
        if not (graph is not None and fold_pixels(graph, deployable.mean, deployable.std)):
            # [1, channels, 1, 1]
            self.scale = 1 / (255 * deployable.std)
            self.shift = -deployable.mean / deployable.std
        self.network = network

    def forward(self, pixels):
        images = pixels.permute(0, 3, 1, 2)  # [1, channels, H, W]
        if self.scale is not None:
            images = images * self.scale + self.shift
        logits = self.network(images)
        if self.temperature != 1:
            logits = logits * (1 / self.temperature)
        return logits.softmax(1)


def traced(network: nn.Module, example: torch.Tensor) -> fx.GraphModule | None:
    """The graph of a network with the shapes of all its values; None if it cannot be traced."""
    try:
        graph = fx.symbolic_trace(network)
        with torch.no_grad():
            ShapeProp(graph).propagate(example)
    except Exception:  # control flow that depends on values: each network fails in its own way
        return None
    return graph


# ----------------------------------------------------------------------------------- what a node is
def module_of(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return graph.get_submodule(node.target) if node.op == "call_module" else None


def is_call_of(graph: fx.GraphModule, node: fx.Node, *kinds) -> bool:
    """Does a node call a module of one of these classes, or one of these functions or methods?"""
    if node.op == "call_module":
        classes = tuple(kind for kind in kinds if isinstance(kind, type))
        return isinstance(module_of(graph, node), classes)
    return node.target in kinds


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def source_of(node: fx.Node) -> fx.Node | None:
    """The node whose value a node takes first, if that has no other user."""
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and only_user(source) is node:
        return source
    return None


def is_shared(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Does the network call this node's module more than once?"""
    return sum(other.target == node.target for other in graph.graph.nodes) > 1


def remove(graph: fx.GraphModule, node: fx.Node) -> None:
    """Take out a node: its users get its first argument."""
    node.replace_all_uses_with(node.args[0])
    graph.graph.erase_node(node)
    graph.recompile()


# --------------------------------------------------------------------------------------- batch norm
def fold_batch_norm(graph: fx.GraphModule) -> None:
    """Make each batch norm part of the layer before it, also across a maximum pooling.

    The maximum of values that are all multiplied by the same positive number is the maximum
    multiplied by it: batch norm may move to before the pooling unless one of its scales is
    negative.
    """
    for node in list(graph.graph.nodes):
        if not is_call_of(graph, node, nn.BatchNorm2d, nn.BatchNorm1d):
            continue

        norm = module_of(graph, node)
        source = source_of(node)
        may_cross = norm.weight is None or bool((norm.weight > 0).all())
        while source is not None and may_cross and is_call_of(graph, source, *MAX_POOLS):
            source = source_of(source)
        if source is None or not is_call_of(graph, source, *WEIGHTED) or is_shared(graph, source):
            continue

        layer = module_of(graph, source)
        fuse = fuse_conv_bn_weights if isinstance(layer, nn.Conv2d) else fuse_linear_bn_weights
        layer.weight, layer.bias = fuse(
            layer.weight,
            layer.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        remove(graph, node)


# ------------------------------------------------------------------------------------------- pixels
def fold_pixels(graph: fx.GraphModule, mean: torch.Tensor, std: torch.Tensor) -> bool:
    """Make scaling and normalising part of the first layer; False if that cannot be exact.

    A convolution that pads would have to pad with the mean. mean, std: [1, channels, 1, 1].
    """
    image = next(node for node in graph.graph.nodes if node.op == "placeholder")
    first = only_user(image)
    while first is not None and is_call_of(graph, first, nn.Flatten, "contiguous"):
        first = only_user(first)
    if first is None or not is_call_of(graph, first, *WEIGHTED) or is_shared(graph, first):
        return False

    layer = module_of(graph, first)
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            pixels = image.meta["tensor_meta"].shape[2:]
            scale = (1 / (255 * std)).expand(1, -1, *pixels).flatten()  # [inputs]
            shift = (-mean / std).expand(1, -1, *pixels).flatten()
            if layer.in_features != len(scale):
                return False
            of_shift = layer.weight @ shift
            layer.weight.mul_(scale)
        else:
            pads = layer.padding if isinstance(layer.padding, str) else any(layer.padding)
            if (pads and pads != "valid") or layer.groups != 1:
                return False
            of_shift = (layer.weight * (-mean / std)).sum((1, 2, 3))
            layer.weight.mul_(1 / (255 * std))
        bias = of_shift if layer.bias is None else layer.bias + of_shift
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return True


# ------------------------------------------------------------------------------------------ pooling
def pool_whole_maps(graph: fx.GraphModule) -> None:
    """Let a maximum over whole maps [batch, channels, h, w] be a pooling, which int8 has."""
    for node in list(graph.graph.nodes):
        if is_call_of(graph, node, nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d):
            keeps = True
            size = getattr(module_of(graph, node), "output_size", None) or node.args[1:]
            is_whole = size in (1, (1, 1), (1,), ((1, 1),))
        elif is_call_of(graph, node, "amax", torch.amax):
            given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else ())
            keeps = node.kwargs.get("keepdim", len(node.args) > 2 and node.args[2])
            is_whole = given in ((2, 3), (-2, -1), [2, 3], [-2, -1])
        else:
            continue

        shape = node.args[0].meta["tensor_meta"].shape
        if not is_whole or len(shape) != 4:
            continue
        with graph.graph.inserting_before(node):
            pooled = graph.graph.call_function(F.max_pool2d, (node.args[0], tuple(shape[2:])))
            if not keeps:
                pooled = graph.graph.call_function(torch.flatten, (pooled, 1))
        node.replace_all_uses_with(pooled)
        graph.graph.erase_node(node)
    graph.recompile()


# -------------------------------------------------------------------------------------- activations
class SigmoidGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(SIGMOID_SLOPE * x)


def replace_gelu(graph: fx.GraphModule, small_arena: bool) -> None:
    """Replace GELU, which the runtime lacks, by what it has; small_arena: by hard-swish."""
    for node in list(graph.graph.nodes):
        if not is_call_of(graph, node, nn.GELU, F.gelu):
            continue

        value = node.args[0]
        with graph.graph.inserting_before(node):
            if small_arena:
                replacement = insert_hardswish(graph, node, value)
            else:
                # The factor as a part of the layer before would change x as well.
                factor = graph.graph.call_function(operator.mul, (value, SIGMOID_SLOPE))
                gate = graph.graph.call_function(torch.sigmoid, (factor,))
                replacement = graph.graph.call_function(operator.mul, (value, gate))
        node.replace_all_uses_with(replacement)
        graph.graph.erase_node(node)
    graph.recompile()


def insert_hardswish(graph: fx.GraphModule, node: fx.Node, value: fx.Node) -> fx.Node:
    """hardswish(1.9 x) / 1.9, both factors in weights where a layer is next to it."""
    before = layer_before(graph, node)
    after = layer_after(graph, node)
    if before is not None:
        scale_layer(before, HARDSWISH_SLOPE, of_bias=True)
    else:
        value = graph.graph.call_function(operator.mul, (value, HARDSWISH_SLOPE))
    result = graph.graph.call_function(F.hardswish, (value,))
    if after is not None:
        scale_layer(after, 1 / HARDSWISH_SLOPE, of_bias=False)
    else:
        result = graph.graph.call_function(operator.mul, (result, 1 / HARDSWISH_SLOPE))
    return result


def scale_layer(layer: nn.Module, factor: float, of_bias: bool) -> None:
    with torch.no_grad():
        layer.weight.mul_(factor)
        if of_bias and layer.bias is not None:
            layer.bias.mul_(factor)


def fold_numbers(graph: fx.GraphModule) -> None:
    """Make multiplying and dividing by a number part of the layer that follows."""
    for node in list(graph.graph.nodes):
        if not is_product_with_number(node) or not isinstance(node.args[0], fx.Node):
            continue
        layer = layer_after(graph, node)
        if layer is None:
            continue
        number = node.args[1]
        scale_layer(layer, number if node.target is operator.mul else 1 / number, of_bias=False)
        remove(graph, node)


def fold_temperature(graph: fx.GraphModule, temperature: float) -> bool:
    """Make the temperature part of the last layer; False if the network does not end in one."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    last = usable_layer(graph, source_of(output))
    if last is None:
        return False
    scale_layer(last, 1 / temperature, of_bias=True)
    return True


def layer_before(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The layer whose weights can take a factor of this node's input; None if there is none."""
    source = source_of(node)
    while source is not None and is_call_of(graph, source, *MAX_POOLS):
        source = source_of(source)
    return usable_layer(graph, source)


def layer_after(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The layer whose weights can take a factor of this node's output; None if there is none."""
    homogeneous = (*MAX_POOLS, nn.Flatten, torch.flatten, nn.Dropout, "flatten", "contiguous")
    user = only_user(node)
    while user is not None and (
        is_call_of(graph, user, *homogeneous) or is_product_with_number(user)
    ):
        user = only_user(user)
    return usable_layer(graph, user)


def is_product_with_number(node: fx.Node) -> bool:
    return node.target in (operator.mul, operator.truediv) and isinstance(node.args[1], float | int)


def usable_layer(graph: fx.GraphModule, node: fx.Node | None) -> nn.Module | None:
    if node is None or not is_call_of(graph, node, *WEIGHTED) or is_shared(graph, node):
        return None
    return module_of(graph, node)

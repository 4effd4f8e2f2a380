"""The weights of a backbone: read from a file or downloaded, loaded, hashed.

Nothing in a file runs.
"""

import argparse
import hashlib
import http.client
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models

from util import UserError, is_of_disk, one_line, sha256, unreadable

OFFLINE = "efficientnet_lite2"  # its weights come in an installed package
WRAPPERS = ("state_dict", "model")  # keys of a checkpoint under which its state dict lies
ANSWER = 10  # seconds in which a host must answer
PREFIXES = ("module.", "backbone.", "model.")  # what training code puts before a tensor's name


class Assembly(NamedTuple):
    """The parts of a backbone before its weights are loaded.

    whole: the network that the state dict belongs to. cut: the module that gives the map; it
    shares its tensors with the whole one. source: where the state dict is from, in words.
    facts: what else the provenance has to say.
    """

    whole: nn.Module
    cut: nn.Module
    state: dict[str, Tensor]
    source: str
    facts: dict[str, str] = {}


def read_state(path: Path) -> tuple[dict[str, Tensor], str]:
    """A state dict from a local file, and the file's name. Nothing in the file runs.

    What training code puts around it is taken off: WRAPPERS and PREFIXES.
    Raises UserError for a missing or damaged file, for other contents, and for a disk that fails.
    """
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise UserError(f"--weights {path}: no such file") from None
    except Exception as error:  # whatever torch raises over a damaged or refused file
        if is_of_disk(error):
            raise unreadable(path, error) from None
        raise UserError(
            f"--weights {path} is not a state dict that can be loaded safely: {first_line(error)}; "
            "if it is a whole checkpoint or model, save its state_dict() alone, else copy it again"
        ) from None

    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not is_state(state):
        raise UserError(f"--weights {path} does not hold a state dict (names to tensors)")
    return {without_prefixes(key): value for key, value in state.items()}, one_line(Path(path).name)


def load_file(path: Path):
    """What a file of weights holds: torch's own format, or safetensors.

    Many checkpoints hold the flags of their training beside the weights, as a Namespace.
    """
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file as load_safetensors  # it comes with timm

        return load_safetensors(path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def without_prefixes(name: str) -> str:
    """A tensor's name without PREFIXES, in whatever order they stand before it."""
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name


def is_state(content) -> bool:
    """Whether what was read is a state dict, names to tensors."""
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )


def first_line(error: Exception) -> str:
    """What an error says in its first sentence; its kind where it says nothing.

    Torch goes on with advice to load what is refused.
    """
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]


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


def why_unreachable(url: str) -> str | None:
    """Why a host cannot be reached, None where it answers, whatever that is.

    None as well where the net is there, and something else is the matter.
    """
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER):
            return None
    except (urllib.error.HTTPError, http.client.HTTPException):
        return None
    except OSError as error:
        reason = getattr(error, "reason", error)
        return None if isinstance(reason, ssl.SSLError) else first_line(reason)


def cached_state(name: str, weights, cached: Path) -> dict[str, Tensor]:
    """The state dict of a file in torch's cache, which torch itself takes as it is.

    weights: torchvision's. Says so where the file is not the published one.
    Raises UserError for a damaged one (an empty file, a web page, a part of a download), and for a
    disk that fails.
    """
    try:
        state = weights.get_state_dict(weights_only=True)
    except Exception as error:  # whatever torch raises over a damaged or refused file
        if is_of_disk(error) and cached.is_file():
            raise unreadable(cached, error) from None
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
    try:
        whole.load_state_dict(used, strict=False)
    except RuntimeError as error:  # tensors of a kind that cannot be copied
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"weights {source} do not fit the backbone: {reason}") from None


def hash_weights(network: nn.Module) -> str:
    """SHA-256 over the names and values of the tensors that make the map.

    It does not depend on the file that they came from.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()

"""Image files -> batches of uint8 tensors -> normalised pixels."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms

from scegg.features.backbones import EFFICIENTNET_LITE, IMAGENET, OFFLINE
from util import UserError

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")  # Pillow knows more, and would run Ghostscript on EPS
LONGEST = 50  # times an image's shorter side


def read_image(path: Path, transform) -> torch.Tensor:
    """`transform` of an image file's RGB. Raises UserError for a file that is no image, a damaged one, and decompression bombs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if max(image.size) > LONGEST * min(image.size):  # resizing would make a bomb of it
                    raise ValueError(f"it is {image.width} x {image.height} pixels, no photograph")
                return transform(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:  # PIL raises many kinds over a damaged file
        raise UserError(f"{path} is not a readable image ({error})") from None


class ResizeAndCrop:
    """torchvision's Resize(side) and CenterCrop(side) of a PIL image, to the bit; decoding a photograph takes a sixth less with it.

    Pillow resizes along the rows and then along the columns: what is left and right of the crop need not go through the second.
    """

    def __init__(self, side: int):
        self.side = side

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = (int(self.side * length / min(image.size)) for length in image.size)
        left, top = (round((length - self.side) / 2) for length in (width, height))
        stretched = image.resize((width, image.height), Image.Resampling.BILINEAR).crop((left, 0, left + self.side, image.height))
        return stretched.resize((self.side, height), Image.Resampling.BILINEAR).crop((0, top, self.side, top + self.side))


def image_transform(img_size: int) -> transforms.Compose:
    """PIL RGB -> (3, img_size, img_size) uint8: shorter side to img_size, centre crop. Bytes travel from loader to device."""
    return transforms.Compose([ResizeAndCrop(img_size), transforms.PILToTensor()])


class PixelNormalization(nn.Module):
    """Images (B, 3, H, W) uint8 -> float32: to [0, 1], then less a mean and over a std.

    normalization: imagenet, the paper's (section 3), or backbone, those that the backbone's weights were trained with.
    """

    def __init__(self, backbone: str, normalization: str = "imagenet"):
        super().__init__()
        self.name, mean, std = EFFICIENTNET_LITE if (backbone, normalization) == (OFFLINE, "backbone") else IMAGENET
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images):
        return images.float().div_(255).sub_(self.mean).div_(self.std)


class Unreadable(str):
    """What is wrong with an image, carried from a loader's worker to the main process, where errors are raised."""


class Images(Dataset):
    """The dataset's images in xlsa17's order: index -> (3, S, S) uint8 tensor, or Unreadable.

    workers: the processes that decode batches side by side. Without any, a batch is decoded in threads (Pillow lets go of
    Python's lock): the backbone does not compute meanwhile.
    """

    def __init__(self, paths: list[Path], transform, workers: int = 0):
        self.paths, self.transform = paths, transform
        self.map = map if workers else ThreadPoolExecutor(os.cpu_count()).map  # threads cannot be sent to a process

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            return read_image(self.paths[index], self.transform)
        except UserError as error:
            return Unreadable(f"{error}: restore it from the dataset")

    def __getitems__(self, indices):
        return list(self.map(self.__getitem__, indices))


def collate(items):
    """A batch (B, 3, S, S), channels last as Pillow's images are, or the first Unreadable among its images."""
    unreadable = next((item for item in items if isinstance(item, Unreadable)), None)
    return unreadable or torch.stack([item.permute(1, 2, 0) for item in items]).permute(0, 3, 1, 2)


def check_images(root: Path, tails: list[str]):
    """Raises UserError if images are missing: how many, and the first few."""
    missing = [tail for tail in tails if not (root / tail).is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(tails)} images are missing below {root}, first "
                        f"{', '.join(missing[:3])}: unpack the dataset again")

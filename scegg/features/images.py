"""Image files -> batches of uint8 pixels -> normalised pixels, as a backbone takes them."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

from scegg.features.backbones import pixel_statistics
from util import UserError

# Pillow knows more formats, and would run Ghostscript on EPS
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")
LONGEST_SIDE = 50  # times the shorter side of an image


def read_image(path: Path, transform) -> Tensor:
    """`transform` of an image file's RGB picture.

    Raises UserError for a file that is no image, a damaged one, and a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                if max(image.size) > LONGEST_SIDE * min(image.size):  # resizing makes it a bomb
                    raise ValueError(f"it is {image.width} x {image.height} pixels, no photograph")
                return transform(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:  # PIL raises many kinds over a damaged file
        raise UserError(f"{path} is not a readable image ({error})") from None


class ResizeAndCrop:
    """torchvision's Resize(side) and CenterCrop(side) of a PIL image, bit for bit.

    Pillow resizes along the rows first, then along the columns. What the crop cuts off at the left
    and right need not take the second step; this saves a sixth of a photograph's decoding time.
    """

    def __init__(self, side: int):
        self.side = side

    def __call__(self, image: Image.Image) -> Image.Image:
        shorter = min(image.size)
        width, height = (int(self.side * length / shorter) for length in image.size)
        left, top = (round((length - self.side) / 2) for length in (width, height))

        stretched = image.resize((width, image.height), Image.Resampling.BILINEAR)
        middle = stretched.crop((left, 0, left + self.side, image.height))
        resized = middle.resize((self.side, height), Image.Resampling.BILINEAR)
        return resized.crop((0, top, self.side, top + self.side))


def image_transform(img_size: int) -> transforms.Compose:
    """PIL RGB -> (3, img_size, img_size) uint8: shorter side to img_size, then the centre.

    Bytes travel from the loader to the device; they become floats there.
    """
    return transforms.Compose([ResizeAndCrop(img_size), transforms.PILToTensor()])


class PixelNormalization(nn.Module):
    """Images (B, 3, H, W) uint8 -> float32: to [0, 1], less a mean, over a standard deviation.

    normalization: imagenet, the paper's (docs/method.md, section 3), or backbone, the pixels that
    the backbone's weights were trained with.
    """

    def __init__(self, backbone: str, normalization: str = "imagenet"):
        super().__init__()
        statistics = pixel_statistics(backbone, normalization)
        self.name = statistics.name
        self.register_buffer("mean", torch.tensor(statistics.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(statistics.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return images.float().div_(255).sub_(self.mean).div_(self.std)


class Unreadable(str):
    """What is wrong with an image. It travels to the main process, which raises the error."""


class Images(Dataset):
    """The dataset's images in xlsa17's order: index -> (3, S, S) uint8 tensor, or Unreadable.

    workers: how many processes decode batches side by side. Without any, the images of a batch are
    decoded in threads, since Pillow releases Python's lock; the backbone then waits for them.
    """

    def __init__(self, paths: list[Path], transform, workers: int = 0):
        self.paths = paths
        self.transform = transform
        # threads cannot be sent to a process
        self.map = map if workers else ThreadPoolExecutor(os.cpu_count()).map

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            return read_image(self.paths[index], self.transform)
        except UserError as error:
            return Unreadable(f"{error}: restore it from the dataset")

    def __getitems__(self, indices):
        return list(self.map(self.__getitem__, indices))


def collate(items: list[Tensor | Unreadable]) -> Tensor | Unreadable:
    """A batch (B, 3, S, S), or the first Unreadable among its images.

    The batch is in channels-last layout, as Pillow's images are.
    """
    for item in items:
        if isinstance(item, Unreadable):
            return item
    channels_last = torch.stack([item.permute(1, 2, 0) for item in items])
    return channels_last.permute(0, 3, 1, 2)


def check_images(root: Path, tails: list[str]):
    """Raises UserError if images are missing: how many, and the first few."""
    missing = [tail for tail in tails if not (root / tail).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(tails)} images are missing below {root}, "
            f"first {', '.join(missing[:3])}: unpack the dataset again"
        )

"""Image files -> batches of uint8 pixels -> normalised pixels, as a backbone takes them."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

from scegg.features.backbones import pixel_statistics
from scegg.speed.threads import granted_cores
from util import UserError, remedy

# Pillow knows more formats, and would run Ghostscript on EPS
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
LONGEST_SIDE = 50  # times the shorter side of an image
MEGAPIXELS = 200  # of an image that is read unasked; Pillow warns of 90
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20  # bytes; Pillow refuses a PNG with 1 MB of text
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `check_size` refuses

# what may stand for white where a file does not say it
PLAUSIBLE_WHITE = {"I": (255, 65535), "F": (1, 255, 65535)}
PHOTOMETRIC, BITS, SAMPLE_FORMAT, LARGEST_SAMPLE = 262, 258, 339, 341  # tags of a TIFF


class Unusable(ValueError):
    """Why a whole image is not taken."""


def read_image(path: Path, transform, megapixels: int = MEGAPIXELS) -> Tensor:
    """`transform` of an image file's RGB picture.

    Raises UserError for a file that is no image, a damaged one, one of more megapixels, and one
    whose brightness is not known.
    """
    pixels = megapixels * 1_000_000
    Image.MAX_IMAGE_PIXELS = pixels  # what Pillow itself looks at
    try:
        with Image.open(path, formats=FORMATS) as image:
            check_size(image, pixels)
            return transform(to_rgb(image))

    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path} may be a decompression bomb ({error}): if it is a photograph, allow it with "
            "a larger --max_megapixels (preprocessing.py, visualize.py, evaluate.py)"
        ) from None
    except Unusable as error:
        raise UserError(f"{path}: {error}") from None
    except MemoryError:
        raise UserError(f"{path} needs more memory than is free: stop other programs") from None

    except Exception as error:  # PIL raises many kinds over a damaged file
        advice = "put a JPEG or PNG there that opens"
        if isinstance(error, OSError) and error.errno is not None:  # the system's
            advice = remedy(error)
        raise UserError(f"{path} is not a readable image ({error}): {advice}") from None


def check_size(image: Image.Image, pixels: int):
    """Raises DecompressionBombError for more pixels than these, Unusable for a ribbon."""
    if image.width * image.height > pixels:
        raise Image.DecompressionBombError(f"it is {image.width} x {image.height} pixels")
    if max(image.size) > LONGEST_SIDE * min(image.size):  # resizing makes it a bomb
        raise Unusable(f"it is {image.width} x {image.height} pixels, no photograph")


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB. Raises Unusable where its white is not known."""
    if image.mode == "RGB":
        return image
    if image.mode[0] in "IF":  # more than 8 bits: Pillow would take all above 255 for white
        image = to_8_bits(image)
    return image.convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of integers or floats as mode L: from black to white becomes 0 to 255.

    Raises Unusable where it is not known what is white.
    """
    values = np.asarray(image)
    white = known_white(image, values.min(), values.max())
    scaled = np.rint(values * np.float32(255 / white)).astype(np.uint8)

    white_is_zero = tiff_tag(image, PHOTOMETRIC, 1) == 0
    return Image.fromarray(255 - scaled if white_is_zero else scaled)


def known_white(image: Image.Image, least: float, most: float) -> float:
    """The value that stands for white in a grey image whose values run from `least` to `most`.

    With 16 bits and fewer it is their largest number. With more it is what a TIFF calls its
    largest sample, else the least plausible number that no value passes.
    Raises Unusable where there is none.
    """
    bits = tiff_tag(image, BITS, 32 if image.mode == "F" else 16)
    signs = int(tiff_tag(image, SAMPLE_FORMAT, 1) == 2)
    candidates = [2.0 ** (bits - signs) - 1]
    if bits > 16:
        told = tiff_tag(image, LARGEST_SAMPLE, None)
        candidates = [told] if told else PLAUSIBLE_WHITE[image.mode]

    if least >= 0:  # and no NaN
        for white in candidates:
            if most <= white:
                return white
    raise Unusable(
        f"its values run from {least:g} to {most:g}, and nothing says which is white: "
        "save it with 8 or 16 bits a pixel"
    )


def tiff_tag(image: Image.Image, tag: int, default):
    """The first value of a TIFF's tag; `default` where the file has none or is no TIFF."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return value[0] if isinstance(value, tuple) else value


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
    megapixels: an image of more is refused.
    """

    def __init__(
        self, paths: list[Path], transform, workers: int = 0, megapixels: int = MEGAPIXELS
    ):
        self.paths = paths
        self.transform = transform
        self.megapixels = megapixels
        # threads cannot be sent to a process
        self.map = map if workers else ThreadPoolExecutor(granted_cores()).map

    def __len__(self):
        return len(self.paths)

    @property
    def image_bytes(self) -> int:
        """Bytes of a decoded image."""
        return 3 * self.transform.transforms[0].side ** 2

    def __getitem__(self, index):
        try:
            return read_image(self.paths[index], self.transform, self.megapixels)
        except UserError as error:
            return Unreadable(str(error))

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

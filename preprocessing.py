"""Images -> feature maps of a backbone -> an HDF5 file. Memory is bounded by the batch.

    python preprocessing.py --dataset CUB --compression

Reads the images and xlsa17's split below the data root (docs/method.md, section 2).
Writes data/<DS>/feature_map_<backbone>_<DS>.hdf5 (section 3). Stop it at any time; the same
command continues. The machinery is in scegg/features.
"""

import scegg  # noqa: F401, first: it sets what torch reads when it is loaded

# isort: split
import argparse
import os
from pathlib import Path

import torch
from torch import nn

from scegg.datasets.layouts import LAYOUTS, Layout, add_layout_flag, find_layout
from scegg.datasets.semantics import read_semantics
from scegg.datasets.splits import Split
from scegg.datasets.word_vectors import attribute_vectors
from scegg.datasets.xlsa17 import places_of_images, read_attribute_names, read_dataset
from scegg.features.backbones import IMAGENET, OFFLINE, build_backbone, fold, pixel_statistics
from scegg.features.extract import Backbone, compiled, default_workers, extract
from scegg.features.feature_file import (
    DTYPES,
    FILTERS,
    Annotations,
    feature_file,
    make_provenance,
    write_annotations,
)
from scegg.features.images import (
    MEGAPIXELS,
    Images,
    PixelNormalization,
    check_images,
    image_transform,
)
from scegg.features.loading import usable_workers
from scegg.features.parts import Parts
from scegg.features.ranks import device_of_rank, is_first_rank, rank_of_ranks, sole_job
from scegg.speed.allocator import keep_freed_memory
from scegg.speed.threads import fix_threads
from util import FlagParser, UserError, exit_on_user_error, one_line, pick_device


def main(argv=None):
    """Preprocess a dataset as the flags say. Raises UserError for all that a user can put right."""
    options = parse_arguments(argv)
    rank_of_ranks()  # raises UserError where the environment makes no sense
    keep_freed_memory()
    fix_threads()
    device = pick_device(options.device or device_of_rank())
    fill_in_defaults(options, device)

    annotations = read_annotations(options)
    network, weights = build_backbone(options.backbone, options.weights, options.img_size)
    pixels = pixel_normalization(options)
    provenance = make_provenance(options, weights, annotations.split, pixels.name, device)
    images = dataset_images(options, annotations.image_files)
    settings = provenance | {"batch_size": options.batch_size}
    parts = Parts(options.output, images.paths, options.compression, settings)

    with sole_job(options.output) as ranks:
        try:
            parts.agree(ranks)
            if is_first_rank():
                parts.prepare(map_shape(network, options.img_size))
            parts.require_shared(ranks)
            parts.try_disk()

            backbone = make_backbone(options, pixels, network, device)
            speed = extract(backbone, images, parts, options)
        finally:
            parts.remove_if_empty()
        ranks.wait("the last image")

        if is_first_rank():
            parts.join(lambda file: write_annotations(file, annotations, provenance))
            size = options.output.stat().st_size / 1e9
            print(
                f"wrote {options.output}: {len(images)} feature maps of {options.backbone} "
                f"({provenance['weights']}), {size:.2f} GB, {speed:.1f} images/s on {device}"
            )


def parse_arguments(argv=None) -> argparse.Namespace:
    """The flags. Raises UserError for one that cannot be."""
    parser = FlagParser("Images -> feature maps -> HDF5.")
    add_data_flags(parser)
    add_output_flags(parser)
    add_backbone_flags(parser)
    add_speed_flags(parser)
    options = parser.parse_args(argv)

    minima = {"batch_size": 1, "num_workers": 0, "img_size": 32, "max_megapixels": 1}
    for name, least in minima.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    return options


def add_data_flags(parser: argparse.ArgumentParser):
    """What is read."""
    folders = ", ".join(f"{name}/" for name in (*LAYOUTS, "xlsa17", "w2v"))
    parser.add_argument(
        "--dataset", "-d", required=True, help=f"{', '.join(LAYOUTS)}, or one of your own"
    )
    add_layout_flag(parser)
    parser.add_argument(
        "--semantics",
        type=Path,
        default=None,
        help=".csv or .npy of class vectors, in the place of the class attributes",
    )
    parser.add_argument("--data_root", type=Path, default=Path("data"), help=f"folder of {folders}")
    parser.add_argument(
        "--w2v",
        type=Path,
        default=None,
        help=".pkl, .npy, word2vec .bin/.txt or GloVe .txt (default: <data_root>/w2v)",
    )
    parser.add_argument(
        "--max_megapixels",
        type=int,
        default=MEGAPIXELS,
        help=f"a larger image is refused as a decompression bomb (default: {MEGAPIXELS})",
    )


def add_output_flags(parser: argparse.ArgumentParser):
    """What is written."""
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="HDF5 file (default: data/<DS>/feature_map_<backbone>_<DS>.hdf5)",
    )
    parser.add_argument(
        "--compression",
        "-c",
        nargs="?",
        const="gzip",
        default=None,
        choices=[name for name in FILTERS if name],
        help="compress the feature maps, lossless (default where given: gzip)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="that the maps are stored in; the other two take half the disk (default: float32)",
    )


def add_backbone_flags(parser: argparse.ArgumentParser):
    """What the maps are."""
    parser.add_argument(
        "--backbone",
        default="resnet101",
        help=f"a torchvision classification network, {OFFLINE} (offline), or timm/<name>",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        default=None,
        help="local state dict (default: the pretrained weights)",
    )

    parser.add_argument("--img_size", type=int, default=448, help="image side in pixels")
    parser.add_argument(
        "--normalization",
        choices=("imagenet", "backbone"),
        default="imagenet",
        help="the pixels' mean and std: ImageNet's, as in the paper (default), or those of the "
        f"weights' training, which differ for {OFFLINE} and for many of timm's",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the backbone's arithmetic",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="let torch compile the backbone first, which then rounds in another way",
    )


def add_speed_flags(parser: argparse.ArgumentParser):
    """What only changes the time it takes."""
    parser.add_argument(
        "--device",
        "-g",
        default=None,
        help="cpu, cuda or a GPU's number (default: CUDA if there is one)",
    )
    parser.add_argument(
        "--batch_size",
        "-b",
        type=int,
        default=None,
        help="images a forward pass (default: 4 on CPU, 64 on CUDA)",
    )

    parser.add_argument(
        "--num_workers",
        "-n",
        type=int,
        default=None,
        help="decoding processes (default: up to 8 beside a GPU, a fourth of the cores beside "
        "a CPU, which needs them itself)",
    )


def fill_in_defaults(options: argparse.Namespace, device: torch.device):
    """Set the flags whose default depends on the device or on another flag.

    Raises UserError for an output that is a folder.
    """
    if options.batch_size is None:
        options.batch_size = 64 if device.type == "cuda" else 4
    if options.num_workers is None:
        options.num_workers = default_workers(device)
    options.num_workers = usable_workers(options.num_workers)
    if options.output is None:
        name = options.backbone
        if options.semantics:  # the file of the dataset's own attributes stays
            name += f"_{options.semantics.stem}"
        options.output = feature_file(options.dataset, name)
    if options.output.is_symlink():  # the parts, too, go to the disk that it leads to
        options.output = Path(os.path.realpath(options.output))
    if options.output.is_dir():
        raise UserError(f"--output {options.output} is a folder: name a file")


def read_annotations(options: argparse.Namespace) -> Annotations:
    """What lies below the data root. Raises UserError for all that is missing or cannot be."""
    data_root, dataset = options.data_root, options.dataset
    layout = find_layout(dataset, data_root, options.layout)
    split, class_names, tails = read_dataset(data_root, dataset)
    names = None
    semantics = options.semantics
    if semantics is None and layout.semantics:
        semantics = data_root / dataset / layout.semantics
    if semantics:
        vectors, names = read_semantics(semantics, class_names)
        split = split.with_semantics(vectors, one_line(semantics.name))
    print(split.describe(dataset))
    warn_of_units(split, layout)
    if options.output.exists():
        print(f"{options.output} is there already: it will be replaced")
    check_images(data_root / dataset, places_of_images(data_root, dataset, tails))

    count = split.att.shape[1]
    if not semantics:
        names = read_attribute_names(data_root, dataset, count)
    w2v, w2v_source = attribute_vectors(
        options.w2v, data_root, dataset, names, count, layout.units, split.semantics
    )
    return Annotations(split, w2v, w2v_source, class_names, names, tails)


def warn_of_units(split: Split, layout: Layout):
    """A line where the class attributes are not in the units that the description says."""
    most = split.original_att.max()
    is_other = most <= 1 if layout.units == "percent" else most > 1
    if split.semantics is None and layout.units != "vector" and is_other:
        print(
            f"WARNING: original_att goes up to {most:g}, but the description of {layout.name} says "
            f"units: {layout.units}"
        )


def pixel_normalization(options: argparse.Namespace) -> PixelNormalization:
    """The normalisation asked for, and a line where the weights were trained with another."""
    is_other = pixel_statistics(options.backbone, "backbone") != IMAGENET
    if is_other and options.normalization == "imagenet":
        print(
            f"pixels are normalised as in the paper; {options.backbone} was trained on others, "
            "--normalization backbone gives it those"
        )
    return PixelNormalization(options.backbone, options.normalization)


def dataset_images(options: argparse.Namespace, tails: list[str]) -> Images:
    """The images to be read; tails: their paths in the dataset's folder."""
    places = places_of_images(options.data_root, options.dataset, tails)
    paths = [options.data_root / options.dataset / place for place in places]
    transform = image_transform(options.img_size)
    return Images(paths, transform, options.num_workers, options.max_megapixels)


def make_backbone(
    options: argparse.Namespace, pixels: PixelNormalization, network: nn.Module, device
) -> Backbone:
    """The network as it runs. Raises UserError if it is to be compiled and cannot."""
    precision = getattr(torch, options.precision)
    backbone = Backbone(pixels, fold(network), device, precision, options.batch_size)
    return compiled(backbone, options.img_size) if options.compile else backbone


@torch.inference_mode()
def map_shape(network: nn.Module, img_size: int) -> tuple[int, int, int]:
    """(D, h, w) of the network's map of an image."""
    return network(torch.zeros(1, 3, img_size, img_size)).shape[1:]


if __name__ == "__main__":
    exit_on_user_error(main)

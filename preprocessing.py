"""Images -> backbone feature maps -> HDF5, streamed: memory is bounded by the batch, never by the dataset.

    python preprocessing.py --dataset CUB --compression

Reads the data root's images and xlsa17 (section 2), writes data/<DS>/feature_map_<backbone>_<DS>.hdf5 (section 3).
"""
import argparse
import json
from pathlib import Path

import h5py
import PIL
import torch
import torchvision

from scegg.datasets.layouts import LAYOUTS
from scegg.datasets.word_vectors import attribute_vectors
from scegg.datasets.xlsa17 import read_attribute_names, read_dataset
from scegg.features.backbones import OFFLINE, build_backbone, fold
from scegg.features.extract import Backbone, default_workers, extract
from scegg.features.feature_file import FILTERS, feature_file, write_annotations
from scegg.features.images import Images, PixelNormalization, check_images, image_transform
from scegg.features.parts import Parts
from scegg.features.ranks import device_of_rank, rank_of_ranks, sole_job, wait_for_all_ranks
from scegg.speed.allocator import keep_freed_memory
from util import FlagParser, UserError, exit_on_user_error, pick_device


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = FlagParser("Images -> feature maps -> HDF5.")
    parser.add_argument("--dataset", "-d", required=True, choices=LAYOUTS)
    parser.add_argument("--compression", "-c", nargs="?", const="gzip", default=None, choices=[name for name in FILTERS if name],
                        help="compress the feature maps, lossless (default where given: gzip)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the backbone's arithmetic")
    parser.add_argument("--batch_size", "-b", type=int, default=None, help="images a forward pass (default: 4 on CPU, 64 on CUDA)")
    parser.add_argument("--device", "-g", default=None, help="cpu, cuda or a GPU's number (default: CUDA if there is one)")
    parser.add_argument("--num_workers", "-n", type=int, default=None,
                        help="decoding processes (default: up to 8 beside a GPU, a fourth of the cores beside a CPU, which needs them itself)")
    parser.add_argument("--data_root", type=Path, default=Path("data"), help="folder of CUB/, SUN/, AWA2/, TOY/, xlsa17/, w2v/")
    parser.add_argument("--backbone", default="resnet101", help="a torchvision classification CNN, or efficientnet_lite2 (offline)")
    parser.add_argument("--weights", type=Path, default=None, help="local state dict (default: the pretrained weights)")
    parser.add_argument("--img_size", type=int, default=448, help="image side in pixels")
    parser.add_argument("--normalization", choices=("imagenet", "backbone"), default="imagenet",
                        help="the pixels' mean and std: ImageNet's, as in the paper (default), or those of the weights' training, which "
                             f"differ for {OFFLINE}")
    parser.add_argument("--w2v", type=Path, default=None, help=".pkl, .npy, word2vec .bin/.txt or GloVe .txt (default: <data_root>/w2v)")
    parser.add_argument("--output", type=Path, default=None, help="HDF5 file (default: data/<DS>/feature_map_<backbone>_<DS>.hdf5)")
    options = parser.parse_args(argv)
    for name, least in (("batch_size", 1), ("num_workers", 0), ("img_size", 32)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    return options


def main(argv=None):
    options = parse_arguments(argv)
    keep_freed_memory()
    device = pick_device(options.device or device_of_rank())
    options.batch_size = options.batch_size or (64 if device.type == "cuda" else 4)
    if options.num_workers is None:
        options.num_workers = default_workers(device)
    data_root, dataset = options.data_root, options.dataset
    output = options.output or feature_file(dataset, options.backbone)
    split, class_names, tails = read_dataset(data_root, dataset)
    print(split.describe(dataset) + (f"\n{output} is there already: it will be replaced" if output.exists() else ""))
    check_images(data_root / dataset, tails)
    names = read_attribute_names(data_root, dataset, split.att.shape[1])
    w2v, w2v_source = attribute_vectors(options.w2v, data_root, dataset, names, split.att.shape[1])
    network, provenance = build_backbone(options.backbone, options.weights, options.img_size)
    pixels = PixelNormalization(options.backbone, options.normalization)
    if (options.backbone, options.normalization) == (OFFLINE, "imagenet"):
        print(f"pixels are normalised as in the paper; {OFFLINE} was trained on others, --normalization backbone gives it those")
    transform = f"Resize({options.img_size}) CenterCrop({options.img_size}) ToTensor Normalize({pixels.name})"
    provenance |= {"dataset": dataset, "img_size": options.img_size, "transform": transform,
                   "normalization": options.normalization, "precision": options.precision, "batch_norm": "folded",
                   "split_fingerprint": split.fingerprint, "device": device.type,
                   "versions": json.dumps({"torch": torch.__version__, "torchvision": torchvision.__version__,
                                           "h5py": h5py.__version__, "pillow": PIL.__version__})}
    images = Images([data_root / dataset / tail for tail in tails], image_transform(options.img_size), options.num_workers)
    parts = Parts(output, images.paths, options.compression, provenance | {"batch_size": options.batch_size})
    with sole_job(output):
        if rank_of_ranks()[0] == 0:
            with torch.inference_mode():
                parts.prepare(network(torch.zeros(1, 3, options.img_size, options.img_size)).shape[1:])
        wait_for_all_ranks()
        backbone = Backbone(pixels, fold(network), device, getattr(torch, options.precision), options.batch_size)
        try:
            speed = extract(backbone, images, parts, options)
        finally:
            parts.remove_if_empty()
        wait_for_all_ranks()
        if rank_of_ranks()[0] == 0:
            parts.join(lambda file: write_annotations(file, split, w2v, class_names, names, tails, provenance | {"w2v": w2v_source}))
            print(f"wrote {output}: {len(tails)} feature maps of {options.backbone} ({provenance['weights']}), "
                  f"{output.stat().st_size / 1e9:.2f} GB, {speed:.1f} images/s on {device}")


if __name__ == "__main__":
    exit_on_user_error(main)

"""Images -> backbone feature maps -> HDF5, streamed: memory is bounded by the batch, never by the dataset.

    python preprocessing.py --dataset CUB --compression

Reads the data root's images and xlsa17 (SPEC section 2), writes data/<DS>/feature_map_<backbone>_<DS>.hdf5 (section 3).
"""
import argparse
import datetime
import json
import os
import time
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import torch
import torchvision
from PIL import Image
from torch import distributed
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backbones import Pixels, build_backbone, image_transform
from util import FlagParser, UserError, exit_on_user_error, keep_freed_memory, pick_device
from w2v import attribute_vectors
from writer import FILTERS, Parts, write_annotations
from xlsa17 import LAYOUTS, feature_file, read_attribute_names, read_dataset


class Unreadable(str):
    """What is wrong with an image, carried from a loader's worker to the main process, where errors are raised."""


class Images(Dataset):
    """The dataset's images in xlsa17's order: index -> (3, S, S) uint8 tensor, or Unreadable."""

    def __init__(self, paths: list[Path], transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            with Image.open(self.paths[index]) as image:
                return self.transform(image.convert("RGB"))
        except Exception as error:  # PIL raises many kinds over a damaged file
            return Unreadable(f"{self.paths[index]} is not a readable image ({error}): restore it from the dataset")


def collate(items):
    """A batch (B, 3, S, S), or the first Unreadable among its images."""
    return next((item for item in items if isinstance(item, Unreadable)), None) or torch.stack(items)


def check_images(root: Path, tails: list[str]):
    """Raises UserError if images are missing: how many, and the first few."""
    missing = [tail for tail in tails if not (root / tail).is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(tails)} images are missing below {root}, first "
                        f"{', '.join(missing[:3])}: unpack the dataset again")


def forward(pixels, backbone, batches, device: torch.device, precision: torch.dtype):
    """Maps (B, D, h, w) float32 on the host of each batch of images; the device already works on the next one meanwhile."""
    waiting = None
    for images in batches:
        if isinstance(images, Unreadable):
            raise UserError(images)
        images = pixels(images.to(device, non_blocking=True, memory_format=torch.channels_last))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            maps = backbone(images).float()
        if waiting is not None:
            yield to_host(*waiting)
        waiting = maps, torch.isfinite(maps).all()
    if waiting is not None:
        yield to_host(*waiting)


def to_host(maps: torch.Tensor, finite: torch.Tensor) -> np.ndarray:
    if not finite:
        raise UserError("the backbone gave NaN or infinity: are --weights the right ones?")
    return maps.cpu().contiguous().numpy()


def extract(pixels: Pixels, backbone, images: Images, parts: Parts, device: torch.device, options) -> float:
    """Run this rank's share of the images through the backbone into parts. Returns images per second."""
    todo = parts.missing(*rank_of_ranks())
    batches = [list(parts.rows(start))[at:at + options.batch_size] for start in todo
               for at in range(0, len(parts.rows(start)), options.batch_size)]
    loader = DataLoader(images, batch_sampler=batches, num_workers=options.num_workers, collate_fn=collate,
                        pin_memory=device.type == "cuda", prefetch_factor=4 if options.num_workers else None)
    pixels, backbone = pixels.to(device), backbone.to(device, memory_format=torch.channels_last)
    # float32 means float32: cuDNN would use TF32 unasked
    torch.backends.cudnn.allow_tf32 = False
    precision = getattr(torch, options.precision)
    count, began = sum(map(len, batches)), time.perf_counter()
    if count < len(images):
        print(f"{len(images) - count} of {len(images)} images are done already"
              + (", or another rank's" if rank_of_ranks()[1] > 1 else ""))
    with torch.inference_mode(), tqdm(total=count, desc="feature maps", unit="image", disable=None) as bar:
        maps = forward(pixels, backbone, loader, device, precision)
        for start in todo:
            parts.make(start, progressing(bar, maps, -(-len(parts.rows(start)) // options.batch_size)))
    return count / (time.perf_counter() - began)


def progressing(bar: tqdm, maps, batches: int):
    """The next `batches` batches of `maps`, counted on the bar."""
    for batch in islice(maps, batches):
        yield batch
        bar.update(len(batch))


def rank_of_ranks() -> tuple[int, int]:
    """(rank, number of ranks) as `torchrun` tells them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def device_of_rank() -> str | None:
    """The GPU of this rank under `torchrun`, None where there is no choice to make."""
    if "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def wait_for_all_ranks():
    """Return once every rank has come here; they may be hours apart."""
    if rank_of_ranks()[1] > 1:
        distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        distributed.barrier()
        distributed.destroy_process_group()


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
        cores = os.cpu_count() or 1
        options.num_workers = min(8, cores if device.type == "cuda" else cores // 4)
    data_root, dataset = options.data_root, options.dataset
    output = options.output or feature_file(dataset, options.backbone)
    split, class_names, tails = read_dataset(data_root, dataset)
    print(split.describe(dataset) + (f"\n{output} is there already: it will be replaced" if output.exists() else ""))
    check_images(data_root / dataset, tails)
    names = read_attribute_names(data_root, dataset, split.att.shape[1])
    w2v, w2v_source = attribute_vectors(options.w2v, data_root, dataset, names, split.att.shape[1])
    backbone, provenance = build_backbone(options.backbone, options.weights, options.img_size)
    pixels = Pixels(options.backbone)
    transform = f"Resize({options.img_size}) CenterCrop({options.img_size}) ToTensor Normalize({pixels.name})"
    provenance |= {"dataset": dataset, "img_size": options.img_size, "transform": transform, "precision": options.precision,
                   "split_fingerprint": split.fingerprint, "device": device.type,
                   "versions": json.dumps({"torch": torch.__version__, "torchvision": torchvision.__version__,
                                           "h5py": h5py.__version__, "pillow": Image.__version__})}
    images = Images([data_root / dataset / tail for tail in tails], image_transform(options.img_size))
    parts = Parts(output, images.paths, options.compression, provenance | {"batch_size": options.batch_size})
    try:
        speed = extract(pixels, backbone, images, parts, device, options)
    finally:
        parts.remove_if_empty()
    wait_for_all_ranks()
    if rank_of_ranks()[0] == 0:
        parts.join(lambda file: write_annotations(file, split, w2v, class_names, names, tails, provenance | {"w2v": w2v_source}))
        print(f"wrote {output}: {len(tails)} feature maps of {options.backbone} ({provenance['weights']}), "
              f"{output.stat().st_size / 1e9:.2f} GB, {speed:.1f} images/s on {device}")


if __name__ == "__main__":
    exit_on_user_error(main)

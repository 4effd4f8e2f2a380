"""Images -> backbone feature maps -> HDF5, streamed: memory is bounded by the batch, never by the dataset.

    python preprocessing.py --dataset CUB --compression

Reads the data root's images and xlsa17 (SPEC section 2), writes data/<DS>/feature_map_<backbone>_<DS>.hdf5 (section 3).
"""
import argparse
import json
import os
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from backbones import build_backbone, image_transform
from util import UserError, atomic_path, exit_on_user_error, keep_freed_memory, pick_device
from w2v import attribute_vectors
from xlsa17 import LAYOUTS, Split, feature_file, read_attribute_names, read_dataset

GZIP_LEVEL = 4
TRANSFORM = "Resize({0}) CenterCrop({0}) ToTensor Normalize(ImageNet)"


class Unreadable(str):
    """What is wrong with an image, carried from a loader's worker to the main process, where errors are raised."""


class Images(Dataset):
    """The dataset's images in xlsa17's order: index -> (3, S, S) float32 tensor, or Unreadable."""

    def __init__(self, root: Path, tails: list[str], img_size: int):
        self.paths = [root / tail for tail in tails]
        self.transform = image_transform(img_size)

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
        raise UserError(f"{len(missing)} of {len(tails)} images are missing below {root}, the first are "
                        f"{', '.join(missing[:3])}: unpack the dataset again")


class MapWriter:
    """Writes feature maps into an HDF5 dataset, one chunk an image; gzip runs in threads beside the backbone.

    Chunks are compressed here and written as they are, which is what HDF5's own gzip filter would store: zlib releases
    Python's lock, HDF5's filter does not.
    """

    def __init__(self, target: h5py.Dataset, compress: bool):
        self.target, self.compress, self.row = target, compress, 0
        self.pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
        self.pending = deque()

    def write(self, maps: np.ndarray):
        """Append maps (B, D, h, w) float32."""
        if not self.compress:
            self.target[self.row:self.row + len(maps)] = maps
        else:
            for offset, image_map in enumerate(maps):
                self.pending.append((self.row + offset, self.pool.submit(zlib.compress, image_map.data, GZIP_LEVEL)))
            self.drain(keep=2 * len(maps))
        self.row += len(maps)

    def drain(self, keep: int):
        """Store finished chunks, in order, until at most `keep` wait."""
        while len(self.pending) > keep:
            row, chunk = self.pending.popleft()
            self.target.id.write_direct_chunk((row, 0, 0, 0), chunk.result())

    def close(self):
        self.drain(keep=0)
        self.pool.shutdown()


def write_annotations(file: h5py.File, split: Split, w2v: np.ndarray, class_names: list[str],
                      attribute_names: list[str] | None, tails: list[str], provenance: dict):
    """Everything but the maps: section 3's datasets, names and paths beside them, provenance as attributes."""
    arrays = {"labels": split.labels, "trainval_loc": split.trainval, "test_seen_loc": split.test_seen,
              "test_unseen_loc": split.test_unseen, "att": split.att, "original_att": split.original_att,
              "w2v_att": w2v, "train_loc": split.train, "val_loc": split.val}
    texts = {"allclasses_names": class_names, "attribute_names": attribute_names, "image_files": tails}
    for name, array in arrays.items():
        if array is not None:
            file.create_dataset(name, data=array)
    for name, lines in texts.items():
        if lines is not None:
            file.create_dataset(name, data=lines, dtype=h5py.string_dtype())
    for name, value in provenance.items():
        file.attrs[name] = value


def extract(backbone, loader: DataLoader, output: Path, compress: bool, device: torch.device, annotate) -> float:
    """Run all images through the backbone into the HDF5 file `output`; annotate(file) adds the rest.

    The final name appears only once the file is complete. Returns images per second.
    """
    backbone = backbone.to(device)
    count, start, writer = len(loader.dataset), time.perf_counter(), None
    with atomic_path(output) as temporary, h5py.File(temporary, "w") as file, torch.inference_mode():
        annotate(file)
        with tqdm(total=count, desc="feature maps", unit="image", disable=None) as bar:
            for images in loader:
                if isinstance(images, Unreadable):
                    raise UserError(images)
                maps = backbone(images.to(device, non_blocking=True)).float()
                if not torch.isfinite(maps).all():
                    raise UserError("the backbone gave NaN or infinity: are --weights the right ones?")
                if writer is None:
                    target = file.create_dataset("feature_map", (count, *maps.shape[1:]), "f4", chunks=(1, *maps.shape[1:]),
                                                 **({"compression": "gzip", "compression_opts": GZIP_LEVEL} if compress else {}))
                    writer = MapWriter(target, compress)
                writer.write(np.ascontiguousarray(maps.cpu().numpy()))
                bar.update(len(images))
        writer.close()
        if writer.row != count:
            raise UserError(f"{writer.row} of {count} maps were written; run again")
    return count / (time.perf_counter() - start)


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Images -> feature maps -> HDF5.", allow_abbrev=False)
    parser.add_argument("--dataset", "-d", required=True, choices=LAYOUTS)
    parser.add_argument("--compression", "-c", action="store_true", help="gzip the feature maps (lossless)")
    parser.add_argument("--batch_size", "-b", type=int, default=None, help="images a forward pass (default 8 on CPU, 64 on CUDA)")
    parser.add_argument("--device", "-g", default=None, help="cpu, cuda or a GPU's number (default: CUDA if there is one)")
    parser.add_argument("--num_workers", "-n", type=int, default=min(8, os.cpu_count() or 1), help="decoding processes")
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
    device = pick_device(options.device)
    data_root, dataset = options.data_root, options.dataset
    output = options.output or feature_file(dataset, options.backbone)
    split, class_names, tails = read_dataset(data_root, dataset)
    print(split.describe(dataset))
    check_images(data_root / dataset, tails)
    names = read_attribute_names(data_root, dataset, split.att.shape[1])
    w2v, w2v_source = attribute_vectors(options.w2v, data_root, dataset, names, split.att.shape[1])
    backbone, provenance = build_backbone(options.backbone, options.weights, options.img_size)
    provenance |= {"dataset": dataset, "img_size": options.img_size, "transform": TRANSFORM.format(options.img_size),
                   "w2v": w2v_source, "split_fingerprint": split.fingerprint, "device": str(device),
                   "versions": json.dumps({"torch": torch.__version__, "torchvision": torchvision.__version__,
                                           "h5py": h5py.__version__, "pillow": Image.__version__})}
    batch_size = options.batch_size or (64 if device.type == "cuda" else 8)
    loader = DataLoader(Images(data_root / dataset, tails, options.img_size), batch_size, num_workers=options.num_workers,
                        collate_fn=collate, pin_memory=device.type == "cuda")
    speed = extract(backbone, loader, output, options.compression, device,
                    lambda file: write_annotations(file, split, w2v, class_names, names, tails, provenance))
    print(f"wrote {output}: {len(tails)} feature maps of {options.backbone} ({provenance['weights']}), "
          f"{output.stat().st_size / 1e9:.2f} GB, {speed:.1f} images/s on {device}")


if __name__ == "__main__":
    exit_on_user_error(main)

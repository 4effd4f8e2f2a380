"""Images -> backbone feature maps -> HDF5, streamed: memory is bounded by the batch, never by the dataset.

    python preprocessing.py --dataset CUB --compression

Reads the data root's images and xlsa17 (section 2), writes data/<DS>/feature_map_<backbone>_<DS>.hdf5 (section 3).
"""
import argparse
import contextlib
import datetime
import json
import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Full, Queue

import h5py
import numpy as np
import PIL
import torch
import torchvision
from torch import distributed
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from scegg.features.backbones import OFFLINE, Pixels, build_backbone, fold, image_transform, read_image
from util import FlagParser, UserError, exit_on_user_error, keep_freed_memory, locked, pick_device
from scegg.datasets.word_vectors import attribute_vectors
from scegg.features.parts import FILTERS, Parts, write_annotations
from scegg.datasets.xlsa17 import LAYOUTS, feature_file, read_attribute_names, read_dataset


DECODED_AT_ONCE = 8  # batches, by a CPU's own threads: after each forward pass the backbone's hold the cores for a while
AHEAD = 6  # batches of maps that wait to be written, while a part is made safe on the disk (at least a load's)


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


class Backbone:
    """Images (B, 3, S, S) uint8 -> maps (B, D, h, w) float32 on the device, in fewer images at once where its memory is too small."""

    def __init__(self, pixels: Pixels, network, device: torch.device, precision: torch.dtype, at_once: int):
        self.pixels, self.network = pixels.to(device), network.to(device, memory_format=torch.channels_last)
        self.device, self.precision, self.at_once = device, precision, at_once
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32: cuDNN would use TF32 unasked

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        while True:
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                pieces = [self.maps(piece) for piece in images.split(self.at_once)]
                return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            if self.at_once == 1:
                raise UserError("the GPU's memory is too small for one image: use a smaller --img_size, or --device cpu")
            self.at_once = (min(self.at_once, len(images)) + 1) // 2
            torch.cuda.empty_cache()
            print(f"the GPU's memory is full: going on with {self.at_once} images at once", flush=True)

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        images = self.pixels(images.to(self.device, non_blocking=True, memory_format=torch.channels_last))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            return self.network(images).float().contiguous()  # in the file's order, of which a GPU makes less work than the host


class Sent:
    """Maps (B, D, h, w) on their way from the device to the host: the copy begins when the backbone is done with them."""

    def __init__(self, maps: torch.Tensor):
        finite = torch.isfinite(maps.sum())  # a sum is finite only where every term is
        self.maps, self.finite = (tensor.to("cpu", non_blocking=True) for tensor in (maps, finite))
        self.arrival = torch.cuda.Event() if maps.is_cuda else None
        if self.arrival:
            self.arrival.record()

    def arrived(self) -> np.ndarray:
        """The maps, once they are there; raises UserError if one is not finite."""
        if self.arrival:
            self.arrival.synchronize()
        if not self.finite:
            raise UserError("the backbone gave NaN or infinity: are --weights the right ones?")
        return self.maps.numpy()


@torch.inference_mode()
def forward(backbone, loaded, batch_size: int):
    """For each load of images its maps on the host, a list of (batch_size, D, h, w) float32.

    A GPU has its work on the next load by then. On a CPU that decodes by itself the next load is decoded meanwhile, so that whatever
    is made of the maps runs beside that and not beside the backbone, each of whose layers would wait for the thread that lost its core.
    """
    waiting = []
    for images in loaded:
        if isinstance(images, Unreadable):
            if waiting:  # perhaps the last of a part
                yield [maps.arrived() for maps in waiting]
            raise UserError(images)
        sent = [Sent(backbone(batch)) for batch in images.split(batch_size)]
        if waiting:
            yield [maps.arrived() for maps in waiting]
        waiting = sent
    if waiting:
        yield [maps.arrived() for maps in waiting]


def hand_over(loads, ahead: int, make, writer: ThreadPoolExecutor) -> Future:
    """Have `make(iterator)` use up the batches of `loads` in the thread of `writer`, at most `ahead` behind: the backbone does not wait for the disk.

    Returns what becomes of `make`, which may still be at work. Raises what it raised, if it ended early.
    """
    handed = Queue(ahead)

    def received():
        while (load := handed.get()) is not None:
            yield from load

    made = writer.submit(make, received())

    def put(item):
        while not made.done():
            with contextlib.suppress(Full):
                return handed.put(item, timeout=1)
        made.result()

    try:
        for load in loads:
            put(load)
    finally:
        put(None)
    return made


def extract(backbone: Backbone, images: Images, parts: Parts, options) -> float:
    """Run this rank's share of the images through the backbone into parts. Returns images per second."""
    todo = parts.missing(*rank_of_ranks())
    at_once = options.batch_size * (1 if options.num_workers or backbone.device.type == "cuda" else DECODED_AT_ONCE)
    ahead = max(1, AHEAD * options.batch_size // at_once)
    loads = [list(parts.rows(start))[at:at + at_once] for start in todo for at in range(0, len(parts.rows(start)), at_once)]
    loader = DataLoader(images, batch_sampler=loads, num_workers=options.num_workers, collate_fn=collate,
                        pin_memory=backbone.device.type == "cuda", prefetch_factor=4 if options.num_workers else None)
    count, began = sum(map(len, loads)), time.perf_counter()
    if count < len(images):
        print(f"{len(images) - count} of {len(images)} images are done already"
              + (", or another rank's" if rank_of_ranks()[1] > 1 else ""))
    with tqdm(total=count, desc="feature maps", unit="image", disable=None) as bar, ThreadPoolExecutor(max_workers=1) as writer:
        maps, made = forward(backbone, loader, options.batch_size), deque()
        try:
            for start in todo:
                while made and (len(made) > 1 or made[0].done()):
                    made.popleft().result()
                loads_of_part = -(-len(parts.rows(start)) // at_once)
                made.append(hand_over(progressing(bar, maps, loads_of_part), ahead, partial(parts.make, start), writer))
            while made:
                made.popleft().result()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(f"a decoding process was killed ({error}): is memory short? Run again with fewer --num_workers") from None
    return count / (time.perf_counter() - began)


def progressing(bar: tqdm, maps, loads: int):
    """The maps of the next `loads` loads, counted on the bar."""
    for load in islice(maps, loads):
        yield load
        bar.update(sum(map(len, load)))


def rank_of_ranks() -> tuple[int, int]:
    """(rank, number of ranks) as `torchrun` tells them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def device_of_rank() -> str | None:
    """The GPU of this rank under `torchrun`, None where there is no choice to make."""
    if "LOCAL_RANK" not in os.environ or not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


@contextlib.contextmanager
def sole_job(output: Path):
    """Hold the output's lock, rank 0 of a `torchrun` for all its ranks. Raises UserError if another job is making the same file."""
    rank, ranks = rank_of_ranks()
    if ranks > 1:
        distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    with locked(output.with_name(f".{output.name}.lock"), f"making {output}") if rank == 0 else contextlib.nullcontext():
        yield
    if ranks > 1:
        distributed.destroy_process_group()


def wait_for_all_ranks():
    """Return once every rank has come here; they may be hours apart. Raises UserError if one ended before."""
    if rank_of_ranks()[1] > 1:
        try:
            distributed.barrier()
        except RuntimeError:
            raise UserError("another rank ended before its work was done: see what it said, and run again") from None


def default_workers(device: torch.device) -> int:
    """Decoding processes: up to 8 beside a GPU, a fourth of the cores beside a CPU, which needs them itself.

    The ranks of a `torchrun` on one machine share its cores.
    """
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, max(cores, 1) if device.type == "cuda" else cores // 4)


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
    pixels = Pixels(options.backbone, options.normalization)
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

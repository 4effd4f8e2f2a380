"""The stages of feature files, and the backbone that makes their maps."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stages import Stage
from preprocessing import Backbone
from scegg.features.backbones import OFFLINE, build_backbone, fold
from scegg.features.feature_file import FILTERS, create_maps, read_maps
from scegg.features.images import PixelNormalization
from scegg.features.parts import MapWriter


def file_stages(maps: np.ndarray, folder: Path) -> list[Stage]:
    """Feature maps (n, D, h, w) into and out of an HDF5 file, plain and compressed."""
    pool = ThreadPoolExecutor(os.cpu_count())
    stages = []
    for compression in FILTERS:
        path = folder / f"{compression}.hdf5"
        write = partial(write_file, path, maps, compression, pool)
        read = partial(read_file, path, len(maps))
        for name, call in (("write", write), ("read", read)):
            title = f"HDF5 {name}, {compression or 'plain'}"
            stages.append(Stage(title, call, "image", len(maps), bytes=float(maps.nbytes)))
    return stages


def write_file(path: Path, maps: np.ndarray, compression: str | None, pool: ThreadPoolExecutor):
    """Write maps as preprocessing does."""
    with h5py.File(path, "w") as file:
        writer = MapWriter(create_maps(file, maps.shape, compression), compression, pool)
        writer.write(maps)
        writer.drain(keep=0)


def read_file(path: Path, count: int):
    """Read the first `count` maps of a file as training does."""
    with h5py.File(path) as file:
        dataset = file["feature_map"]
        maps = np.empty((count, *dataset.shape[1:]), np.float32)
        read_maps(dataset, np.arange(count), maps)


def backbone_stage(device: torch.device, img_size: int) -> Stage:
    """The offline backbone's forward pass, images already on the device."""
    at_once = images_at_once(device)
    network = fold(build_backbone(OFFLINE, None, img_size)[0])
    backbone = Backbone(PixelNormalization(OFFLINE), network, device, torch.float32, at_once)
    shape = (at_once, 3, img_size, img_size)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)

    def run():
        with torch.inference_mode():
            backbone(images)

    with FlopCounterMode(display=False) as counter:
        run()
    flop = counter.get_total_flops()
    return Stage(f"backbone forward, {img_size} px", run, "image", at_once, flop)


def images_at_once(device: torch.device) -> int:
    """Images of a forward pass of the backbone."""
    return 64 if device.type == "cuda" else 4

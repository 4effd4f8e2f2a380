"""Part e: preprocessing, everything beside the bare backbone, in float32 and bfloat16."""

from functools import partial
from pathlib import Path

import torch
from torchvision import models

from benchmarks.gpu.parts import Job
from benchmarks.machine import Timer
from benchmarks.preprocessing import IMAGES, BackboneChoice, PreprocessingBench
from scegg.datasets import toy
from scegg.speed.allocator import keep_freed_memory
from util import UserError, pick_device

BACKBONE, SMALL_BACKBONE = "resnet101", "resnet18"
AT_MOST = 10.0  # seconds that the repeats may take


def run(job: Job):
    """Time photographs on their way to a file; the backbone's weights are random."""
    keep_freed_memory()
    device = pick_device(None)
    paths = find_photographs(job)
    job.add(photographs=len(paths), of="TOY, 224 px" if job.photographs is None else "your folder")
    backbone, img_size = (SMALL_BACKBONE, 64) if job.small else (BACKBONE, 448)
    weights = random_weights(backbone, job.folder / "random.pth")

    for precision in (torch.float32, torch.bfloat16):
        choice = BackboneChoice(backbone, weights, img_size, precision)
        bench = PreprocessingBench(paths, choice, device, job.folder)
        calls = {
            "bare backbone": partial(bench.forward, bench.bare),
            "decoding in one process": bench.decode,
            "everything, uncompressed": partial(bench.whole, None),
            "everything, gzip": partial(bench.whole, "gzip"),
        }
        repeats = 1 if job.small else 3
        seconds = Timer(device).medians(list(calls.values()), repeats, AT_MOST)
        speeds = [len(paths) / one for one in seconds]
        for name, speed in zip(calls, speeds, strict=True):
            job.add(
                backbone=f"{backbone}, {img_size} px",
                precision=str(precision).removeprefix("torch."),
                what=name,
                **{"images/s": speed, "of the bare backbone, %": 100 * speed / speeds[0]},
            )


def find_photographs(job: Job) -> list[Path]:
    """The first photographs of the folder asked for, else of TOY, rendered now."""
    count = 5 if job.small else IMAGES
    folder = job.photographs
    if folder is None:
        folder = job.folder / "data"
        folder.mkdir()
        each = 5 if job.small else 40
        toy.render(folder, classes=-(-count // each) + 4, images_per_class=each, unseen=1)

    paths = sorted(path for kind in ("jpg", "jpeg", "png") for path in folder.rglob(f"*.{kind}"))
    if not paths:
        raise UserError(f"--photographs {folder}: there are no .jpg, .jpeg or .png below it")
    return paths[:count]


def random_weights(backbone: str, path: Path) -> Path:
    """A state dict of a network as torchvision initialises it."""
    torch.manual_seed(0)
    torch.save(models.get_model(backbone, weights=None).state_dict(), path)
    return path

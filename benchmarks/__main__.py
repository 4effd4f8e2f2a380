"""How fast every stage is, what it must compute, and how near that comes to the machine's limits.

    python -m benchmarks --size CUB                      made-up tensors of the paper's sizes
    python -m benchmarks --size CUB --against plain      beside scegg/method/plain.py, with ratios
    python -m benchmarks --features FILE.hdf5            the maps and sizes of a real feature file
    python -m benchmarks --preprocess data               images a second of preprocessing.py
    python -m benchmarks --stream 256                    memory of training from a large file
    python -m benchmarks --whole train_joint_CUB.py --wandb disabled    a whole run, by stages
    python -m benchmarks --shared --size SUN --stages "SCEN step"       beside another program

Times are medians after a warm-up. FLOP and bytes are what the method cannot do without, a
multiply-add being 2 FLOP. The machine's rates of a large product and of a large copy give the
least time for them, whichever is longer. *Of ceiling* is that time's share of the time taken. It
says little of files, where the disk and the compression decide.

The transcription takes turns with our code in one process, so that it has our settings of the
allocator. It runs with torch's default optimisers and products.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from benchmarks.flop import SIZES
from benchmarks.preprocessing import IMAGES, preprocessing_run
from benchmarks.shared_machine import run_slices, shared_machine_run
from benchmarks.table import stage_table
from benchmarks.whole_runs import stream_run, whole_run
from scegg.config import CONFIG_FOLDER
from scegg.features.backbones import OFFLINE
from scegg.speed.allocator import keep_freed_memory
from util import FlagParser, exit_on_user_error, pick_device, write_text


def parse_arguments(argv=None) -> argparse.Namespace:
    """The command line's options."""
    parser = FlagParser("Time every stage.")
    add = parser.add_argument
    add("--size", choices=SIZES, default="CUB", help="made-up tensors of a dataset's dimensions")
    add("--features", type=Path, help="the dimensions and feature maps of this file instead")
    add("--config", type=Path, default=CONFIG_FOLDER / "sun_gzsl.yaml")
    add("--matmul_precision", choices=("highest", "high", "medium"), default="highest")
    add("--batch_size", type=int, help="B (default: the paper's 64; 40 on AWA2)")
    add("--against", choices=("plain",), help="time the plain transcription beside it")
    add("--stages", default="", help="only the stages whose name holds this text")
    add("--repeats", type=int, default=5)
    add("--device", help="cpu, cuda or a GPU's number (default: CUDA if there is one)")
    add("--json", type=Path, help="write the records here")

    helps = "measure the memory of training from a file of AWA2's 37,322 images at D channels "
    helps += "(7.5 GB at 256, and as much again for trainval's cache)"
    add("--stream", type=int, metavar="D", help=helps)
    helps = "measure preprocessing of CUB's first images there"
    add("--preprocess", type=Path, metavar="DATA_ROOT", help=helps)
    add("--images", type=int, default=IMAGES, help="so many images of --preprocess")
    add("--backbone", default=OFFLINE, help="the network of --preprocess")
    add("--weights", type=Path, help="a local state dict for it")
    helps = "a training command to run and account for"
    add("--whole", nargs=argparse.REMAINDER, help=helps)
    helps = "flags that choose one stage, to run alone and beside another program"
    add("--shared", nargs=argparse.REMAINDER, help=helps)
    helps = "for --shared: run a stage for as many seconds as each line of stdin says"
    add("--slices", action="store_true", help=helps)
    return parser.parse_args(argv)


def main(argv=None):
    options = parse_arguments(argv)
    keep_freed_memory()
    device = pick_device(options.device)
    torch.set_float32_matmul_precision(options.matmul_precision)
    if options.slices:
        run_slices(options, device)
        return

    if options.whole or options.shared or options.stream or options.preprocess:
        with tempfile.TemporaryDirectory() as folder:
            records = [special_run(options, device, Path(folder))]
        print(json.dumps(records[0], indent=2))
    else:
        records = stage_table(options, device)

    if options.json:
        write_text(options.json, json.dumps(records, indent=2) + "\n")


def special_run(options, device: torch.device, folder: Path) -> dict:
    """The record of what is asked for instead of the table."""
    if options.whole:
        return whole_run(options.whole)
    if options.shared:
        return shared_machine_run(options.shared, folder)
    if options.stream:
        return stream_run(options.stream, folder)
    return preprocessing_run(options, device, folder)


if __name__ == "__main__":
    exit_on_user_error(main)

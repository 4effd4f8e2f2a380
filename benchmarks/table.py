"""Measure the stages, and print a line for each."""

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.evaluation import evaluation_stage
from benchmarks.files import backbone_stage, file_stages
from benchmarks.flop import SIZES, Size
from benchmarks.machine import Ceilings, Timer, as_in_training, device_name, measure_ceilings
from benchmarks.stages import Stage, Workbench
from benchmarks.training import training_stages
from scegg.config import read_config
from scegg.features.reader import Features, open_features

FILE_IMAGES = 32  # of the stages of files


def stage_table(options, device: torch.device) -> list[dict]:
    """Measure and print the stages that the command line's options ask for; their records."""
    timer = Timer(device)
    with tempfile.TemporaryDirectory() as folder:
        size, stages = chosen_stages(options, device, Path(folder))
        ceilings = measure_ceilings(device, timer)
        print_machine(device, ceilings, size)
        print_header(bool(options.against))

        records = [machine_record(device, ceilings, size)]
        for record in measure(stages, device, timer, options.repeats, ceilings):
            print_record(record)
            records.append(record)
    return records


def chosen_stages(options, device: torch.device, folder: Path) -> tuple[Size, list[Stage]]:
    """The dimensions, and the stages that the options choose; folder: for their files."""
    size, raw = inputs(options)
    bench = Workbench(size, read_config(options.config, {}), device, raw)
    stages = all_stages(bench, raw, folder, bool(options.against))
    return size, [stage for stage in stages if options.stages in stage.name]


def inputs(options) -> tuple[Size, torch.Tensor]:
    """The dimensions to measure, and feature maps (n, D, h, w): a file's, or made-up ones."""
    size, features = SIZES[options.size], None
    if options.features:
        features = open_features(options.features)
        size = size_of(features, size.B)
    size = dataclasses.replace(size, B=options.batch_size or size.B)

    images = max(size.B, FILE_IMAGES)
    if features:
        return size, features.raw(features.split.trainval[:images])
    shape = (images, size.D, size.side, size.side)
    maps = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return size, torch.from_numpy(np.maximum(maps, 0))


def size_of(features: Features, batch: int) -> Size:
    """The dimensions of a feature file."""
    split, (channels, side, _) = features.split, features.shape

    return Size(
        B=batch,
        K=split.att.shape[1],
        C=len(split.att),
        Cs=len(split.seen),
        D=channels,
        side=side,
        d_v=features.w2v.shape[1],
        trainval=len(split.trainval),
        test=len(split.test_seen) + len(split.test_unseen),
    )


def all_stages(
    bench: Workbench, raw: torch.Tensor, folder: Path, against_plain: bool
) -> list[Stage]:
    """The stages in the order of a run; folder: for the files."""
    return [
        backbone_stage(bench.device, 448),
        *file_stages(raw[:FILE_IMAGES].numpy(), folder),
        *training_stages(bench, against_plain),
        evaluation_stage(bench, against_plain),
    ]


def measure(
    stages: list[Stage],
    device: torch.device,
    timer: Timer,
    repeats: int,
    ceilings: Ceilings,
    at_most: float = 30,
) -> Iterator[dict]:
    """Yield a record for each stage. at_most: seconds that its repeats may take."""
    for stage in stages:
        calls = [as_in_training(stage.run, device)]
        if stage.plain:
            calls.append(stage.plain)
        ours, *plain = timer.medians(calls, repeats, at_most)

        at_least = max(stage.flop / ceilings.matmul, stage.bytes / ceilings.copy)
        record = {
            "stage": stage.name,
            "seconds": ours,
            "rate": stage.units / ours,
            "unit": stage.unit,
            "peak_gb": timer.peak_gb(calls[0]),
            "gflop": stage.flop / 1e9,
            "gbyte": stage.bytes / 1e9,
            "of_ceiling": at_least / ours,
        }
        for seconds in plain:
            # the key of the records in docs/records, where the transcription was called literal
            record |= {"literal_seconds": seconds, "ratio": seconds / ours}
        yield record


def machine_record(device: torch.device, ceilings: Ceilings, size: Size) -> dict:
    """The record of the machine and of the dimensions."""
    return {
        "stage": "ceilings",
        "device": device_name(device),
        "torch": torch.__version__,
        "matmul_flops": ceilings.matmul,
        "copy_bytes": ceilings.copy,
        "size": dataclasses.asdict(size),
    }


def print_machine(device: torch.device, ceilings: Ceilings, size: Size):
    """Print what the machine can do, and the dimensions."""
    matmul, copy = ceilings.matmul / 1e9, ceilings.copy / 1e9
    rates = f"matmul {matmul:,.0f} GFLOP/s, copy {copy:.1f} GB/s"
    print(f"{device_name(device)}, torch {torch.__version__}: {rates}\n{size}")


def print_header(against_plain: bool):
    """Print the columns' names."""
    header = f"{'stage':<38}{'ms':>10}{'units/s':>16}{'GFLOP':>9}{'GB':>8}"
    header += f"{'peak GB':>9}{'of ceiling':>11}"
    if against_plain:
        header += f"{'plain ms':>12}{'ratio':>8}"
    print(header)


def print_record(record: dict):
    """Print the line of a stage."""
    peak = "-" if record["peak_gb"] is None else f"{record['peak_gb']:.2f}"
    line = f"{record['stage']:<38}{record['seconds'] * 1e3:>10.2f}"
    line += f"{record['rate']:>10.1f} {record['unit']:<5}"
    line += f"{record['gflop']:>9.2f}{record['gbyte']:>8.3f}{peak:>9}{record['of_ceiling']:>11.0%}"
    if "ratio" in record:
        line += f"{record['literal_seconds'] * 1e3:>12.2f}{record['ratio']:>7.1f}x"
    print(line, flush=True)

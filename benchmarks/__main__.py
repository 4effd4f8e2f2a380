"""How fast every stage is, what it must compute, and how near that comes to what this machine can do.

    python -m benchmarks --size CUB                      synthetic tensors of the paper's sizes
    python -m benchmarks --size CUB --against literal    and the ratio to a plain transcription, alternating in one process
    python -m benchmarks --features data/CUB/feature_map_efficientnet_lite2_CUB.hdf5    a real feature file
    python -m benchmarks --whole train_joint_CUB.py --backbone efficientnet_lite2 --wandb disabled   a whole run, stage by stage

Times are medians after a warm-up. FLOP and bytes are what the method cannot do without (2 FLOP a multiply-add). *Of ceiling* is
the time that they take at this machine's measured rates of a large matmul or a large copy, whichever is longer, as a share of the
time taken; of files, the disk's and the compression's speed decide, so that it says little. The transcription runs with torch's default
optimisers and products, and in this process, so that it has the same settings of the allocator as ours.
"""
import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Callable

import h5py
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from scegg.features.backbones import OFFLINE, build_backbone, fold
from scegg.features.extract import DECODED_AT_ONCE, Backbone, default_workers, extract
from scegg.features.feature_file import FILTERS, create_maps, read_maps
from scegg.features.images import Images, PixelNormalization, collate, image_transform
from scegg.config import CONFIG_FOLDER, read_config
from scegg.features.reader import Features, normalize_positions, open_features
from scegg.method.eggn import EGGN
from scegg.method.evaluation import evaluate
from benchmarks.flop import SIZES, Size, critic_flop, generator_flop, linear_flop, scen_flop
from scegg.speed.cuda_graphs import WARM_UP, graphed
from model import SCEN, global_classifier
from scegg.speed.onednn import fast_matmul
from scegg.method.embeddings import Embedding
from scegg.method.losses import classifier_step
from scegg.method.scen import rmsprop, scen_step
from scegg.speed.allocator import keep_freed_memory
from util import FlagParser, exit_on_user_error, pick_device, write_text
from scegg.features.parts import MapWriter, Parts
from scegg.datasets.xlsa17 import read_dataset


@dataclasses.dataclass
class Stage:
    """Something to time: `run()` does `units` of `unit`, needing `flop` and moving `bytes`; `literal` is the oracle's way."""
    name: str
    run: Callable
    unit: str
    units: int = 1
    flop: float = 0.0
    bytes: float = 0.0
    literal: Callable | None = None


class Timer:
    """Seconds and peak memory of a call on a device: CUDA events, or the clock; device or resident memory."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def seconds(self, call: Callable) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_gb(self, call: Callable) -> float | None:
        """Peak memory while `call` runs; None where the system does not tell."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            call()
            return torch.cuda.max_memory_allocated() / 1e9
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            call()
            status = Path("/proc/self/status").read_text()
            return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / 1e9
        call()
        return None

    def medians(self, calls: list[Callable], repeats: int, at_most: float = 30) -> list[float]:
        """Median seconds of each call, the calls taking turns so that drift of the machine meets all alike.

        What would take longer than `at_most` seconds in all is repeated less often, down to once after its warm-up.
        """
        warm_up = sum(self.seconds(call) for call in calls)
        repeats = min(repeats, max(1, int(at_most / warm_up)))
        rounds = [[self.seconds(call) for call in calls] for _ in range(repeats)]
        return [statistics.median(times) for times in zip(*rounds)]


def ceilings(device: torch.device, timer: Timer) -> tuple[float, float]:
    """(FLOP/s of a large float32 matmul as configured, bytes/s of a large copy, read and written)."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    source = torch.randn(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    matmul, copy = timer.medians([ours(lambda: a @ b, device), lambda: target.copy_(source)], 7)
    return 2 * n**3 / matmul, 2 * source.numel() * 4 / copy


class Workbench:
    """The tensors and networks that the training stages need, of one size, on one device."""

    def __init__(self, s: Size, config, device: torch.device, raw: torch.Tensor):
        torch.manual_seed(0)
        self.s, self.config, self.device = s, config, device
        rand = lambda *shape: torch.rand(*shape, device=device)
        self.raw = raw[:s.B].to(device)
        self.maps = normalize_positions(self.raw)
        self.att = rand(s.C, s.K)
        self.seen, self.unseen = torch.arange(s.Cs, device=device), torch.arange(s.Cs, s.C, device=device)
        self.labels = self.seen[torch.randint(s.Cs, (s.B,), device=device)]
        self.scen = SCEN(torch.randn(s.K, s.d_v), self.att.cpu(), s.D).to(device)
        self.optimizer = rmsprop(self.scen.parameters(), config.scen_lr, config)
        self.guide = global_classifier(s.D, config.distill_hidden, s.C).to(device)
        self.T = config.critic_iter
        self.x, self.y = rand(self.T + 1, s.B, s.D), self.seen[torch.randint(s.Cs, (self.T + 1, s.B), device=device)]
        self.S = rand(s.B, s.C)
        self.draws = dict(eps=torch.randn(self.T + 1, s.B, s.K, device=device), alpha=rand(self.T, s.B, 1),
                          noise=torch.randn(s.B, s.K, device=device),
                          unseen=self.unseen[torch.randint(len(self.unseen), (s.B,), device=device)])
        self.eggn = EGGN(s.D, self.att, self.guide, config).to(device)
        self.scen.gen.scaler.fit(self.scen.embed(self.maps)[0])


def as_trained(step, network, optimizers, *inputs) -> Callable:
    """A call of a step as training makes it: on CUDA of its graph, which is captured here."""
    step = graphed(step, network, optimizers)
    for _ in range(WARM_UP + 1 if inputs[0].is_cuda else 0):  # the last one is captured
        step(*inputs)
    return partial(step, *inputs)


def training_stages(bench: Workbench, literal) -> list[Stage]:
    """The stages of training; `literal` is the oracle module, or None."""
    s, config, eggn, draws, scen = bench.s, bench.config, bench.eggn, bench.draws, bench.scen
    T, R = bench.T, s.side**2
    distilled = global_classifier(s.D, config.distill_hidden, s.C).to(bench.device)
    distill_optimizer = rmsprop(distilled.parameters(), config.scen_lr, config)
    maps_bytes = s.B * R * s.D * 4.0
    if literal:
        plain_eggn = literal.use_plain_adam(EGGN(s.D, bench.att, bench.guide, config).to(bench.device))
        scen_optimizer, plain_distill_optimizer = literal.rmsprop(scen, config), literal.rmsprop(distilled, config)

    def literal_scen():
        local, globally = literal.scen_losses(scen, bench.raw, bench.labels, bench.seen)
        scen_optimizer.zero_grad()
        (local + globally).backward()
        scen_optimizer.step()

    def critic():
        eggn.critic_steps(bench.x[:T], bench.y[:T], draws["eps"][:T], draws["alpha"], False)

    def literal_critic(encode):
        for t in range(T):
            x = literal.dense_features(scen, bench.raw)[0].clamp(0, 1) if encode else bench.x[t]
            literal.critic_step(plain_eggn, x, bench.y[t], draws["eps"][t], draws["alpha"][t], False)

    def generator(step, encode=False):
        x = literal.dense_features(scen, bench.raw)[0].clamp(0, 1) if encode else bench.x[T]
        step(x, bench.y[T], draws["eps"][T], draws["unseen"], draws["noise"], False)

    def literal_iteration(encode):
        literal_critic(encode)
        generator(literal_generator, encode)

    whole_draw = (bench.x[:T], bench.y[:T], draws["eps"][:T], draws["alpha"], bench.x[T], bench.y[T], draws["eps"][T], draws["unseen"], draws["noise"])
    iterate = as_trained(partial(eggn.iterate, feedback=False), eggn, eggn.optimizers.values(), *whole_draw)
    distill = as_trained(partial(classifier_step, distilled, distill_optimizer), distilled, [distill_optimizer], bench.x[0], bench.S)
    oracle = lambda call: call if literal else None
    critic_rows = dict(unit="step", units=T, flop=T * critic_flop(s, config), bytes=T * 28.0 * s.D * (config.ndh + config.ngh))
    generator_rows = dict(unit="step", flop=generator_flop(s, config), bytes=28.0 * s.D * 3 * config.ngh)
    literal_generator = lambda *draw: literal.generator_step(plain_eggn, *draw)
    iteration_rows = dict(unit="step", flop=critic_rows["flop"] + generator_rows["flop"], bytes=critic_rows["bytes"] + generator_rows["bytes"])
    return [
        Stage("SCEN step", lambda: scen_step(scen, bench.optimizer, bench.maps, bench.labels, bench.seen, config), "image", s.B,
              scen_flop(s), 4 * maps_bytes, oracle(literal_scen)),
        Stage("dense-feature pass", lambda: scen.embed(bench.maps), "image", s.B,
              linear_flop(s.B * R, s.D, 2 * s.K, 1) + linear_flop(s.B, R, s.D, 1), 2 * maps_bytes,
              oracle(lambda: literal.dense_features(scen, bench.raw))),
        Stage("distillation step", distill, "step", 1,
              linear_flop(s.B, s.D, config.distill_hidden, 2) + linear_flop(s.B, config.distill_hidden, s.C, 3),
              36.0 * s.D * config.distill_hidden,
              oracle(lambda: classifier_step(distilled, plain_distill_optimizer, *literal.dense_features(scen, bench.raw)))),
        Stage("critic steps, cached features", critic, literal=oracle(lambda: literal_critic(False)), **critic_rows),
        Stage("critic steps, re-encoding counted", critic, literal=oracle(lambda: literal_critic(True)), **critic_rows),
        Stage("generator step, cached features", lambda: generator(eggn.generator_step),
              literal=oracle(lambda: generator(literal_generator)), **generator_rows),
        Stage("generator step, re-encoding counted", lambda: generator(eggn.generator_step),
              literal=oracle(lambda: generator(literal_generator, True)), **generator_rows),
        Stage("EGGN iteration, cached features", iterate, literal=oracle(lambda: literal_iteration(False)), **iteration_rows),
        Stage("EGGN iteration, re-encoding counted", iterate, literal=oracle(lambda: literal_iteration(True)), **iteration_rows),
    ]


def evaluation_stage(bench: Workbench, literal) -> Stage:
    """Both softmax classifiers, synthesis included."""
    s, config, device = bench.s, bench.config, bench.device

    def embedding(n, classes):
        return Embedding(torch.rand(n, s.D, device=device), torch.empty(0), classes[torch.randint(len(classes), (n,), device=device)])

    splits = {"trainval": embedding(s.trainval, bench.seen), "test_seen": embedding(s.test // 2, bench.seen),
              "test_unseen": embedding(s.test // 2, bench.unseen)}
    synthetic, g = len(bench.unseen) * config.syn_num, config.ngh
    d = s.D + s.K + g
    flop = config.classifier_epochs * (linear_flop(s.trainval + synthetic, d, s.C, 2) + linear_flop(s.test, d, s.C, 1)
                                       + linear_flop(synthetic, d, len(bench.unseen), 2))
    flop += linear_flop(synthetic, 2 * s.K, g, 1) + linear_flop(synthetic, g, s.D, 1)
    flop += linear_flop(s.trainval + s.test + synthetic, s.D, g, 1) + linear_flop(s.trainval + s.test + synthetic, g, s.K, 1)
    oracle = (lambda: literal.evaluate(bench.eggn, splits, bench.unseen, config)) if literal else None
    return Stage("evaluation, both classifiers", lambda: evaluate(bench.eggn, splits, bench.unseen, config), "epoch",
                 config.classifier_epochs, flop, config.classifier_epochs * (s.trainval + 2 * synthetic) * d * 12.0, oracle)


def file_stages(maps: np.ndarray, folder: Path) -> list[Stage]:
    """Feature maps (n, D, h, w) into and out of an HDF5 file, plain and compressed."""
    count, pool = len(maps), ThreadPoolExecutor(os.cpu_count())

    def write(compression):
        with h5py.File(folder / f"{compression}.hdf5", "w") as file:
            writer = MapWriter(create_maps(file, maps.shape, compression), compression, pool)
            writer.write(maps)
            writer.drain(keep=0)

    def read(compression):
        with h5py.File(folder / f"{compression}.hdf5") as file:
            read_maps(file["feature_map"], np.arange(count), np.empty_like(maps))

    return [Stage(f"HDF5 {name}, {compression or 'plain'}", partial(call, compression), "image", count, bytes=float(maps.nbytes))
            for compression in FILTERS for name, call in (("write", write), ("read", read))]


def backbone_stage(device: torch.device, img_size: int) -> Stage:
    """The offline backbone's forward pass, images already on the device."""
    at_once = 4 if device.type == "cpu" else 64
    backbone = Backbone(PixelNormalization(OFFLINE), fold(build_backbone(OFFLINE, None, img_size)[0]), device, torch.float32, at_once)
    images = torch.randint(256, (at_once, 3, img_size, img_size), dtype=torch.uint8, device=device)

    def run():
        with torch.inference_mode():
            backbone(images)

    with FlopCounterMode(display=False) as counter:
        run()
    return Stage(f"backbone forward, {img_size} px", run, "image", len(images), counter.get_total_flops())


def size_of(features: Features, batch: int) -> Size:
    """The dimensions of a feature file."""
    split, (D, side, _) = features.split, features.shape
    return Size(batch, split.att.shape[1], len(split.att), len(split.seen), D, side, features.w2v.shape[1], len(split.trainval),
                len(split.test_seen) + len(split.test_unseen))


def ours(call: Callable, device: torch.device) -> Callable:
    """The call as training makes it: with the products that suit the device."""
    def run():
        with fast_matmul(device):
            call()
    return run


def measure(stages: list[Stage], device: torch.device, timer: Timer, repeats: int, matmul: float, copy: float):
    """Yield a record a stage; matmul (FLOP/s) and copy (bytes/s) are the machine's ceilings."""
    for stage in stages:
        calls = [ours(stage.run, device)] + ([stage.literal] if stage.literal else [])
        seconds = timer.medians(calls, repeats)
        record = {"stage": stage.name, "seconds": seconds[0], "rate": stage.units / seconds[0], "unit": stage.unit,
                  "peak_gb": timer.peak_gb(calls[0]), "gflop": stage.flop / 1e9, "gbyte": stage.bytes / 1e9,
                  "of_ceiling": max(stage.flop / matmul, stage.bytes / copy) / seconds[0]}
        if stage.literal:
            record |= {"literal_seconds": seconds[1], "ratio": seconds[1] / seconds[0]}
        yield record


def print_header(against: bool):
    print(f"{'stage':<38}{'ms':>10}{'units/s':>16}{'GFLOP':>9}{'GB':>8}{'peak GB':>9}{'of ceiling':>11}"
          + (f"{'literal ms':>12}{'ratio':>8}" if against else ""))


def print_record(record: dict):
    optional = lambda value, form: format(value, form) if value is not None else "-"
    line = (f"{record['stage']:<38}{record['seconds'] * 1e3:>10.2f}{record['rate']:>10.1f} {record['unit']:<5}"
            f"{record['gflop']:>9.2f}{record['gbyte']:>8.3f}{optional(record['peak_gb'], '.2f'):>9}"
            f"{record['of_ceiling']:>11.0%}")
    print(line + (f"{record['literal_seconds'] * 1e3:>12.2f}{record['ratio']:>7.1f}x" if "ratio" in record else ""), flush=True)


def whole_run(command: list[str]) -> dict:
    """Run a training script in a folder of its own and return its summary's seconds and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *command, "--runs", folder])
        if done.returncode:
            sys.exit(done.returncode)
        seconds = time.perf_counter() - start
        summary, = (json.loads(path.read_text()) for path in Path(folder).glob("*/summary.json"))
    keys = ("seconds", "peak_ram_gb", "peak_gpu_gb", "device", "best_H", "best_acc_zs")
    return {"stage": "whole run", "wall_seconds": seconds} | {key: summary[key] for key in keys if key in summary}


def preprocessing_run(options, device: torch.device, folder: Path, images: int = 512) -> dict:
    """preprocessing.py's way from CUB's photographs to the file, uncompressed and gzip, beside the bare backbone on decoded images.

    The bare backbone is timed as preprocessing.py runs it (batch normalisation and padding folded) and as its package gives it.
    """
    backbones, at_once = {}, 64 if device.type == "cuda" else 4
    for name in ("packaged", "bare"):
        network, provenance = build_backbone(options.backbone, options.weights, 448)
        network = fold(network) if name == "bare" else network
        backbones[name] = Backbone(PixelNormalization(options.backbone), network, device, torch.float32, at_once)
    loading = argparse.Namespace(batch_size=at_once, num_workers=default_workers(device))
    paths = [options.preprocess / "CUB" / tail for tail in read_dataset(options.preprocess, "CUB")[2][:images]]
    photographs = Images(paths, image_transform(448), loading.num_workers)
    decoded = [collate(photographs.__getitems__(piece)) for piece in torch.arange(images).split(at_once)]
    if device.type == "cuda":  # as the loader hands them over
        decoded = [batch.pin_memory() for batch in decoded]

    def forward(name):
        with torch.inference_mode():
            for batch in decoded:
                maps = backbones[name](batch)
            maps.cpu()

    def decode():
        for piece in torch.arange(images).split(at_once * DECODED_AT_ONCE):
            collate(photographs.__getitems__(piece))

    def whole(compression):
        parts = Parts(folder / f"{next(number)}.hdf5", photographs.paths, compression, {})
        extract(backbones["bare"], photographs, parts, loading)
        parts.join(lambda file: None)

    number = itertools.count()  # a file of its own each time: removing the last one is no work of preprocessing's
    calls = {"packaged_backbone": partial(forward, "packaged"), "bare_backbone": partial(forward, "bare"), "decoding_in_one_process": decode,
             "uncompressed": partial(whole, None), "gzip": partial(whole, "gzip")}
    speeds = {name: images / seconds for name, seconds in zip(calls, Timer(device).medians(list(calls.values()), 3, at_most=300))}
    return {"stage": "preprocessing, images/s", "backbone": options.backbone, "weights": provenance["weights"]} | speeds | {
        f"{name}_of_{bare}": speeds[name] / speeds[f"{bare}_backbone"] for name in ("uncompressed", "gzip") for bare in ("bare", "packaged")}


def stream_run(D: int, folder: Path) -> dict:
    """Train SCEN on a file with AWA2's 37,322 images at D channels from the cache file; resident memory must not grow with it."""
    N, C, K, s = 37322, 50, 85, SIZES["AWA2"]
    rng, path = np.random.default_rng(0), folder / "stream.hdf5"
    labels, held_out = np.arange(N) % C, np.arange(N) // C % 5 == 0
    block = np.maximum(rng.standard_normal((256, D, s.side, s.side), dtype=np.float32), 0)
    att = rng.random((C, K))
    with h5py.File(path, "w") as file:
        maps = create_maps(file, (N, D, s.side, s.side), None)
        for start in range(0, N, len(block)):
            maps[start:start + len(block)] = block[:min(len(block), N - start)]
        for name, array in {"labels": labels, "att": att, "original_att": att, "w2v_att": rng.standard_normal((K, s.d_v)),
                            "trainval_loc": np.flatnonzero((labels < s.Cs) & ~held_out),
                            "test_seen_loc": np.flatnonzero((labels < s.Cs) & held_out),
                            "test_unseen_loc": np.flatnonzero(labels >= s.Cs)}.items():
            file[name] = array
    record = whole_run(["train_joint_AWA2.py", "--features", str(path), "--cache", "disk", "--scen_iterations", "100", "--distill_iterations", "1",
                        "--nepoch", "0", "--wandb", "disabled"])
    return record | {"stage": f"37,322 images at D = {D} from the disk cache", "file_gb": path.stat().st_size / 1e9}


def main(argv=None):
    parser = FlagParser("Time every stage.")
    parser.add_argument("--size", choices=SIZES, default="CUB", help="synthetic tensors of a dataset's dimensions")
    parser.add_argument("--features", type=Path, default=None, help="the dimensions and feature maps of this file instead")
    parser.add_argument("--config", type=Path, default=CONFIG_FOLDER / "sun_gzsl.yaml")
    parser.add_argument("--matmul_precision", choices=("highest", "high", "medium"), default="highest")
    parser.add_argument("--batch_size", type=int, default=None, help="B (default: the paper's 64; 40 on AWA2)")
    parser.add_argument("--against", choices=("literal",), default=None, help="time a plain transcription beside it")
    parser.add_argument("--stages", default="", help="only the stages whose name holds this text")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", type=Path, default=None, help="write the records here")
    parser.add_argument("--stream", type=int, default=None, metavar="D", help="measure the memory of training from a file of AWA2's "
                        "37,322 images at D channels (7.5 GB at 256, and as much again for trainval's cache)")
    parser.add_argument("--preprocess", type=Path, default=None, metavar="DATA_ROOT", help="measure preprocessing of CUB's first images there")
    parser.add_argument("--backbone", default=OFFLINE, help="the network of --preprocess")
    parser.add_argument("--weights", type=Path, default=None, help="a local state dict for it")
    parser.add_argument("--whole", nargs=argparse.REMAINDER, default=None, help="a training command to run and account for")
    options = parser.parse_args(argv)
    keep_freed_memory()
    device, timer = pick_device(options.device), Timer(pick_device(options.device))
    torch.set_float32_matmul_precision(options.matmul_precision)
    if options.whole or options.stream or options.preprocess:
        with tempfile.TemporaryDirectory() as folder:
            records = [whole_run(options.whole) if options.whole else stream_run(options.stream, Path(folder)) if options.stream
                       else preprocessing_run(options, device, Path(folder))]
        print(json.dumps(records[0], indent=2))
    else:
        records = stage_table(options, device, timer)
    if options.json:
        write_text(options.json, json.dumps(records, indent=2) + "\n")


def stage_table(options, device: torch.device, timer: Timer) -> list[dict]:
    """Measure and print the stages that `options` ask for."""
    literal = None
    if options.against:
        from scegg.method import plain as literal
    config = read_config(options.config, {})
    size = SIZES[options.size]
    features = open_features(options.features) if options.features else None
    size = size_of(features, size.B) if features else size
    size = dataclasses.replace(size, B=options.batch_size or size.B)
    rng, images = np.random.default_rng(0), max(size.B, 32)
    raw = (features.raw(features.split.trainval[:images]) if features
           else torch.from_numpy(np.maximum(rng.standard_normal((images, size.D, size.side, size.side), dtype=np.float32), 0)))
    matmul, copy = ceilings(device, timer)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}: matmul {matmul / 1e9:,.0f} GFLOP/s, copy {copy / 1e9:.1f} GB/s\n{size}")
    print_header(bool(options.against))
    records = [{"stage": "ceilings", "device": name, "torch": torch.__version__, "matmul_flops": matmul, "copy_bytes": copy,
                "size": dataclasses.asdict(size)}]
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(size, config, device, raw)
        stages = [backbone_stage(device, 448), *file_stages(raw[:32].numpy(), Path(folder)), *training_stages(bench, literal),
                  evaluation_stage(bench, literal)]
        for record in measure([stage for stage in stages if options.stages in stage.name], device, timer, options.repeats, matmul, copy):
            print_record(record)
            records.append(record)
    return records


if __name__ == "__main__":
    exit_on_user_error(main)

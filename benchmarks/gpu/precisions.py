"""Part b: the table of stages against the plain transcription, in each precision of products."""

import torch

from benchmarks.evaluation import evaluation_stage
from benchmarks.gpu.parts import Job
from benchmarks.gpu.small import config_of, size_of
from benchmarks.machine import Ceilings, Timer, device_name, measure_ceilings
from benchmarks.stages import Workbench
from benchmarks.table import measure
from benchmarks.training import training_stages
from util import pick_device

# what a config's matmul_precision allows torch
PRECISIONS = {"highest": "float32", "high": "TF32", "medium": "bfloat16 allowed"}
AT_MOST = 5.0  # seconds that the repeats of a stage may take


def run(job: Job):
    """Measure the stages of training and evaluation at CUB's sizes, made-up tensors."""
    device = pick_device(None)
    timer = Timer(device)
    for precision, name in PRECISIONS.items():
        torch.set_float32_matmul_precision(precision)
        ceilings = ceilings_of(job, device, timer)
        rates = {"TFLOP/s": ceilings.matmul / 1e12, "GB/s": ceilings.copy / 1e9}
        job.add(products=name, device=device_name(device), **rates)
        measure_stages(job, precision, device, timer, ceilings)


def ceilings_of(job: Job, device: torch.device, timer: Timer) -> Ceilings:
    """The card's rates of a large product and of a large copy; a token of them where small."""
    return Ceilings(1e9, 1e9) if job.small else measure_ceilings(device, timer)


def measure_stages(job: Job, precision: str, device, timer: Timer, ceilings: Ceilings):
    """Add a row for each stage."""
    config = config_of("CUB", job.small, matmul_precision=precision)
    size = size_of("CUB", job.small)
    raw = torch.rand(size.B, size.D, size.side, size.side)
    bench = Workbench(size, config, device, raw)
    stages = [*training_stages(bench, True), evaluation_stage(bench, True)]

    for record in measure(stages, device, timer, 1 if job.small else 5, ceilings, AT_MOST):
        job.add(
            **{
                "stage": record["stage"],
                "products": PRECISIONS[precision],
                "ms": record["seconds"] * 1e3,
                "GFLOP": record["gflop"],
                "GB": record["gbyte"],
                "peak GB": record["peak_gb"],
                "of ceiling, %": 100 * record["of_ceiling"],
                "plain, ms": record["literal_seconds"] * 1e3,
                "ratio": record["ratio"],
            }
        )

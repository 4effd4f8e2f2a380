"""What preprocessing waits for, its copies beside the backbone, and the compiled backbone."""

import contextlib
import time

import pytest
import torch

import preprocessing
from scegg.features.extract import Backbone, Copies, Waits, WriteBehind, compiled, forward
from scegg.features.images import PixelNormalization
from util import UserError

CPU = torch.device("cpu")


class Slow(torch.nn.Module):
    """A network that takes its time."""

    def __init__(self, seconds=0.0):
        super().__init__()
        self.seconds = seconds

    def forward(self, images):
        time.sleep(self.seconds)
        return images.mean(dim=1, keepdim=True)


def backbone_of(network):
    return Backbone(PixelNormalization("resnet101"), network, CPU, torch.float32, 2)


@pytest.mark.parametrize("bound", ["decoding", "the backbone", "the disk"])
def test_the_slowest_part_is_named_as_the_bound(bound):
    delays = dict.fromkeys(Waits.NAMES, 0.0) | {bound: 0.05}

    def loads():
        for _ in range(4):
            time.sleep(delays["decoding"])
            yield torch.zeros(2, 3, 8, 8, dtype=torch.uint8)

    def make(batches):
        for _ in batches:
            time.sleep(delays["the disk"])

    waits = Waits()
    network = Slow(delays["the backbone"])
    with WriteBehind(1, waits) as writer:
        writer.write(make, forward(backbone_of(network), loads(), 2, waits))
        writer.finish()

    assert max(waits.seconds, key=waits.seconds.get) == bound
    assert waits.seconds[bound] > 0.1 and waits.seconds["copies"] == 0
    assert str(waits).startswith(f"the bound is {bound}: of ")
    assert "copies 0%" in str(waits)


@pytest.fixture
def stream_log(monkeypatch):
    """What CUDA's streams would be asked for, in their order."""
    log, names = [], iter(("to the device", "to the host"))

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event}")

        def record_event(self):
            log.append(f"event of {self.name}")
            return log[-1]

    @contextlib.contextmanager
    def on(stream):
        log.append(f"copy {stream.name}")
        yield

    def keep(tensor, stream):
        log.append(f"kept for {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream(next(names)))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("current"))
    monkeypatch.setattr(torch.Tensor, "record_stream", keep)
    return log


def test_copies_on_a_gpu_have_streams_of_their_own(stream_log):
    """Each copy begins when what it copies is there, and is waited for where it is needed."""
    copies = Copies(torch.device("cuda"))
    copies.device = CPU  # where they are copied to, for want of a GPU

    images, there = copies.to_device(torch.ones(2))
    assert torch.equal(images, torch.ones(2)) and there == ["event of to the device"]
    assert stream_log == [
        "copy to the device",
        "current waits for to the device",
        "kept for current",
        "event of to the device",
    ]

    stream_log.clear()
    (maps,), events = copies.to_host(torch.zeros(3))
    assert torch.equal(maps, torch.zeros(3))
    assert events == ["event of current", "event of to the host"]
    assert stream_log == [
        "event of current",
        "to the host waits for event of current",
        "copy to the host",
        "kept for to the host",
        "event of to the host",
    ]


def test_a_cpu_copies_nothing():
    copies, images = Copies(CPU), torch.ones(2)
    assert copies.to_device(images) == (images, [])
    (back,), events = copies.to_host(images)
    assert back is images and events == []


def test_compiling_is_tried_before_the_first_image(monkeypatch):
    """By --compile alone."""
    assert preprocessing.parse_arguments(["--dataset", "CUB", "--compile"]).compile
    assert not preprocessing.parse_arguments(["--dataset", "CUB"]).compile

    tried = []

    def compile_network(network):
        return lambda images: tried.append(images.shape) or network(images)

    monkeypatch.setattr(torch, "compile", compile_network)
    backbone = compiled(backbone_of(Slow()), 8)
    assert tried == [(2, 3, 8, 8)]
    maps = backbone(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert len(tried) == 2 and maps.shape == (2, 1, 8, 8)

    def no_compiler(images):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nmore lines")

    monkeypatch.setattr(torch, "compile", lambda network: no_compiler)
    message = r"\(InvalidCxxCompiler: no working C\+\+ compiler\): leave --compile out"
    with pytest.raises(UserError, match=message):
        compiled(backbone_of(Slow()), 8)

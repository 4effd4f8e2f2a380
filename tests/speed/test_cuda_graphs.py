"""What only a GPU can show, and what must hold without one."""

import contextlib
import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from helpers import ROOT, SMALL_RUN, flags, read_summary, run_training
from model import SCEN, global_classifier
from scegg.config import read_config
from scegg.features.sampler import BalancedSampler
from scegg.method.eggn import EGGN
from scegg.method.embeddings import Embedding
from scegg.method.evaluation import Kept, SoftmaxClassifier
from scegg.method.scen import fit_global_classifier, rmsprop, scen_step
from scegg.method.steps import classifier_step
from scegg.run.checkpoint import Checkpoint
from scegg.speed.cuda_graphs import COUNTED, WARM_UP, GraphedStep, Input, graphed
from util import UserError, pick_device

SUN = read_config(ROOT / "wandb_config" / "sun_gzsl.yaml", {})
CONFIG = dataclasses.replace(SUN, ngh=64, ndh=64, a1=0.5)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def no_graph_was_refused_before(monkeypatch):
    monkeypatch.setattr(GraphedStep, "refused", False)
    monkeypatch.setattr(GraphedStep, "first_graph", None)
    monkeypatch.setattr(GraphedStep, "side", None)
    monkeypatch.setattr(GraphedStep, "counts", dict.fromkeys(COUNTED, 0))


def as_it_is(step, network, optimizers, steps=1):
    return step


def trained(iterations, device, form=as_it_is):
    """Some EGGN iterations in a form, half of them with feedback.

    Returns EGGN, the last losses, and the iteration's forms without and with feedback.
    """
    torch.manual_seed(0)
    att, unseen = torch.rand(9, 11, device=device), torch.tensor([2, 5], device=device)
    y = torch.tensor([0, 1, 3, 4, 6, 7, 8]).repeat(8)
    x = torch.rand(len(y), 24).to(device)
    eggn = EGGN(24, att, global_classifier(24, 16, 9).to(device), CONFIG).to(device)

    y = y.to(device)
    iterate, sampler = [], BalancedSampler(y, 7)
    for feedback in (False, True):
        step = partial(eggn.draw_and_iterate, sampler=sampler, unseen=unseen, feedback=feedback)
        iterate.append(form(step, eggn, eggn.optimizers.values()))

    for step in range(iterations):
        torch.manual_seed(step)
        losses = iterate[step >= iterations // 2](x, y)
    return eggn, losses, iterate


def same_weights(one, other):
    """Whether two networks have the same state, bit for bit."""
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def no_graph(iterate):
    return not any(step.captured for step in iterate)


def classified(device):
    """The scores of a softmax classifier that is trained three times, its weights, then a
    distilled classifier's weights.

    The softmax classifier's epochs end with a smaller batch.
    """
    torch.manual_seed(0)
    x, y, logits = torch.rand(35, 24), torch.arange(35) % 5, torch.rand(35, 9)
    x, y, logits = x.to(device), y.to(device), logits.to(device)
    config = dataclasses.replace(
        CONFIG, syn_num=4, classifier_epochs=3, distill_iterations=12, batch_size=5
    )
    softmax = SoftmaxClassifier(x, y, 5, config)
    scores = [softmax.fit(lambda linear: linear(x).sum())[0] for _ in range(3)]

    classifier = global_classifier(24, 16, 9).to(device)
    checkpoint = SimpleNamespace(
        phase="",
        track=lambda **_: None,
        forget=lambda *_: None,
        steps=lambda stage, total, *_: range(1, total + 1),
    )
    sampler = BalancedSampler(y.cpu(), 5)
    trainval = Embedding(x, logits, y)
    fit_global_classifier(classifier, trainval, sampler, config, checkpoint, lambda *_: None)
    return [*scores, *softmax.linear.parameters(), *classifier.parameters()]


class Recording:
    """Stands for CUDA's graphs on a CPU: `replay` does again what was done inside.

    calls: (step, inputs, losses) of every step so far.
    """

    calls = []
    replays = 0

    def __init__(self, graph=None, pool=None):
        self.graph = graph

    def __enter__(self):
        pass

    def __exit__(self, *error):
        self.graph.step, self.graph.inputs, self.graph.losses = Recording.calls[-1]

    def replay(self):
        Recording.replays += 1
        self.losses.copy_(self.step(*self.inputs))

    def pool(self):
        return 0, 1


@pytest.fixture
def recorded(monkeypatch):
    """Graphs that can be captured without a GPU; the steps' form with them."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(Recording, "calls", [])
    monkeypatch.setattr(Recording, "replays", 0)

    def form(step, network, optimizers, steps=1):
        def noted(*inputs):
            losses = step(*inputs)
            Recording.calls.append((step, inputs, losses))
            return losses

        return GraphedStep(noted, network, optimizers, steps)

    return form


def test_a_graph_stands_for_the_steps_after_its_capture(recorded):
    plain, plain_losses, _ = trained(16, "cpu")
    fast, losses, iterate = trained(16, "cpu", recorded)
    assert Recording.replays == 2 * (8 - WARM_UP) and all(step.captured for step in iterate)
    assert torch.equal(losses, plain_losses)
    assert same_weights(plain, fast)


def test_classifiers_are_the_same_by_graphs(recorded, monkeypatch):
    """A graph of whole epochs, each drawn anew, serves a classifier that is trained again."""
    expected = classified("cpu")
    monkeypatch.setattr("scegg.method.scen.graphed", recorded)
    monkeypatch.setattr("scegg.method.evaluation.graphed", recorded)
    by_graphs = classified("cpu")
    assert all(torch.equal(*pair) for pair in zip(by_graphs, expected, strict=True))
    epochs, steps = 3 * 3, 12
    assert Recording.replays == epochs - WARM_UP + steps - WARM_UP
    assert GraphedStep.counts == {
        "captures": 2,
        "steps_in_graphs": 9 * (epochs - WARM_UP - 1) + steps - WARM_UP - 1,
        "ordinary_steps": 9 * (WARM_UP + 1) + WARM_UP + 1,
    }


def one_run(features, runs, **changes):
    """A small run with feedback and eight evaluations; its metrics file, its summary."""
    settings = {"nepoch": 8, "a1": 0.5, "classifier_epochs": 2} | changes
    run_on(features, runs, device="cpu", wandb="disabled", **settings)
    (folder,) = runs.glob("*/*/")
    return (folder / "metrics.jsonl").read_bytes(), read_summary(folder)


def test_a_run_captures_each_graph_once_and_is_the_same(features, tmp_path, recorded, monkeypatch):
    """Distillation's step, EGGN's iteration in both passes, and the epoch of either classifier."""
    metrics, summary = one_run(features, tmp_path / "ordinary")
    assert "graphs" not in summary and not Recording.calls

    for module in ("method.scen", "method.evaluation", "run.pipeline"):
        monkeypatch.setattr(f"scegg.{module}.graphed", recorded)
    by_graphs, summary = one_run(features, tmp_path / "graphs")
    assert by_graphs == metrics
    assert summary["graphs"]["captures"] == 5
    assert summary["graphs"]["steps_in_graphs"] > summary["graphs"]["ordinary_steps"] > 0


def test_inputs_are_copied_when_they_changed():
    given = torch.zeros(3)
    first = Input.of(given)
    assert first.own is not given and first.now(given) is first

    given[1] = 1
    second = first.now(given)
    assert second is not first and second.own is first.own and first.own[1] == 1
    third = second.now(torch.ones(3))
    assert third.own is first.own and first.own.sum() == 3


def test_no_step_meets_the_autograd_nodes_of_one_before(recorded):
    """A node keeps the stream that it was made on, and a capture has a stream of its own."""
    linear = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    met = []

    def step(x):
        (node, _), *_ = linear.weight.view_as(linear.weight).grad_fn.next_functions
        met.append("from before" in node.metadata)
        node.metadata["from before"] = True
        return classifier_step(linear, optimizer, x, torch.ones(4, 2))

    iterate = recorded(step, linear, [optimizer])
    for _ in range(WARM_UP + 2):
        iterate(torch.rand(4, 3))
    assert iterate.captured and len(met) == WARM_UP + 4 and not any(met)


def test_a_device_of_cuda_has_its_number(monkeypatch):
    """Without one, torch.cuda.set_device raises."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    names = (None, "cuda", "cuda:2", "2")
    assert [str(pick_device(name)) for name in names] == ["cuda:1", "cuda:1", "cuda:2", "cuda:2"]
    assert [device.index for device in chosen] == [1, 1, 2, 2]
    assert pick_device("cpu") == torch.device("cpu") and len(chosen) == 4


def test_steps_before_a_capture_go_to_a_side_stream(recorded, monkeypatch):
    """And no others: each stream waits for the other around them."""
    log = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    def recorded_step(x):
        log.append("step")
        return x.sum()

    step = recorded(recorded_step, torch.nn.Linear(2, 2), [])
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "current_stream", lambda: Stream("current"))
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        for _ in range(WARM_UP):
            step(torch.ones(3))
    assert log == ["side waits for current", "step", "current waits for side"] * WARM_UP
    log.clear()
    step(torch.ones(3))
    assert step.captured and set(log) == {"step"}


def test_where_capturing_fails_iterations_stay_ordinary_ones(capsys):
    """On a CPU no graph can be captured: the fallback leaves exactly what ordinary steps leave."""
    plain, plain_losses, _ = trained(16, "cpu")
    fallen, losses, iterate = trained(16, "cpu", GraphedStep)
    assert capsys.readouterr().out.count("a CUDA graph is not used: ") == 1
    assert no_graph(iterate)
    assert torch.equal(losses, plain_losses)
    assert same_weights(plain, fallen)


@pytest.mark.parametrize("freeze_dec", [False, True])
def test_a_capture_that_fails_half_way_leaves_no_trace(monkeypatch, capsys, freeze_dec):
    """The capture stops inside the generator's step, where parts of the networks are frozen."""
    monkeypatch.setitem(globals(), "CONFIG", dataclasses.replace(CONFIG, freeze_dec=freeze_dec))
    plain, plain_losses, _ = trained(16, "cpu")

    class Capture(contextlib.nullcontext):
        def __init__(self, *_, **__):
            super().__init__()
            self.patch = pytest.MonkeyPatch()

        def __enter__(self):
            def refuse(*_):
                raise RuntimeError("cannot be captured")

            self.patch.setattr("scegg.method.eggn.vae_loss", refuse)

        def __exit__(self, *_):
            self.patch.undo()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    fallen, losses, iterate = trained(16, "cpu", GraphedStep)
    assert "cannot be captured" in capsys.readouterr().out
    assert no_graph(iterate) and torch.equal(losses, plain_losses)
    assert same_weights(plain, fallen)


def test_a_graph_that_does_nothing_is_not_trusted(recorded, monkeypatch, capsys):
    """Also where learning rates are small: the state before a step must not pass for the next."""
    monkeypatch.setattr(Recording, "replay", lambda graph: None)
    slow = dataclasses.replace(CONFIG, lr=1e-6, dec_lr=1e-6, feed_lr=1e-6)
    monkeypatch.setitem(globals(), "CONFIG", slow)
    plain, _, _ = trained(16, "cpu")
    fallen, _, iterate = trained(16, "cpu", recorded)
    assert "gave other numbers than an ordinary one" in capsys.readouterr().out
    assert no_graph(iterate)
    assert same_weights(plain, fallen)


def test_no_step_waits_for_the_device(monkeypatch):
    """On tensors without values it is an error to need one, by .item(), an if, a boolean index.

    Whatever needs a value would wait for a GPU.
    """
    # tensors without values cannot be moved
    monkeypatch.setattr(torch.nn.Module, "to", lambda network, device: network)
    monkeypatch.setattr(torch.nn.utils, "skip_init", lambda kind, *sizes, device: kind(*sizes))
    y = torch.tensor([0, 1, 2, 3, 4, 5, 6]).repeat(8)
    sampler = BalancedSampler(y, 7)
    with FakeTensorMode(allow_non_fake_inputs=True):
        scen = SCEN(torch.rand(11, 300), torch.rand(9, 11), 24, "avg")
        optimizer = rmsprop(scen.parameters(), 1e-4, CONFIG)
        scen_step(scen, optimizer, torch.rand(7, 16, 24), y[:7], torch.arange(7), CONFIG)
        g, S = scen.embed(torch.rand(56, 16, 24))

        classifier = global_classifier(24, 16, 9)
        classifier_step(classifier, rmsprop(classifier.parameters(), 1e-4, CONFIG), g, S)

        eggn = EGGN(24, torch.rand(9, 11), classifier, CONFIG).to("cpu")
        for feedback in (False, True):
            eggn.draw_and_iterate(g, y, sampler, torch.arange(7, 9), feedback)
        fake, fake_y = eggn.synthesize_classes(torch.arange(7, 9), 5)

        softmax = SoftmaxClassifier(eggn.classifier_input(fake), fake_y, 9, CONFIG)
        softmax.start_anew()
        losses = softmax.epoch()
        Kept(softmax.linear).look(losses[0])
        with pytest.raises(DataDependentOutputException):
            bool(g.sum() > 0)


@pytest.mark.parametrize("precision, on_cuda", [("high", "tf32"), ("medium", "tf32")])
def test_the_precision_of_products_holds_in_every_stage(
    features, tmp_path, monkeypatch, precision, on_cuda
):
    """What torch would compute with on CUDA, which needs none to be asked; medium is TF32 there."""
    seen, timed = {}, Checkpoint.timed

    def noting(checkpoint, name):
        seen[name] = torch.backends.cuda.matmul.fp32_precision
        return timed(checkpoint, name)

    monkeypatch.setattr(Checkpoint, "timed", noting)
    try:
        run_on(features, tmp_path, device="cpu", nepoch=1, matmul_precision=precision)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen.keys() >= {"scen", "embed", "distill", "score", "eggn", "evaluate"}
    assert set(seen.values()) == {on_cuda}


@needs_cuda
def test_graphs_keep_the_numbers():
    plain, plain_losses, _ = trained(40, "cuda")
    fast, losses, iterate = trained(40, "cuda", graphed)
    assert all(step.captured and step.calls > WARM_UP for step in iterate)
    torch.testing.assert_close(losses, plain_losses, rtol=1e-3, atol=1e-4)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], tensor, rtol=1e-2, atol=1e-3)


@needs_cuda
def test_classifiers_on_the_gpu_are_the_same_by_graphs(monkeypatch, capsys):
    """Before, between and after EGGN's graphs, as in a run: all share one memory."""
    monkeypatch.setattr(GraphedStep, "refused", True)
    expected = classified("cuda")
    monkeypatch.setattr(GraphedStep, "refused", False)
    for _ in range(2):
        for tensor, as_before in zip(classified("cuda"), expected, strict=True):
            torch.testing.assert_close(tensor, as_before, rtol=1e-3, atol=1e-4)
        trained(10, "cuda", graphed)
    assert not GraphedStep.refused and "not used" not in capsys.readouterr().out


def run_on(features, tmp_path, **settings):
    """A small run on a feature file."""
    places = {"features": features, "runs": tmp_path / "runs", "data_root": "none"}
    run_training("CUB", "sun_gzsl.yaml", flags(**SMALL_RUN | places | settings))


@needs_cuda
@pytest.mark.parametrize("cache", ["device", "ram", "disk", "none"])
def test_a_run_on_the_gpu(features, tmp_path, cache):
    run_on(features, tmp_path, device="cuda", cache=cache)
    assert list((tmp_path / "runs").glob("*/summary.json"))


def test_a_full_gpu_names_the_settings_to_change(features, tmp_path, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("scegg.run.main.train", full)
    with pytest.raises(UserError, match="lower --batch_size or --syn_num"):
        run_on(features, tmp_path, device="cpu")

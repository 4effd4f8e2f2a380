"""What only a GPU can show, and what must hold without one."""

import contextlib
import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from helpers import ROOT, SMALL_RUN, flags, run_training
from model import SCEN, global_classifier
from scegg.config import read_config
from scegg.features.sampler import BalancedSampler
from scegg.method.eggn import EGGN, draw_iteration
from scegg.method.embeddings import Embedding
from scegg.method.evaluation import fit_softmax
from scegg.method.scen import fit_global_classifier, rmsprop, scen_step
from scegg.method.steps import classifier_step
from scegg.speed.cuda_graphs import WARM_UP, GraphedStep, graphed
from util import UserError

SUN = read_config(ROOT / "wandb_config" / "sun_gzsl.yaml", {})
CONFIG = dataclasses.replace(SUN, ngh=64, ndh=64, a1=0.5)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def no_graph_was_refused_before(monkeypatch):
    monkeypatch.setattr(GraphedStep, "refused", False)
    monkeypatch.setattr(GraphedStep, "first_graph", None)


def as_it_is(step, network, optimizers):
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

    iterate = []
    for feedback in (False, True):
        step = partial(eggn.iterate, feedback=feedback)
        iterate.append(form(step, eggn, eggn.optimizers.values()))

    sampler = BalancedSampler(y, 7)
    for step in range(iterations):
        torch.manual_seed(step)
        draws = draw_iteration(eggn, x, y.to(device), sampler, unseen)
        losses = iterate[step >= iterations // 2](*draws)
    return eggn, losses, iterate


def same_weights(one, other):
    """Whether two networks have the same state, bit for bit."""
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def no_graph(iterate):
    return not any(step.captured for step in iterate)


def classified(device):
    """A softmax classifier's scores and weights, then a distilled classifier's weights.

    The softmax classifier's epochs end with a smaller batch.
    """
    torch.manual_seed(0)
    x, y, logits = torch.rand(35, 24), torch.arange(35) % 5, torch.rand(35, 9)
    x, y, logits = x.to(device), y.to(device), logits.to(device)
    config = dataclasses.replace(
        CONFIG, syn_num=4, classifier_epochs=3, distill_iterations=12, batch_size=5
    )
    scores, linear, _ = fit_softmax(x, y, 5, config, lambda linear: linear(x).sum())

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
    return [scores, *linear.parameters(), *classifier.parameters()]


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

    def form(step, network, optimizers):
        def noted(*inputs):
            losses = step(*inputs)
            Recording.calls.append((step, inputs, losses))
            return losses

        return GraphedStep(noted, network, optimizers)

    return form


def test_a_graph_stands_for_the_steps_after_its_capture(recorded):
    plain, plain_losses, _ = trained(16, "cpu")
    fast, losses, iterate = trained(16, "cpu", recorded)
    assert Recording.replays == 2 * (8 - WARM_UP) and all(step.captured for step in iterate)
    assert torch.equal(losses, plain_losses)
    assert same_weights(plain, fast)


def test_classifiers_are_the_same_by_graphs(recorded, monkeypatch):
    """Also where an epoch's last batch is smaller than the graph's."""
    expected = classified("cpu")
    monkeypatch.setattr("scegg.method.scen.graphed", recorded)
    monkeypatch.setattr("scegg.method.evaluation.graphed", recorded)
    by_graphs = classified("cpu")
    assert all(torch.equal(*pair) for pair in zip(by_graphs, expected, strict=True))
    assert Recording.replays == 3 * 8 - WARM_UP + 12 - WARM_UP


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
            draws = draw_iteration(eggn, g, y, sampler, torch.arange(7, 9))
            eggn.iterate(*draws, feedback=feedback)
        eggn.synthesize_classes(torch.arange(7, 9), 5)
        with pytest.raises(DataDependentOutputException):
            bool(g.sum() > 0)


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
    settings |= {"features": features, "runs": tmp_path / "runs", "data_root": "none"}
    run_training("CUB", "sun_gzsl.yaml", flags(**settings, **SMALL_RUN))


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

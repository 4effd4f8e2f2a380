"""What only a GPU can show, and what must hold without one."""
import contextlib
import dataclasses

import pytest
import torch
from conftest import ROOT, SMALL_RUN, flags
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import train_joint
from config import read_config
from dataset import BalancedSampler
from eggn import EGGN, draw_iteration
from graphs import WARM_UP, GraphedIterations
from model import SCEN, global_classifier
from scen import distill_step, rmsprop, scen_step
from util import UserError

CONFIG = dataclasses.replace(read_config(ROOT / "wandb_config" / "sun_gzsl.yaml", {}), ngh=64, ndh=64, a1=0.5)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def trained(iterations, device, graphed):
    """EGGN and the last losses after some iterations, half of them with feedback."""
    torch.manual_seed(0)
    att, unseen = torch.rand(9, 11, device=device), torch.tensor([2, 5], device=device)
    y = torch.tensor([0, 1, 3, 4, 6, 7, 8]).repeat(8)
    x = torch.rand(len(y), 24).to(device)
    eggn = EGGN(24, att, global_classifier(24, 16, 9).to(device), CONFIG).to(device)
    iterate, sampler = GraphedIterations(eggn) if graphed else eggn.iterate, BalancedSampler(y, 7)
    for step in range(iterations):
        torch.manual_seed(step)
        losses = iterate(draw_iteration(eggn, x, y.to(device), sampler, unseen), step >= iterations // 2)
    return eggn, losses, iterate


def test_where_capturing_fails_iterations_stay_ordinary_ones(capsys):
    """On a CPU no graph can be captured: the fallback must leave exactly what ordinary iterations leave."""
    plain, plain_losses, _ = trained(16, "cpu", graphed=False)
    fallen, losses, iterate = trained(16, "cpu", graphed=True)
    assert capsys.readouterr().out.count("CUDA graphs are not used: ") == 2 and iterate.graphs == {False: None, True: None}
    assert torch.equal(losses, plain_losses)
    assert all(torch.equal(tensor, fallen.state_dict()[name]) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("freeze_dec", [False, True])
def test_a_capture_that_fails_half_way_leaves_no_trace(monkeypatch, freeze_dec):
    """The capture stops inside the generator's step, when parts of the networks are frozen for it."""
    monkeypatch.setitem(globals(), "CONFIG", dataclasses.replace(CONFIG, freeze_dec=freeze_dec))
    plain, plain_losses, _ = trained(16, "cpu", graphed=False)

    class Capture(contextlib.nullcontext):
        def __init__(self, *_):
            super().__init__()
            self.patch = pytest.MonkeyPatch()

        def __enter__(self):
            def refuse(*_):
                raise RuntimeError("cannot be captured")
            self.patch.setattr("eggn.vae_loss", refuse)

        def __exit__(self, *_):
            self.patch.undo()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    fallen, losses, iterate = trained(16, "cpu", graphed=True)
    assert iterate.graphs == {False: None, True: None} and torch.equal(losses, plain_losses)
    assert all(torch.equal(tensor, fallen.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_a_graph_that_does_nothing_is_not_trusted():
    """Also where learning rates are small: the state put back must not pass for the state after an iteration."""
    eggn, _, _ = trained(5, "cpu", graphed=False)
    for optimizer in eggn.optimizers.values():
        optimizer.param_groups[0]["lr"] = 1e-6
    graphed = GraphedIterations(eggn)
    before = [tensor.clone() for tensor in graphed.state()]
    y = torch.tensor([0, 1, 3, 4, 6, 7, 8])
    eggn.iterate(draw_iteration(eggn, torch.rand(7, 24), y, BalancedSampler(y, 7), torch.tensor([2, 5])), True)
    after = [tensor.clone() for tensor in graphed.state()]
    assert graphed.changed_alike(before, after)
    with torch.no_grad():
        for tensor, value in zip(eggn.parameters(), before):
            tensor.copy_(value)
    assert not graphed.changed_alike(before, after)


def test_no_step_waits_for_the_device(monkeypatch):
    """On tensors without values whatever needs one, and so would wait for a GPU, is an error: .item(), an if, a boolean index."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda network, device: network)  # such tensors cannot be moved
    y = torch.tensor([0, 1, 2, 3, 4, 5, 6]).repeat(8)
    sampler = BalancedSampler(y, 7)
    with FakeTensorMode(allow_non_fake_inputs=True):
        scen, classifier = SCEN(torch.rand(11, 300), torch.rand(9, 11), 24, "avg"), global_classifier(24, 16, 9)
        scen_step(scen, rmsprop(scen.parameters(), 1e-4, CONFIG), torch.rand(7, 16, 24), y[:7], torch.arange(7), CONFIG)
        g, S = scen.embed(torch.rand(56, 16, 24))
        distill_step(classifier, rmsprop(classifier.parameters(), 1e-4, CONFIG), g, S)
        eggn = EGGN(24, torch.rand(9, 11), classifier, CONFIG).to("cpu")
        for feedback in (False, True):
            eggn.iterate(draw_iteration(eggn, g, y, sampler, torch.arange(7, 9)), feedback)
        eggn.synthesize_classes(torch.arange(7, 9), 5)
        with pytest.raises(DataDependentOutputException):
            bool(g.sum() > 0)


@needs_cuda
def test_graphs_keep_the_numbers():
    plain, plain_losses, _ = trained(40, "cuda", graphed=False)
    graphed, losses, iterate = trained(40, "cuda", graphed=True)
    assert all(iterate.graphs.values()) and iterate.calls[True] > WARM_UP
    torch.testing.assert_close(losses, plain_losses, rtol=1e-3, atol=1e-4)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(graphed.state_dict()[name], tensor, rtol=1e-2, atol=1e-3)


@needs_cuda
@pytest.mark.parametrize("cache", ["device", "ram", "disk", "none"])
def test_a_run_on_the_gpu(features, tmp_path, cache):
    train_joint.main("CUB", "sun_gzsl.yaml", ["--features", str(features), "--runs", str(tmp_path / "runs"), "--device", "cuda",
                                              "--data_root", "none", "--cache", cache, *flags(**SMALL_RUN)])
    assert list((tmp_path / "runs").glob("*/summary.json"))


def test_a_full_gpu_names_the_settings_to_change(features, tmp_path, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_joint, "train", full)
    with pytest.raises(UserError, match="lower --batch_size or --syn_num"):
        train_joint.main("CUB", "sun_gzsl.yaml", ["--features", str(features), "--runs", str(tmp_path / "runs"), "--device", "cpu",
                                                  "--data_root", "none", *flags(**SMALL_RUN)])

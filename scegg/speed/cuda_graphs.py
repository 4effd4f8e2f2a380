"""A training step, or a whole epoch of steps, as a CUDA graph.

A step launches dozens of small kernels, and on a GPU launching them takes most of its time.
A graph launches them all at once. It is trusted only after it has repeated an ordinary step from
the same state. If it cannot be captured, or if its numbers differ, steps stay ordinary.

A step may draw: torch hands its generator's seed and place to a graph at every replay. So a replay
draws what the ordinary step would have drawn then.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from util import UserError

WARM_UP = 3  # ordinary calls first: they make the optimisers' states and cuBLAS's workspaces
COUNTED = ("captures", "steps_in_graphs", "ordinary_steps")


def graphed(
    step: Callable[..., Tensor],
    network: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    steps: int = 1,
) -> Callable[..., Tensor]:
    """The fastest form of `step(*tensors)`, which returns losses.

    That is the step itself on a CPU, and a GraphedStep where the network is on CUDA. A step
    changes only tensors of the network and of the optimizers (which are `capturable`), and it
    never waits for the device. It draws from the device's generator alone. steps: how many training
    steps a call makes.
    """
    on_cuda = next(network.parameters()).is_cuda
    return GraphedStep(step, network, optimizers, steps) if on_cuda else step


def count_steps(counts: dict[str, int]):
    """From now on count in here what ran as a graph and what did not (`COUNTED`)."""
    for name in COUNTED:
        counts.setdefault(name, 0)
    GraphedStep.counts = counts


class Input(NamedTuple):
    """A tensor that a graph reads, and the tensor, as it was then, that it was copied from."""

    own: Tensor
    given: Tensor
    version: int

    @classmethod
    def of(cls, given: Tensor, own: Tensor | None = None) -> "Input":
        """The given values in a graph's own tensor, or in a new one."""
        own = given.clone() if own is None else own.copy_(given)
        return cls(own, given, given._version)

    def now(self, given: Tensor) -> "Input":
        """With the values of a tensor, which are copied only if they are not there already."""
        if given is self.given and given._version == self.version:
            return self
        return Input.of(given, self.own)


class CapturedStep:
    """A graph, its inputs, and the tensor that it writes losses to."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: list[Input], losses: Tensor):
        self.graph, self.inputs, self.losses = graph, inputs, losses

    def run(self, *inputs: Tensor) -> Tensor:
        """One step on these inputs; returns its losses."""
        pairs = zip(self.inputs, inputs, strict=True)
        self.inputs = [before.now(given) for before, given in pairs]
        self.graph.replay()
        return self.losses.clone()  # the next replay writes into its own


class GraphedStep:
    """Stands for a step, see `graphed`.

    Inputs of other shapes than the first call's take an ordinary step, for instance an epoch's
    last batch.
    """

    # Set on the class once a capture fails: no step is captured any more.
    # Set on one object if only its graph's numbers differ.
    refused = False
    first_graph = None  # all graphs share its memory: no two of them run at once
    side = None  # the stream of `side_stream`
    counts = dict.fromkeys(COUNTED, 0)  # see `count_steps`

    def __init__(
        self,
        step: Callable[..., Tensor],
        network: nn.Module,
        optimizers: Iterable[torch.optim.Optimizer],
        steps: int = 1,
    ):
        self.step, self.steps = step, steps
        self.network = network
        self.optimizers = list(optimizers)
        self.shapes = None
        self.calls = 0
        self.captured: CapturedStep | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """One step; returns its losses."""
        shapes = [tensor.shape for tensor in inputs]
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            self.counts["ordinary_steps"] += self.steps
            return self.step(*inputs)

        self.calls += 1
        if self.captured:
            self.counts["steps_in_graphs"] += self.steps
            return self.captured.run(*inputs)

        self.counts["ordinary_steps"] += self.steps
        if self.refused:
            return self.step(*inputs)
        if self.calls <= WARM_UP:
            with side_stream():
                return self.step(*inputs)
        return self.capture(*inputs)

    def capture(self, *inputs: Tensor) -> Tensor:
        """Make an ordinary step, and the same again as a graph; keep the graph if they agree."""
        before = self.copy_of_state()
        drawn_before = self.random_state()
        losses = self.step(*inputs)
        after = self.copy_of_state()
        drawn_after = self.random_state()

        try:
            captured = self.record(*inputs)
            self.restore(before, drawn_before)
            captured.graph.replay()
            same_losses = torch.allclose(captured.losses, losses, rtol=1e-3, atol=1e-5)
            if not same_losses or not self.changed_alike(before, after):
                raise UserError("a replayed step gave other numbers than an ordinary one")
            self.captured = captured
            self.counts["captures"] += 1
        except Exception as error:  # torch and CUDA have many errors for what cannot be captured
            self.refused = True
            self.restore(after, drawn_after)
            print(f"a CUDA graph is not used: {UserError(first_cause(error))}", flush=True)

        return losses

    def record(self, *inputs: Tensor) -> CapturedStep:
        """The step as a graph that holds these inputs now."""
        with unchanged_by_failure(self.network):
            shared_memory = GraphedStep.first_graph and GraphedStep.first_graph.pool()
            own_inputs = [Input.of(tensor) for tensor in inputs]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=shared_memory):
                losses = self.step(*(one.own for one in own_inputs))

        GraphedStep.first_graph = GraphedStep.first_graph or graph
        return CapturedStep(graph, own_inputs, losses)

    def state(self) -> list[Tensor]:
        """Everything that a step changes: weights, then buffers and the optimisers' tensors."""
        tensors = [*self.network.parameters(), *self.network.buffers()]
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                tensors += [value for value in state.values() if torch.is_tensor(value)]
        return tensors

    @torch.no_grad()
    def copy_of_state(self) -> list[Tensor]:
        """The state as it is now.

        No gradients: autograd's node of a weight would live on in a copy of it, with the stream
        that it was made on, and break a capture on another stream.
        """
        return [tensor.clone() for tensor in self.state()]

    def random_state(self) -> Tensor:
        """Where the device's random generator is."""
        device = next(self.network.parameters()).device
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    @torch.no_grad()
    def restore(self, saved: list[Tensor], drawn: Tensor):
        """Put the state back, in place: a graph knows its tensors by their addresses."""
        for tensor, value in zip(self.state(), saved, strict=True):
            tensor.copy_(value)

        device = next(self.network.parameters()).device
        if device.type == "cuda":
            torch.cuda.set_rng_state(drawn, device)
        else:
            torch.set_rng_state(drawn)

    @torch.no_grad()
    def changed_alike(self, before: list[Tensor], after: list[Tensor]) -> bool:
        """Whether the replayed step changed the state as the ordinary one did.

        Weights may differ by a hundredth of their change, in the 2-norm. Single numbers (lambda1,
        the optimisers' counters) must be the same.
        """
        now = self.state()
        weights = len(list(self.network.parameters()))
        difference = squared_distance(now[:weights], after[:weights])
        change = squared_distance(after[:weights], before[:weights])

        for tensor, expected in zip(now, after, strict=True):
            if tensor.dim() == 0 and not torch.allclose(tensor, expected):
                return False
        return bool(difference <= 1e-4 * change)


def first_cause(error: BaseException) -> BaseException:
    """The error that others followed from: one in a capture breaks the capture's end, too."""
    while error.__context__:
        error = error.__context__
    return error


def squared_distance(tensors: list[Tensor], others: list[Tensor]) -> Tensor:
    """The squared 2-norm of all differences together, in float64."""
    pairs = zip(tensors, others, strict=True)
    return sum(((one - other).double() ** 2).sum() for one, other in pairs)


@contextlib.contextmanager
def side_stream():
    """Within, work goes to a stream beside the current one, each waiting for the other's.

    torch's notes on CUDA graphs ask this of the steps before a capture.
    """
    if not torch.cuda.is_available():
        yield
        return

    # always the same one: each stream has its own memory
    side = GraphedStep.side = GraphedStep.side or torch.cuda.Stream()
    current = torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


@contextlib.contextmanager
def unchanged_by_failure(network: nn.Module):
    """If a capture fails inside, put back what it changed besides the state, and raise its error.

    That is the current stream, the random generator, the frozen parameters and the gradients.
    From then on no step is captured.
    """
    trained = [parameter.requires_grad for parameter in network.parameters()]
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
    random_state = torch.cuda.get_rng_state() if stream else None

    try:
        yield
    except Exception:
        GraphedStep.refused = True
        if stream:
            # the capture's own stream can still be current, and the generator waits for its end
            torch.cuda.set_stream(stream)
            generator = torch.Generator(stream.device).set_state(random_state)
            default = torch.cuda.default_generators[stream.device_index]
            default.graphsafe_set_state(generator.graphsafe_get_state())
        for parameter, was_trained in zip(network.parameters(), trained, strict=True):
            parameter.requires_grad_(was_trained)
        network.zero_grad(set_to_none=True)
        raise

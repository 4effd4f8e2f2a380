"""A training step as a CUDA graph: its dozens of small kernels become one launch, where launching them is what takes the time.

A graph is trusted only after it has repeated an ordinary step from the same state; where capturing fails, or the numbers
differ, steps stay ordinary ones.
"""
from typing import Callable, Iterable

import torch
from torch import Tensor, nn

from util import UserError

WARM_UP = 3  # ordinary steps before a capture: optimiser states and cuBLAS's workspaces must be there


def graphed(step: Callable[..., Tensor], network: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> Callable[..., Tensor]:
    """The fastest form of `step(*tensors)`, which returns losses, on the network's device: itself on a CPU, a GraphedStep on CUDA.

    It changes nothing but the network's tensors and the optimizers', which are `capturable`, and never waits for the device.
    """
    return GraphedStep(step, network, optimizers) if next(network.parameters()).is_cuda else step


class GraphedStep:
    """Stands for a step, see `graphed`. Inputs of other shapes than the first call's, as an epoch's last batch, take an ordinary step."""
    refused = False  # of all, once one could not be captured; of one alone, if its numbers were others
    first = None  # the first graph, whose memory is all the others', too: no two of them run at once

    def __init__(self, step: Callable[..., Tensor], network: nn.Module, optimizers: Iterable[torch.optim.Optimizer]):
        self.step, self.network, self.optimizers = step, network, list(optimizers)
        self.shapes, self.calls, self.graph = None, 0, None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """One step; returns its losses."""
        shapes = [tensor.shape for tensor in inputs]
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            return self.step(*inputs)
        self.calls += 1
        if self.graph is None:
            return self.step(*inputs) if self.calls <= WARM_UP or self.refused else self.capture(*inputs)
        graph, held, losses = self.graph
        for tensor, given in zip(held, inputs):
            tensor.copy_(given)
        graph.replay()
        return losses.clone()

    def capture(self, *inputs: Tensor) -> Tensor:
        """An ordinary step, and the same once more as a graph from the same state; keeps the graph if they agree."""
        before = [tensor.clone() for tensor in self.state()]
        losses = self.step(*inputs)
        after = [tensor.clone() for tensor in self.state()]
        try:
            graph, held, graphed_losses = self.record(*inputs)
            self.restore(before)
            graph.replay()
            if not torch.allclose(graphed_losses, losses, rtol=1e-3, atol=1e-5) or not self.changed_alike(before, after):
                raise UserError("a replayed step gave other numbers than an ordinary one")
            self.graph = graph, held, graphed_losses
        except Exception as error:  # torch and CUDA have many names for what cannot be captured
            self.refused = True
            self.restore(after)
            print(f"a CUDA graph is not used: {UserError(error)}", flush=True)
        return losses

    def record(self, *inputs: Tensor) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        """The step as a graph, the tensors that it reads, which hold the inputs now, and the one that it leaves its losses in.

        Where it cannot be made, what the attempt has changed beside the state is put back before the error is raised.
        """
        trained = [parameter.requires_grad for parameter in self.network.parameters()]
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        random = torch.cuda.get_rng_state() if stream else None
        try:
            held, graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=GraphedStep.first and GraphedStep.first.pool()):
                losses = self.step(*held)
        except Exception:
            GraphedStep.refused = True
            if stream:  # its own stream can still be the current one, and the generator wait for the capture's end
                torch.cuda.set_stream(stream)
                generator = torch.Generator(stream.device).set_state(random)
                torch.cuda.default_generators[stream.device_index].graphsafe_set_state(generator.graphsafe_get_state())
            for parameter, was_trained in zip(self.network.parameters(), trained):
                parameter.requires_grad_(was_trained)
            self.network.zero_grad(set_to_none=True)
            raise
        GraphedStep.first = GraphedStep.first or graph
        return graph, held, losses

    def state(self) -> list[Tensor]:
        """Everything that a step changes: weights, buffers, the optimisers' tensors."""
        optimizer_states = (state for optimizer in self.optimizers for state in optimizer.state.values())
        return [*self.network.parameters(), *self.network.buffers(),
                *(value for state in optimizer_states for value in state.values() if torch.is_tensor(value))]

    @torch.no_grad()
    def restore(self, saved: list[Tensor]):
        """Put the state back, in place: a graph knows its tensors by their addresses."""
        for tensor, value in zip(self.state(), saved):
            tensor.copy_(value)

    @torch.no_grad()
    def changed_alike(self, before: list[Tensor], after: list[Tensor]) -> bool:
        """Whether the weights differ from `after` by less than a hundredth of their change since `before` (2-norms), and
        single numbers (lambda1, the optimisers' counters) not at all."""
        state, weights = self.state(), len(list(self.network.parameters()))
        difference = sum(((now - then).double() ** 2).sum() for now, then in zip(state[:weights], after))
        change = sum(((then - first).double() ** 2).sum() for then, first in zip(after[:weights], before))
        counters = all(torch.allclose(now, then) for now, then in zip(state, after) if not now.dim())
        return counters and bool(difference <= 1e-4 * change)

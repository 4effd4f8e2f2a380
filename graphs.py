"""EGGN's iterations as CUDA graphs: some hundred small kernels become one launch, where launching them is what takes the time.

A graph is trusted only after it has repeated an ordinary iteration from the same state; where capturing fails, or the numbers
differ, iterations stay ordinary ones.
"""
import torch
from torch import Tensor

from eggn import EGGN
from util import UserError

WARM_UP = 3  # ordinary iterations before a capture: optimiser states and cuBLAS's workspaces must be there


class GraphedIterations:
    """Stands for `EGGN.iterate` on a CUDA device: called with the same tensors, of the same shapes every time."""

    def __init__(self, eggn: EGGN):
        self.eggn = eggn
        self.calls = {False: 0, True: 0}  # iterations without and with feedback: each has a graph of its own
        self.graphs = {}

    def __call__(self, draws: tuple[Tensor, ...], feedback: bool) -> Tensor:
        """One iteration; returns its losses."""
        self.calls[feedback] += 1
        if self.calls[feedback] <= WARM_UP:
            return self.eggn.iterate(draws, feedback)
        if feedback not in self.graphs:
            return self.capture(draws, feedback)
        if self.graphs[feedback] is None:
            return self.eggn.iterate(draws, feedback)
        graph, inputs, losses = self.graphs[feedback]
        for held, drawn in zip(inputs, draws):
            held.copy_(drawn)
        graph.replay()
        return losses.clone()

    def capture(self, draws: tuple[Tensor, ...], feedback: bool) -> Tensor:
        """An ordinary iteration, and the same once more as a graph from the same state; keeps the graph if they agree."""
        before = [tensor.clone() for tensor in self.state()]
        losses = self.eggn.iterate(draws, feedback)
        after = [tensor.clone() for tensor in self.state()]
        self.graphs[feedback] = None
        stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
        try:
            inputs, graph = tuple(drawn.clone() for drawn in draws), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                graphed_losses = self.eggn.iterate(inputs, feedback)
            self.restore(before)
            graph.replay()
            if not torch.allclose(graphed_losses, losses, rtol=1e-3, atol=1e-5) or not self.changed_alike(before, after):
                raise RuntimeError("a replayed iteration gave other numbers than an ordinary one")
            self.graphs[feedback] = graph, inputs, graphed_losses
        except Exception as error:  # torch and CUDA have many names for what cannot be captured
            if stream:  # a capture that fails can leave its own stream current, and the generator waiting for the capture's end
                torch.cuda.set_stream(stream)
                torch.cuda.default_generators[stream.device_index].graphsafe_set_state(torch.Generator(stream.device).graphsafe_get_state())
            self.eggn.requires_grad_(True)
            self.eggn.zero_grad(set_to_none=True)
            self.restore(after)
            print(f"CUDA graphs are not used: {UserError(error)}", flush=True)
        return losses

    def state(self) -> list[Tensor]:
        """Everything that an iteration changes: weights, lambda1, the optimisers' tensors."""
        optimizer_states = (state for optimizer in self.eggn.optimizers.values() for state in optimizer.state.values())
        return [*self.eggn.parameters(), *self.eggn.buffers(),
                *(value for state in optimizer_states for value in state.values() if torch.is_tensor(value))]

    @torch.no_grad()
    def restore(self, saved: list[Tensor]):
        """Put the state back, in place: a graph knows its tensors by their addresses."""
        for tensor, value in zip(self.state(), saved):
            tensor.copy_(value)

    @torch.no_grad()
    def changed_alike(self, before: list[Tensor], after: list[Tensor]) -> bool:
        """Whether the weights differ from `after` by less than a hundredth of their change since `before` (2-norms), and
        lambda1 and Adam's counters not at all."""
        state, weights = self.state(), len(list(self.eggn.parameters()))
        difference = sum(((now - then).double() ** 2).sum() for now, then in zip(state[:weights], after))
        change = sum(((then - first).double() ** 2).sum() for then, first in zip(after[:weights], before))
        counters = all(torch.allclose(now, then) for now, then in zip(state, after) if not now.dim())
        return counters and bool(difference <= 1e-4 * change)

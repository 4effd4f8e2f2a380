"""The stages of training: SCEN, distillation, EGGN."""

from collections.abc import Callable
from functools import partial

from benchmarks.flop import (
    RMSPROP_BYTES,
    critic_cost,
    distillation_flop,
    embedding_flop,
    generator_cost,
    iteration_cost,
    scen_flop,
)
from benchmarks.stages import Stage, Workbench
from scegg.features.sampler import BalancedSampler
from scegg.method import plain
from scegg.method.scen import scen_step
from scegg.method.steps import classifier_step
from scegg.speed.cuda_graphs import WARM_UP, graphed

# The transcription encodes images again in every step. Both ways count: without and with that.
CACHED, ENCODED = "cached features", "re-encoding counted"
WITH_FEEDBACK = f"EGGN iteration with feedback, {CACHED}"


def training_stages(bench: Workbench, against_plain: bool) -> list[Stage]:
    """The stages of training; against_plain: with the plain transcription's way of each."""
    stages = [scen_stage(bench), embedding_stage(bench), distillation_stage(bench)]
    stages += eggn_stages(bench)
    if against_plain:
        plain_calls = PlainTraining(bench).calls()
        for stage in stages:
            stage.plain = plain_calls[stage.name]
    return stages


def map_bytes(bench: Workbench) -> float:
    """Bytes of a batch of feature maps."""
    s = bench.s
    return s.B * s.side**2 * s.D * 4.0


def scen_stage(bench: Workbench) -> Stage:
    """A step of stage 1."""

    def run():
        maps, labels = bench.maps, bench.labels
        scen_step(bench.scen, bench.scen_optimizer, maps, labels, bench.seen, bench.config)

    flop, moved = scen_flop(bench.s), 4 * map_bytes(bench)
    return Stage("SCEN step", run, "image", bench.s.B, flop, moved)


def embedding_stage(bench: Workbench) -> Stage:
    """The only pass over feature maps once SCEN is frozen."""
    run = partial(bench.scen.embed, bench.maps)
    flop, moved = embedding_flop(bench.s), 2 * map_bytes(bench)
    return Stage("dense-feature pass", run, "image", bench.s.B, flop, moved)


def distillation_stage(bench: Workbench) -> Stage:
    """A step of stage 2."""
    classifier, optimizer = bench.distilled, bench.distill_optimizer
    step = partial(classifier_step, classifier, optimizer)
    run = as_trained(step, classifier, [optimizer], bench.x[0], bench.local_logits)

    flop = distillation_flop(bench.s, bench.config)
    moved = RMSPROP_BYTES * bench.s.D * bench.config.distill_hidden
    return Stage("distillation step", run, "step", 1, flop, moved)


def eggn_stages(bench: Workbench) -> list[Stage]:
    """The critic steps of an iteration, its generator step, and the iteration; each twice.

    Where the config trains feedback, the iteration of the second pass as well.
    """
    s, config, eggn, T = bench.s, bench.config, bench.eggn, bench.T
    critic_steps = partial(eggn.critic_steps, *bench.critic_draws(), False)
    generator_step = partial(eggn.generator_step, *bench.generator_draws(), False)

    critic = T * critic_cost(s, config)
    generator = generator_cost(s, config)
    both = iteration_cost(s, config)
    timed = [
        ("critic steps", critic_steps, T, critic),
        ("generator step", generator_step, 1, generator),
        ("EGGN iteration", iteration(bench, feedback=False), 1, both),
    ]
    stages = [
        Stage(f"{name}, {how}", run, "step", steps, cost.flop, cost.bytes)
        for name, run, steps, cost in timed
        for how in (CACHED, ENCODED)
    ]

    if config.a1 > 0:
        run, cost = iteration(bench, feedback=True), iteration_cost(s, config, feedback=True)
        stages.append(Stage(WITH_FEEDBACK, run, "step", 1, cost.flop, cost.bytes))
    return stages


def iteration(bench: Workbench, feedback: bool) -> Callable:
    """A call of an EGGN iteration, its draws included."""
    eggn, x, y = bench.eggn, bench.x.flatten(0, 1), bench.y.flatten()
    sampler = BalancedSampler(y, bench.s.B)
    drawn = {"sampler": sampler, "unseen": bench.unseen, "feedback": feedback}
    iterate = partial(eggn.draw_and_iterate, **drawn)
    return as_trained(iterate, eggn, eggn.optimizers.values(), x, y)


def as_trained(step: Callable, network, optimizers, *inputs) -> Callable:
    """A call of a step as training makes it: on CUDA by its graph, which is captured here."""
    step = graphed(step, network, optimizers)
    if inputs[0].is_cuda:
        for _ in range(WARM_UP + 1):  # the last call is captured
            step(*inputs)
    return partial(step, *inputs)


class PlainTraining:
    """The same stages by the plain transcription, with torch's default optimisers."""

    def __init__(self, bench: Workbench):
        self.bench = bench
        self.eggn = plain.use_plain_adam(bench.new_eggn())
        self.scen_optimizer = plain.rmsprop(bench.scen, bench.config)
        self.distill_optimizer = plain.rmsprop(bench.distilled, bench.config)

    def calls(self) -> dict[str, Callable]:
        """The transcription's way of each stage, by the stage's name."""
        calls = {
            "SCEN step": self.scen_step,
            "dense-feature pass": self.embed,
            "distillation step": self.distillation_step,
        }
        for how, encode in ((CACHED, False), (ENCODED, True)):
            calls[f"critic steps, {how}"] = partial(self.critic_steps, encode)
            calls[f"generator step, {how}"] = partial(self.generator_step, encode)
            calls[f"EGGN iteration, {how}"] = partial(self.iteration, encode)
        calls[WITH_FEEDBACK] = self.iteration_with_feedback
        return calls

    def scen_step(self):
        """A step of stage 1."""
        bench = self.bench
        losses = plain.scen_losses(bench.scen, bench.raw, bench.labels, bench.seen)
        self.scen_optimizer.zero_grad()
        sum(losses).backward()
        self.scen_optimizer.step()

    def embed(self):
        """Dense-semantic features and local logits of the batch."""
        return plain.dense_features(self.bench.scen, self.bench.raw)

    def distillation_step(self):
        """A step of stage 2, its images encoded anew."""
        classifier_step(self.bench.distilled, self.distill_optimizer, *self.embed())

    def features(self, t: int, encode: bool):
        """The features of batch t (B, D): drawn before, or encoded now."""
        return self.embed()[0].clamp(0, 1) if encode else self.bench.x[t]

    def critic_steps(self, encode: bool):
        """All critic steps of an iteration."""
        bench = self.bench
        for t in range(bench.T):
            x = self.features(t, encode)
            plain.critic_step(self.eggn, x, bench.y[t], bench.eps[t], bench.alpha[t], False)

    def generator_step(self, encode: bool):
        """The generator step of an iteration."""
        bench, T = self.bench, self.bench.T
        _, *draws = bench.generator_draws()
        plain.generator_step(self.eggn, self.features(T, encode), *draws, False)

    def iteration(self, encode: bool):
        """An iteration without feedback."""
        self.critic_steps(encode)
        self.generator_step(encode)

    def iteration_with_feedback(self):
        """An iteration of the second pass."""
        bench = self.bench
        draws = (bench.alpha, bench.unseen_y, bench.noise)
        plain.iteration(self.eggn, bench.x, bench.y, bench.eps, *draws, True)

"""The counts of arithmetic and traffic, against small cases counted by hand."""

import dataclasses

import pytest

from benchmarks import flop
from benchmarks.flop import SIZES, Cost, Size
from helpers import ROOT
from scegg.config import read_config

ONES = Size(B=1, K=1, C=1, Cs=1, D=1, side=1, d_v=1)  # every product of it moves 12 bytes or few


def config_of(dataset, **changes):
    """A dataset's settings with some changed."""
    config = read_config(ROOT / "wandb_config" / f"{dataset}_gzsl.yaml", {})
    return dataclasses.replace(config, **changes)


@pytest.fixture
def ones():
    """Networks of a single unit a layer."""
    return config_of("cub", ngh=1, ndh=1, distill_hidden=1, critic_iter=1)


def test_a_linear_layer_reads_and_writes_three_matrices_a_pass():
    assert flop.linear(2, 3, 4, 1) == Cost(2 * 2 * 3 * 4, 4 * (6 + 12 + 8))
    assert flop.linear(2, 3, 4, 3) == 3 * flop.linear(2, 3, 4, 1)


def test_adam_moves_28_bytes_for_each_weight_and_bias():
    assert flop.adam((3, 4), (1, 2)) == Cost(bytes=28 * (12 + 4 + 2 + 2))


def test_the_critic_writes_its_gradient_once():
    size = dataclasses.replace(ONES, D=2)
    forward = 4 * (2 * 3 + 3 * 3 + 2 * 3)
    penalty_and_back = 2 * 4 * (1 * 3 + 3 * 2 + 1 * 2)
    gradient = 4 * (3 * 3 + 3 * 3 + 3 * 3)
    arithmetic = 2 * 2 * 3 * 3 + 2 * (2 * 1 * 3 * 2) + 2 * 3 * (2 * 3 + 2)
    expected = Cost(arithmetic, forward + penalty_and_back + gradient)
    assert flop.critic_products(size, ndh=3) == expected


def test_a_critic_step_by_hand(ones):
    critic = (32 + 2 * 12 + 44) + 28 * 3
    decoder = 2 * 12 + 3 * 12 + 28 * (2 + 2)
    fakes = 20 + 20 + 12
    assert flop.critic_cost(ONES, ones).bytes == critic + decoder + fakes
    feedback = 12 + 2 * 12 + 12
    assert flop.critic_cost(ONES, ones, True).bytes == critic + decoder + fakes + feedback


def test_fakes_of_all_critic_steps_read_the_weights_once(ones):
    """20 and 12 bytes are layers of one row, 4 * (2, 1 and 1) what each further row adds."""
    two_steps = dataclasses.replace(ones, critic_iter=2)
    once = 2 * flop.critic_cost(ONES, ones).bytes
    twice = 2 * flop.critic_cost(ONES, two_steps).bytes
    weights = 4 * (2 + 2 + 1)
    assert once - twice == weights


def test_a_generator_step_by_hand(ones):
    encoder = 2 * 20 + 3 * 20
    generator = 2.5 * 32 + 3 * 20
    guidance = 2 * 20 + 2 * 20
    critic = 2 * 20
    decoder = 3 * 12 + 3 * 12 + 28 * 4
    adam = 28 * (3 + 4 + 3 + 2)
    expected = encoder + generator + guidance + critic + decoder + adam
    assert flop.generator_cost(ONES, ones).bytes == expected

    learns_feedback = (12 + 2 * 12 + 12) + 12 + 2 * 12 + 28 * 4
    assert flop.generator_cost(ONES, ones, True).bytes == expected + learns_feedback

    frozen = dataclasses.replace(ones, freeze_dec=True)
    assert flop.generator_cost(ONES, frozen).bytes == expected - 12 - 12 - 28 * 4


def test_an_epoch_of_a_softmax_classifier_ends_with_a_smaller_batch():
    whole = 2 * 4 * (2 * 3 + 3 * 2 + 2 * 2)
    rest = 2 * 4 * (1 * 3 + 3 * 2 + 1 * 2)
    cost = flop.softmax_epoch(5, batch=2, inputs=3, classes=2)
    assert cost == Cost(2 * 2 * 5 * 3 * 2, 2 * whole + rest + 3 * 28 * (3 + 1) * 2)


def test_the_arithmetic_is_that_of_the_tables_of_the_cpu():
    """In docs/benchmark_cpu.md, made with SUN's settings: only the traffic is counted anew."""
    cub, sun = SIZES["CUB"], config_of("sun")
    assert flop.scen_flop(cub) / 1e9 == pytest.approx(86.27, abs=0.005)
    assert flop.embedding_flop(cub) / 1e9 == pytest.approx(32.11, abs=0.005)
    assert flop.distillation_flop(cub, sun) / 1e9 == pytest.approx(0.62, abs=0.005)
    assert 5 * flop.critic_cost(cub, sun).flop / 1e9 == pytest.approx(67.23, abs=0.005)
    assert flop.generator_cost(cub, sun).flop / 1e9 == pytest.approx(18.90, abs=0.005)
    assert flop.evaluation_cost(cub, sun).flop / 1e9 == pytest.approx(5496.97, abs=0.005)


def test_an_iteration_on_cub_moves_as_much_as_the_module_says():
    cub, config = SIZES["CUB"], config_of("cub")
    first = flop.iteration_cost(cub, config).bytes / 1e9
    second = flop.iteration_cost(cub, config, feedback=True).bytes / 1e9
    stated = f"all                     {first:.2f}           {second:.2f}    on average "
    assert f"{stated}{(first + second) / 2:.2f}" in flop.__doc__


def test_a_whole_run_on_cub():
    cost = flop.run_cost(SIZES["CUB"], config_of("cub"))
    assert (cost.iterations, cost.evaluations) == (66_600, 300)
    assert cost.training.bytes / cost.iterations == pytest.approx(6.64e9, abs=0.005e9)
    floor = cost.floor(flops=67e12, bytes_per_second=3.35e12)
    assert floor["training, traffic"] == cost.training.bytes / 3.35e12
    assert floor["evaluating, arithmetic"] == cost.evaluating.flop / 67e12


def test_without_feedback_both_passes_cost_the_same():
    size, config = SIZES["SUN"], config_of("sun")  # a1 = 0
    cost, one = flop.run_cost(size, config), flop.iteration_cost(size, config)
    assert cost.training.bytes == pytest.approx(cost.iterations * one.bytes)

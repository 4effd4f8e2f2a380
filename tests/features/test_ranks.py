"""The ranks of one job: what the environment says, how they meet, and what they agree on."""

import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

import preprocessing
import train_joint
from forks import Fork
from scegg.datasets import toy
from scegg.features import parts, ranks
from scegg.features.parts import Parts
from scegg.features.ranks import Ranks, device_of_rank, rank_of_ranks, ranks_on_this_machine
from util import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """A function that sets what `torchrun` would, and nothing else of it."""

    def put(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    put()
    return put


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# ---------------------------------------------------------------- the environment


def test_a_single_process_needs_no_environment(environment):
    assert rank_of_ranks() == (0, 1)
    for values in ({"WORLD_SIZE": 1}, {"RANK": 0, "WORLD_SIZE": 1}, {"MASTER_ADDR": "elsewhere"}):
        environment(**values)
        assert rank_of_ranks() == (0, 1)
    assert ranks_on_this_machine() == 1 and device_of_rank() is None

    environment(RANK=1, WORLD_SIZE=3, MASTER_ADDR="localhost", MASTER_PORT=29500)
    assert rank_of_ranks() == (1, 3)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"WORLD_SIZE": 2}, "WORLD_SIZE is set and RANK is not: start the ranks with torchrun"),
        ({"RANK": 0}, "RANK is set and WORLD_SIZE is not"),
        ({"RANK": 0, "WORLD_SIZE": 2}, "WORLD_SIZE is set and MASTER_ADDR is not"),
        ({"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "a"}, "WORLD_SIZE is set and MASTER_PORT is"),
        ({"RANK": 2, "WORLD_SIZE": 2}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": 0, "WORLD_SIZE": 0}, "RANK=0 is not below WORLD_SIZE=0"),
        ({"RANK": -1, "WORLD_SIZE": 2}, "RANK=-1: must be a whole number"),
        ({"RANK": "first", "WORLD_SIZE": 2}, "RANK=first: must be a whole number"),
        ({"RANK": 0, "WORLD_SIZE": "2x"}, "WORLD_SIZE=2x: must be a whole number"),
        (
            {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "a", "MASTER_PORT": "http"},
            "MASTER_PORT=http: must be a whole number",
        ),
        (
            {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "a", "MASTER_PORT": 70000},
            "MASTER_PORT=70000: must be from 1 to 65535",
        ),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(environment, values, message):
    environment(**values)
    with pytest.raises(UserError, match=message):
        rank_of_ranks()


@pytest.mark.parametrize(
    "values, refused",
    [
        ({}, False),
        ({"RANK": 0}, False),
        ({"RANK": 0, "WORLD_SIZE": 1}, False),
        ({"WORLD_SIZE": 2}, True),
        ({"RANK": 0, "WORLD_SIZE": 2}, True),
        ({"RANK": 1, "WORLD_SIZE": 1}, True),
        ({"RANK": 3}, True),
    ],
)
def test_training_is_refused_in_several_processes(environment, values, refused):
    environment(**values)
    message = "several processes, each of which would train" if refused else "none.yaml could not"
    with pytest.raises(UserError, match=message):
        train_joint.main(["--config", "none.yaml"])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_an_address_that_does_not_answer_is_refused_in_seconds(
    environment, monkeypatch, rank, host
):
    if (rank, host) == (0, "127.0.0.1"):
        pytest.skip("there it does answer")
    monkeypatch.setattr(ranks, "REACH", 1)
    environment(MASTER_ADDR=host, MASTER_PORT=free_port())
    began = time.monotonic()
    with pytest.raises(UserError, match=f"MASTER_ADDR={host}, MASTER_PORT=.* does not answer"):
        ranks.meet(rank)
    assert time.monotonic() - began < 20


def test_something_else_that_listens_there_is_not_waited_for(environment, monkeypatch):
    monkeypatch.setattr(ranks, "REACH", 0.5)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=mute.getsockname()[1])
        with pytest.raises(UserError, match="the ranks cannot meet at .*: give the first rank's"):
            ranks.meet(1)


# ---------------------------------------------------------------- life and death


def test_a_first_rank_that_was_stopped_is_given_up(monkeypatch):
    monkeypatch.setattr(ranks, "PATIENCE", 0.2)
    stopped = threading.Event()
    store = ranks.PatientStore(SimpleNamespace(check=stopped.wait, add=pytest.fail))
    for call in (lambda: store.check(60), lambda: store.add("beats/1", 1)):
        with pytest.raises(UserError, match="the first rank did not answer for 0.2 seconds"):
            call()
    stopped.set()


@pytest.fixture
def together(environment, monkeypatch):
    """Runs a function of `Ranks` on two ranks, in threads; returns what each returned or raised."""
    environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    for name, value in (("BEAT", 0.1), ("PATIENCE", 1), ("LINGER", 2), ("REACH", 10)):
        monkeypatch.setattr(ranks, name, value)

    def one(action, rank, number):
        try:
            with Ranks(number, 2) as job:
                return action(job)
        except UserError as error:
            return str(error)

    def run(action, numbers=(0, 1)):
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda rank: one(action, rank, numbers[rank]), range(2)))

    return run


def test_ranks_wait_for_each_other_as_long_as_they_live(together):
    def action(job):
        time.sleep(3 * job.rank)
        job.wait("the end")
        return job.first("answer", [42 + job.rank])

    assert together(action) == [[42], [42]]


def test_a_rank_without_a_sign_of_life_is_given_up(together):
    def action(job):
        if job.rank == 1:
            job.over.set()  # its heart stops
            time.sleep(3)
            return
        job.wait("the end")
        return

    assert "rank 1 of 2 gave no sign of life for 1 seconds" in together(action)[0]


def test_a_rank_that_failed_ends_the_others_wait(together):
    def action(job):
        if job.rank == 1:
            raise UserError("no such image")
        job.wait("the end")

    first, second = together(action)
    assert "another rank ended before its work was done" in first and second == "no such image"


def test_a_rank_that_never_comes_is_given_up(environment, together):
    with pytest.raises(UserError, match="rank 1 of 2 gave no sign of life"), Ranks(0, 2):
        pass


def test_two_processes_of_one_number_are_told(together, monkeypatch):
    monkeypatch.setattr(ranks, "REACH", 1)
    said = " ".join(map(str, together(lambda job: job.wait("the end"), numbers=(1, 1))))
    assert "does not answer" in said  # nobody is the first

    said = " ".join(map(str, together(lambda job: job.wait("the end"), numbers=(0, 0))))
    assert "the ranks cannot meet" in said


# ---------------------------------------------------------------- what they agree on


def test_copies_of_the_images_make_parts_of_the_same_names(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART", 2)
    here, there = tmp_path / "here" / "class", tmp_path / "there" / "class"
    here.mkdir(parents=True)
    for index in range(4):
        (here / f"{index}.jpg").write_bytes(bytes([index]) * 9000)
    shutil.copytree(here, there, copy_function=shutil.copyfile)  # other times

    def parts_of(folder, settings):
        images = [folder / f"{index}.jpg" for index in range(4)]
        return Parts(tmp_path / "maps.hdf5", images, None, settings)

    first, second = parts_of(here, {"device": "cpu"}), parts_of(there, {"device": "cpu"})
    assert first.paths != second.paths
    second.adopt(first.facts())
    assert first.paths == second.paths

    with pytest.raises(UserError, match="device is cuda here and cpu there: start all ranks"):
        parts_of(there, {"device": "cuda"}).adopt(first.facts())
    compiled = parts_of(here, {"device": "cpu", "compile": True})
    with pytest.raises(UserError, match="compile is None here and True there: start all ranks"):
        parts_of(there, {"device": "cpu"}).adopt(compiled.facts())
    (there / "3.jpg").write_bytes(bytes(8999) + b"x")  # of the same size
    with pytest.raises(UserError, match="images 2 to 3 .*2.jpg on.* are not the first rank's"):
        parts_of(there, {"device": "cpu"}).adopt(first.facts())


def preprocess(argv):
    """The command with small parts, which the first rank soon sees."""
    parts.PART, parts.SEEN_AFTER = 4, 1
    preprocessing.main(argv)


def start_two(roots, outputs, log):
    """The command on two ranks, each with images and an output of its own."""
    argv = ["--dataset", "TOY", "--backbone", "efficientnet_lite2", "--img_size", "64", "-n", "0"]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = []
    for rank, (root, output) in enumerate(zip(roots, outputs, strict=True)):
        places = ["--data_root", str(root), "--output", str(output)]
        environment = address | {"RANK": str(rank)}
        own_log = log.with_name(f"{log.name}-{rank}.txt")
        processes.append(Fork(preprocess, argv + places, log=own_log, environment=environment))
    return zip(*[process.finish() for process in processes], strict=True)


@pytest.mark.slow
def test_ranks_with_images_of_their_own_join_them_or_refuse(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    toy.render(here, classes=7, unseen=2, images_per_class=5)
    shutil.copytree(here, there, copy_function=shutil.copyfile)
    output = tmp_path / "out" / "maps.hdf5"

    status, said = start_two((here, there), (output, output), tmp_path / "joined")
    assert status == (0, 0), said
    assert [path.name for path in output.parent.iterdir()] == ["maps.hdf5"]

    # an output of each rank's own is refused before the first image
    outputs = (tmp_path / "a" / "maps.hdf5", tmp_path / "b" / "maps.hdf5")
    status, said = start_two((here, there), outputs, tmp_path / "refused")
    assert status == (2, 2) and "another rank ended before its work was done" in said[0]
    assert "--output must lie in a folder that all ranks share" in said[1]
    assert not list(tmp_path.glob("[ab]/*"))

"""How many cores are granted, and what is set before torch is loaded."""

import math
import os
import subprocess
import sys

import pytest
import torch

from helpers import ROOT
from scegg.speed import threads

# what people start, and what they import first in a notebook
ENTRIES = ["model", "util"]
for file in [*ROOT.glob("*.py"), *ROOT.glob("scegg/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
    if '__name__ == "__main__"' in file.read_text(encoding="utf-8"):
        ENTRIES.append(".".join(file.relative_to(ROOT).with_suffix("").parts))

# stops where torch would be loaded, and says what is set by then
AT_TORCH = """
import os, sys
class Stop:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(*(os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")))
            sys.stdout.flush()
            os._exit(0)
sys.meta_path.insert(0, Stop())
import {module}
import torch
"""


def set_at_torch(module, **variables):
    """What is set when `module` loads torch: GOMP_SPINCOUNT and OMP_WAIT_POLICY."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", AT_TORCH.format(module=module)],
        env=environment | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
    )
    return done.stdout.split()


def test_every_command_is_among_the_entries():
    commands = {"preprocessing", "train_joint", "results", "visualize", "scegg.doctor"}
    commands |= {f"train_joint_{name}" for name in ("CUB", "SUN", "AWA2")}
    assert commands | {"scegg.datasets.toy", "benchmarks.__main__"} <= set(ENTRIES)


@pytest.mark.parametrize("module", sorted(set(ENTRIES)))
def test_every_command_sets_how_threads_wait_before_torch_is_loaded(module):
    assert set_at_torch(module) == [str(threads.SPINS), "None"]


def test_a_users_own_variables_win():
    assert set_at_torch("train_joint", GOMP_SPINCOUNT="7") == ["7", "None"]
    assert set_at_torch("train_joint", OMP_WAIT_POLICY="active") == ["None", "active"]


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A tree of control groups, and a way to say in which of them this process is."""
    monkeypatch.setattr(threads, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(threads, "CPU", tmp_path / "cpu")
    monkeypatch.setattr(threads, "allowed_cores", lambda: 8)

    def make(own="", **files):
        threads.granted_cores.cache_clear()
        (tmp_path / "own").write_text(own)
        for path, text in files.items():
            path = tmp_path / "cgroup" / path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    threads.granted_cores.cache_clear()
    yield make
    threads.granted_cores.cache_clear()


def test_without_a_quota_all_allowed_cores_are_granted(groups):
    assert math.isinf(threads.cpu_quota()) and threads.granted_cores() == 8
    groups("0::/\n", **{"cpu.max": "max 100000\n"})
    assert threads.granted_cores() == 8
    groups("1:cpu:/\n", **{"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"})
    assert threads.granted_cores() == 8


def test_the_smallest_quota_of_the_groups_above_counts(groups):
    groups("0::/job/step\n", **{"job/cpu.max": "250000 100000\n", "cpu.max": "400000 100000\n"})
    assert threads.cpu_quota() == 2.5 and threads.granted_cores() == 3
    groups("0::/job/step\n", **{"job/step/cpu.max": "20000 100000\n"})
    assert threads.cpu_quota() == 0.2 and threads.granted_cores() == 1


@pytest.mark.parametrize("text", ["max", "50000", "100000 0", "0 100000", "", "x y", "-1 nan"])
def test_a_quota_that_says_nothing_is_none(groups, text):
    groups("0::/\n\nodd line\n1:cpu\n", **{"cpu.max": text, "cpu/cpu.cfs_quota_us": text})
    assert threads.granted_cores() == 8


def test_a_group_may_have_any_name(groups, tmp_path):
    groups("0::/\n", **{"j\udcfcb/cpu.max": "150000 100000\n"})
    (tmp_path / "own").write_bytes(b"0::/j\xfcb\n")
    threads.granted_cores.cache_clear()
    assert threads.granted_cores() == 2


def test_quotas_of_version_1(groups):
    folder = "cpu,cpuacct/docker/ab"
    files = {f"{folder}/cpu.cfs_quota_us": "150000\n", f"{folder}/cpu.cfs_period_us": "50000\n"}
    groups("4:memory:/x\n3:cpu,cpuacct:/docker/ab\n1:name=systemd:/\n", **files)
    assert threads.granted_cores() == 3


def test_a_mount_of_version_1_may_name_its_controllers_in_another_order(groups, tmp_path):
    folder = "cpu,cpuacct/job"
    files = {f"{folder}/cpu.cfs_quota_us": "150000\n", f"{folder}/cpu.cfs_period_us": "50000\n"}
    groups("3:cpuacct,cpu:/job\n", **files)
    (tmp_path / "cgroup" / "cpu").symlink_to("cpu,cpuacct")
    assert threads.granted_cores() == 3


def test_a_quota_sets_the_number_of_threads_and_affinity_need_not(groups, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    threads.before_torch()
    assert os.environ == {"GOMP_SPINCOUNT": str(threads.SPINS)}

    groups("0::/\n", **{"cpu.max": "300000 100000\n"})
    threads.before_torch()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    os.environ["OMP_NUM_THREADS"] = ""
    threads.before_torch()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    os.environ["OMP_NUM_THREADS"] = "5"
    threads.before_torch()
    assert os.environ["OMP_NUM_THREADS"] == "5"


def test_mkl_is_fixed_on_intels_processors_alone(groups, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    for vendor, expected in (("AuthenticAMD", None), ("GenuineIntel", "AUTO")):
        (tmp_path / "cpu").write_text(f"processor : 0\nvendor_id : {vendor}\n")
        threads.before_torch()
        assert os.environ.get("MKL_CBWR") == expected

    os.environ["MKL_CBWR"] = "AVX2"
    threads.before_torch()
    assert os.environ["MKL_CBWR"] == "AVX2"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux's")
def test_affinity_decides():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
    code += "from scegg.speed.threads import granted_cores; print(granted_cores())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n"


def test_fixing_threads_changes_not_how_many_there_are():
    before = torch.get_num_threads()
    threads.fix_threads()
    assert torch.get_num_threads() == before

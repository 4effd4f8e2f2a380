"""How many threads compute, and how they wait for each other.

`before_torch` runs when `scegg` is imported: OpenMP reads its variables when torch is loaded, and
never again. So this module does not import torch before it is asked to.
"""

import functools
import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
CPU = Path("/proc/cpuinfo")
# turns of an empty loop before a waiting thread gives its core away; libgomp's own default is
# 300,000 or more
SPINS = 1000


def before_torch():
    """Set what torch's threads depend on in the environment; a user's own variables win.

    Threads that wait for each other give their cores away at once. By default they keep them for
    milliseconds. If another program wants the cores, every layer of a network then waits so long.
    Where a container grants a part of its machine, there are as many threads as granted cores.
    On Intel's processors MKL's switch for repeatable sums is on: it adds in one order, for as many
    threads. The numbers are those that it gives without.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
    # a job's script may set it to a variable that is empty
    if granted_cores() < allowed_cores() and not os.environ.get("OMP_NUM_THREADS", "").strip():
        os.environ["OMP_NUM_THREADS"] = str(granted_cores())
    if is_intels():
        os.environ.setdefault("MKL_CBWR", "AUTO")


def is_intels() -> bool:
    """Whether this is a processor of Intel's. On others, AUTO is a slow code path."""
    try:
        return "GenuineIntel" in CPU.read_text()
    except OSError:  # no Linux
        return False


# ---- cores


@functools.cache
def granted_cores() -> int:
    """Cores that this process may use: under taskset, Slurm or a quota fewer than there are."""
    return max(1, math.ceil(min(allowed_cores(), cpu_quota())))


def allowed_cores() -> int:
    """Cores that this process may run on, whatever their time is shared with."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota() -> float:
    """Cores whose time the control groups leave to this process; infinite without a limit."""
    folders = cgroup_folders("cpu")
    return min((quota for folder in folders for quota in quotas(folder)), default=math.inf)


def cgroup_folders(controller: str) -> Iterator[Path]:
    """The folders of the groups that may limit the time (cpu) or the memory of this process.

    They are its own groups and those above.
    """
    try:
        groups = OWN_CGROUPS.read_text(errors="surrogateescape").splitlines()
    except OSError:  # no Linux
        groups = []

    for line in ["0::/", *groups]:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        # version 1 mounts controllers below their names, version 2 all of them at once; where two
        # share a mount, some systems say "cpuacct,cpu" and mount "cpu,cpuacct", with a link "cpu"
        for mount in {CGROUPS / controllers, CGROUPS / controller} if controllers else {CGROUPS}:
            own = mount / group.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(mount))


def quotas(folder: Path) -> Iterator[float]:
    """The limits in a group's folder, in cores."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / file).read_text() for file in files).split()[:2]
            if float(quota) > 0:  # version 1 says -1 for no limit, version 2 "max"
                yield float(quota) / float(period)
        except (OSError, ValueError, ZeroDivisionError):
            pass


# ---- after torch is loaded


def fix_threads():
    """Let MKL use as many threads as torch, always: with others it adds in another order.

    By itself MKL may take fewer than it is allowed.
    """
    import torch

    torch.set_num_threads(torch.get_num_threads())

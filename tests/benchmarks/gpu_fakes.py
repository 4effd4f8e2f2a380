"""Parts that end in every way that a part can end; test_gpu.py runs them."""

import os
import signal
import subprocess
import sys
import time


def succeeds(job):
    job.add(measure="all is well", value=1.5, unit="ms")


def raises(job):
    job.add(measure="before it failed", value=1, unit="")
    raise ValueError("the numbers differ\nand more lines")


def hangs(job):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    job.add(measure="child", value=child.pid, unit="")
    time.sleep(100)


def is_killed(job):
    job.add(measure="before it was killed", value=2, unit="")
    os.kill(os.getpid(), signal.SIGKILL)


def runs_out_of_memory(job):
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

"""Parts that end in every way that a part can end, and commands without the start of Python."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time

from benchmarks.gpu.toy import Command
from util import exit_on_user_error


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


class Fork:
    """What is used of a Popen: a script's main function in a fork of a process that knows it."""

    def __init__(self, script, arguments, log):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train_joint", "preprocessing"])
        self.process = context.Process(target=run_script, args=(script, arguments, log))
        self.process.start()
        self.kill = self.process.kill

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join()
        return self.process.exitcode


def run_script(script, arguments, log):
    main = importlib.import_module(script).main
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        exit_on_user_error(lambda: main(arguments))


def start_fork(commands, name, script, *arguments):
    """In the place of `ToyCommands.start`."""
    log = commands.job.folder / f"{name}.log"
    return Command(Fork(script.removesuffix(".py"), arguments, log), log)

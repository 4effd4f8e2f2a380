"""TOY's commands without the start of Python, which takes seconds; test_gpu.py runs them."""

import contextlib
import importlib
import multiprocessing

from benchmarks.gpu.toy import Command
from util import exit_on_user_error


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

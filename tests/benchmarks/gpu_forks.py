"""TOY's commands as forks; test_gpu.py runs them."""

import importlib

from benchmarks.gpu.toy import Command
from forks import Fork


def run_main(script, arguments):
    importlib.import_module(script).main(arguments)


def start_fork(commands, name, script, *arguments):
    """In the place of `ToyCommands.start`."""
    log = commands.job.folder / f"{name}.log"
    return Command(Fork(run_main, script.removesuffix(".py"), arguments, log=log), log)

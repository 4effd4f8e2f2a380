"""Processes that are forks of one which knows the commands: starting Python takes seconds."""

import contextlib
import multiprocessing
import os

from util import exit_on_user_error


def forks():
    """multiprocessing's context of such processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_joint", "preprocessing"])
    return context


class Fork:
    """What is used of a Popen: `action(*arguments)` as a command, in a process of its own.

    action: a module's function. log: what it prints is added there, stderr too. environment: added
    to this process's.
    """

    def __init__(self, action, *arguments, log, environment=()):
        self.log = log
        variables = os.environ | dict(environment)
        self.process = forks().Process(target=run, args=(action, arguments, log, variables))
        self.process.start()
        self.kill = self.process.kill

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join()
        return self.process.exitcode

    def finish(self):
        """Wait for its end; returns (exit status, what it printed)."""
        return self.wait(), self.log.read_text()


def run(action, arguments, log, variables):
    os.environ.clear()
    os.environ.update(variables)
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        exit_on_user_error(lambda: action(*arguments))

"""W&B where nobody sits: nothing asks, nothing waits without an end."""

import os
import pty
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import ROOT
from scegg.run import wandb_mirror
from scegg.run.wandb_mirror import UNATTENDED
from util import UserError

PROGRAM = """
import os
import sys
from pathlib import Path
import util
from scegg.run import wandb_mirror

def main():
    wandb_mirror.UNATTENDED |= {"init_timeout": 2, "finish_timeout": 2}
    mode = wandb_mirror.wandb_mode(sys.argv[1] or None)
    run = wandb_mirror.start_wandb(mode, dir=str(Path.cwd()), id="some_run", resume="allow")
    run.log({"loss": 1})
    run.finish()
    print("it ran", run.settings.mode, flush=True)
    os._exit(0)  # what W&B still does at the end takes long

util.exit_on_user_error(main)
"""


def start(folder: Path, flag: str, **environment):
    """A run of W&B in a process with a terminal at which nobody types."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, flag],
        env=kept | {"HOME": str(folder), "PYTHONPATH": str(ROOT)} | environment,
        cwd=folder,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    try:
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    try:
        shown = os.read(ours, 100_000).decode()
    except OSError:  # nothing was written
        shown = ""
    os.close(ours)
    assert "Enter your choice" not in shown and "API key:" not in shown
    return process.returncode, said, shown


@pytest.mark.parametrize(
    "flag, environment",
    [("online", {}), ("", {"WANDB_MODE": "online", "WANDB_RELOGIN": "true"})],
)
def test_online_without_a_login_goes_on_offline(tmp_path, flag, environment):
    status, said, _ = start(tmp_path, flag, **environment)
    assert status == 0 and "it ran offline" in said
    assert said.count("W&B: nobody is logged in") == 1


def test_a_flag_stands_above_a_mode_of_the_environment(tmp_path):
    _, said, _ = start(tmp_path, "online", WANDB_MODE="offline")
    assert "W&B: nobody is logged in" in said and "it ran offline" in said


def test_a_server_that_never_answers_is_not_waited_for(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        status, said, _ = start(
            tmp_path,
            "",
            WANDB_BASE_URL=f"http://127.0.0.1:{silent.getsockname()[1]}",
            WANDB_API_KEY="a" * 40,
            WANDB_HTTP_TIMEOUT="86400",
            WANDB_INIT_TIMEOUT="86400",
            WANDB_SILENT="true",
        )
    assert status == 0 and "W&B could not start online" in said and "it ran offline" in said


def test_a_variable_that_cannot_be_is_one_line(tmp_path):
    status, _, shown = start(tmp_path, "disabled", WANDB_INIT_TIMEOUT="soon")
    assert status == 2
    assert shown.startswith("error: W&B: ") and "init_timeout" in shown
    assert shown.strip().count("\n") == 0


def test_a_token_that_cannot_be_read_goes_on_offline(tmp_path):
    token = str(tmp_path / "no" / "token")
    status, said, shown = start(tmp_path, "online", WANDB_IDENTITY_TOKEN_FILE=token)
    assert status == 0 and "it ran offline" in said and "no/token" in said
    assert "Traceback" not in shown


@pytest.mark.parametrize("failing, expected", [(1, "offline"), (2, "disabled")])
def test_whatever_wandb_raises_a_run_goes_on(tmp_path, monkeypatch, capsys, failing, expected):
    class Gone(Exception):
        """An error of W&B's that says nothing."""

    def init(mode, **settings):
        tried.append(mode)
        if len(tried) <= failing:
            raise Gone
        return mode

    tried = []
    stand_ins = {
        "init": init,
        "teardown": list,
        "login": lambda **flags: True,
        "setup": lambda settings: SimpleNamespace(settings=settings),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(wandb_mirror.wandb, name, stand_in)

    assert wandb_mirror.start_wandb("online", id="some_run") == expected
    assert capsys.readouterr().out.startswith("W&B could not start online (Gone): ")
    assert tried == ["online", "offline", "disabled"][: failing + 1]


def test_empty_variables_are_none(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_SWEEP_ID"):  # as a job's script sets them
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(wandb_mirror, "logged_in", lambda: False)
    assert wandb_mirror.wandb_mode(None) == "offline"
    assert not {"WANDB_MODE", "WANDB_RUN_ID", "WANDB_SWEEP_ID"} & os.environ.keys()


def test_a_variable_that_wandb_itself_refuses_is_told(monkeypatch):
    def refuse(settings):
        raise wandb_mirror.wandb.errors.UsageError("API key cannot start or end with whitespace")

    monkeypatch.setattr(wandb_mirror.wandb, "setup", refuse)
    with pytest.raises(UserError, match="whitespace: correct this WANDB_ variable"):
        wandb_mirror.set_up_wandb()


def test_waiting_is_bounded():
    assert UNATTENDED["relogin"] is False
    assert 0 < UNATTENDED["init_timeout"] <= 90 and 0 < UNATTENDED["finish_timeout"] <= 600

"""The rooms of SC-EGG (docs/design.md)."""

import getpass
import os
import tempfile
from pathlib import Path

from scegg.speed.threads import before_torch


def provide_user():
    """Give the user a name and a home where the system knows none, as in many containers.

    torch asks for the name when it is loaded, and W&B for the home.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"user{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.gettempdir()


provide_user()
before_torch()

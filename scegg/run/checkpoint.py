"""The state of a run, saved whole or not at all; a run that was stopped continues from it.

No random state is saved, because none is needed. Stages 1 and 2 draw all their batches at their
start, and every iteration of stage 3 draws from a stream of its own. The streams follow from the
run's seed (`util.seed_stream`): a step done again is the same step.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from scegg.run.checkpoint_content import check_content, check_frame
from util import UserError, load_tensors, save_tensors

PAUSE = 10  # times what a slow save took: so long no other is made without need
SLOW = 1.0  # seconds that make a save slow


class Stopped(Exception):
    """SIGTERM or Ctrl-C came, and the run is saved. signum: which."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def read_checkpoint(path: Path) -> dict:
    """The checkpoint in `path`: tensors, numbers and texts, no code.

    Raises UserError for a missing or damaged file, and for a disk that fails.
    """
    if not path.is_file():
        raise UserError(
            f"{path.parent} has no checkpoint, so there is nothing to resume: it is finished or "
            "never began"
        )
    with refusing_damage(path):
        saved = load_tensors(path)
        check_frame(saved)
    return saved


@contextlib.contextmanager
def refusing_damage(path: Path):
    """Any error within is the checkpoint's fault: it becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever torch's reader makes of damaged bytes
        raise UserError(f"{path} is damaged ({type(error).__name__}): start the run anew") from None


def check_saved(saved: dict, identity: dict, path: Path):
    """Raises UserError for a checkpoint of another run, and for one that no run writes.

    Another version may write other checkpoints, so it is asked first whose this one is.
    """
    check_identity(saved["identity"], identity, path)
    with refusing_damage(path):
        check_content(saved)


def check_identity(saved: dict, now: dict, path: Path):
    """Raises UserError that names every entry in which a checkpoint is not what is at hand."""
    names = sorted(set(saved) | set(now))
    differences = [
        f"{name} was {saved.get(name)} and is {now.get(name)}"
        for name in names
        if saved.get(name) != now.get(name)
    ]
    if differences:
        raise UserError(
            f"{path} belongs to another run: {', '.join(differences)}; make these as they were, or "
            "start a new run"
        )


class Checkpoint:
    """The state of a run, in one file.

    folder: the run's `RunFolder`; its log is cut back to what it was when the state was saved.
    identity: what must be equal for the run to continue (config, data, code), flat. saved: what
    `read_checkpoint` returned, None for a new run.

    `notes` holds numbers and texts to remember; parts are what `track` is given. `phase` is put
    before the names of the stages where these come twice (protocol validated).
    """

    def __init__(self, folder, identity: dict, saved: dict | None = None):
        saved = saved or {"parts": {}, "notes": {}, "steps": {}}
        self.folder, self.path = folder, folder.path / "checkpoint.pt"
        self.identity = identity
        self.notes, self.done, self.waiting = saved["notes"], saved["steps"], saved["parts"]
        self.phase, self.parts, self.signum = "", {}, None
        self.saved_at, self.save_took = time.monotonic(), 0.0

    def begin(self, phase: str):
        """Start a phase of the run: the stages come again, and nothing of the last one is kept."""
        self.phase = phase
        self.parts.clear()

    # ---- what is saved

    def track(self, **parts):
        """Save these from now on; those of a resumed run are loaded first.

        They have state_dict and load_state_dict. Raises UserError for a state that does not fit.
        """
        for name, part in parts.items():
            if name in self.waiting:
                try:
                    part.load_state_dict(self.waiting.pop(name))
                except (RuntimeError, KeyError, TypeError, ValueError, AttributeError):
                    raise UserError(
                        f"{self.path} is damaged ({name} does not fit): start the run anew"
                    ) from None
            self.parts[name] = part

    def forget(self, *names: str):
        """Save these no longer: their stage is over."""
        for name in names:
            self.parts.pop(name, None)
            self.waiting.pop(name, None)

    def save(self):
        """Write the state beside the last one, make it safe, and only then replace the last one.

        Raises UserError when a loss (LossMeter) or a weight is not finite: no checkpoint is ever
        made of a run that has gone wrong.
        """
        began = time.monotonic()
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                self.check_finite(name, part)

        state = {
            "identity": self.identity,
            "parts": parts | self.waiting,
            "notes": self.notes | {"logged": self.folder.sync()},
            "steps": self.done,
        }
        save_tensors(self.path, state)
        self.saved_at = time.monotonic()
        self.save_took = self.saved_at - began

    def saved_just_now(self) -> bool:
        """Whether saving again would take more than a tenth of a run's time."""
        pause = PAUSE * self.save_took
        return self.save_took > SLOW and time.monotonic() - self.saved_at < pause

    def check_finite(self, name: str, network: nn.Module):
        """Raises UserError if a weight of the network holds NaN or infinity."""
        for key, value in network.named_parameters():
            if not torch.isfinite(value).all():
                raise UserError(
                    f"{name}.{key} holds NaN or infinity: lower the learning rates. What was saved "
                    f"before stays: {self.path}"
                )

    # ---- steps

    def steps_done(self, stage: str) -> int:
        """How many steps of a stage are behind us."""
        return self.done.get(self.phase + stage, 0)

    def once(self, stage: str, action: Callable[[], None]):
        """A stage of a single step: do `action()`, unless it was done before."""
        for _ in self.steps(stage, 1, 1, "pass"):
            action()

    def steps(self, stage: str, total: int, every: int, unit: str) -> Iterator[int]:
        """The steps, from 1 to total, that a stage has still to do, behind a progress bar.

        Between them the state is saved every `every` steps, less often where saving is slow, and
        when a signal came. After a signal it raises Stopped, once the state is safe.
        """
        stage = self.phase + stage
        done = self.done.setdefault(stage, 0)
        bar = tqdm(total=total, initial=done, desc=stage, unit=unit, disable=None, leave=False)

        with bar:
            for step in range(done + 1, total + 1):
                with self.timed(stage):
                    yield step
                self.done[stage] = step
                bar.update()

                is_due = step % every == 0 and not self.saved_just_now()
                if is_due or step == total or self.signum:
                    self.save()
                if self.signum:
                    raise Stopped(self.signum)

    @contextlib.contextmanager
    def timed(self, name: str):
        """Add the seconds spent within to notes["seconds"][name]."""
        start = time.perf_counter()
        yield
        seconds = self.notes.setdefault("seconds", {})
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    @contextlib.contextmanager
    def signals(self):
        """Within: SIGTERM and Ctrl-C stop the run after its step. A second Ctrl-C does not wait."""

        def ask_to_stop(signum, _):
            if self.signum:
                raise KeyboardInterrupt
            self.signum = signum
            message = "stopping after this step (Ctrl-C again: at once)"
            print(message, file=sys.stderr, flush=True)

        before = {
            signum: signal.signal(signum, ask_to_stop) for signum in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

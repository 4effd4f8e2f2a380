"""A run that is killed goes on where it was: the state of everything that learns, saved whole or not at all.

No random state is saved, because none is needed: stages 1 and 2 draw all their batches at their start, and every
iteration of stage 3 draws from a stream of its own; the streams follow from the run's seed (util.seed_stream). A step done
again is the same step.
"""
import contextlib
import hashlib
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from util import UserError, save_tensors

# what the numbers of a run depend on: a checkpoint of other code is refused
ROOT = Path(__file__).resolve().parents[2]
CODE = [ROOT / "model.py", ROOT / "util.py", *sorted((ROOT / "scegg").rglob("*.py"))]


class Stopped(Exception):
    """SIGTERM or Ctrl-C came, and the run is saved. signum: which."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def code_version() -> str:
    """12 hex digits that change with the code that makes a run's numbers."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in CODE)).hexdigest()[:12]


def read_checkpoint(path: Path) -> dict:
    """The checkpoint in `path`: tensors, numbers and texts, no code. Raises UserError for a missing or damaged file."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no checkpoint, so there is nothing to resume: it is finished or never began")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        known = {"features": str, "logged": int, "wandb_id": str}
        if not (all(isinstance(saved[name], dict) for name in ("identity", "parts", "facts", "steps"))
                and all(isinstance(saved["facts"][name], kind) for name, kind in known.items())):
            raise ValueError("not what a run writes")
        return saved
    except Exception as error:  # whatever torch's reader makes of damaged bytes
        raise UserError(f"{path} is damaged ({type(error).__name__}): start the run anew") from None


def check_identity(saved: dict, now: dict, path: Path):
    """Raises UserError naming every entry in which a checkpoint's data, config or code are not those at hand."""
    pairs = [(key, saved.get(key), now.get(key)) for key in sorted(set(saved) | set(now)) if saved.get(key) != now.get(key)]
    if pairs:
        raise UserError(f"{path} belongs to another run: " + ", ".join(f"{key} was {old} and is {new}" for key, old, new in pairs)
                        + "; make these as they were, or start a new run")


class Checkpoint:
    """The state of a run, in one file.

    identity: what must be the same for the run to go on (config, data, code), flat; saved: what read_checkpoint returned,
    None for a new run; run: its logs, which are cut back to what they were when the state was saved.
    `facts` holds numbers and texts to remember, parts are what `track` is given.
    """

    def __init__(self, run, identity: dict, saved: dict | None = None):
        saved = saved or {"parts": {}, "facts": {}, "steps": {}}
        self.run, self.path, self.identity = run, run.folder / "checkpoint.pt", identity
        self.facts, self.done, self.waiting = saved["facts"], saved["steps"], saved["parts"]
        self.phase, self.parts, self.signum = "", {}, None

    def track(self, **parts):
        """Save these (they have state_dict and load_state_dict) from now on; those of a resumed run are loaded first."""
        for name, part in parts.items():
            if name in self.waiting:
                try:
                    part.load_state_dict(self.waiting.pop(name))
                except (RuntimeError, KeyError, TypeError, ValueError, AttributeError):
                    raise UserError(f"{self.path} is damaged ({name} does not fit): start the run anew") from None
            self.parts[name] = part

    def forget(self, *names: str):
        """Save these no longer: their stage is over."""
        for name in names:
            self.parts.pop(name, None)
            self.waiting.pop(name, None)

    def begin(self, phase: str):
        """Start a phase of the run, in which the stages come again; nothing of the one before is needed."""
        self.phase = phase
        self.parts.clear()

    def steps_done(self, stage: str) -> int:
        """How many steps of a stage are behind us."""
        return self.done.get(self.phase + stage, 0)

    def once(self, stage: str):
        """A stage of a single step: yields once, or not at all when it was done before."""
        return self.steps(stage, 1, 1, "pass")

    def steps(self, stage: str, total: int, every: int, unit: str):
        """Yield the steps (1 to total) that a stage has still to do; between them, save every `every` and when asked to stop.

        Draws a progress bar. Raises Stopped after a signal, once the state is safe.
        """
        stage = self.phase + stage
        first = self.done.setdefault(stage, 0) + 1
        with tqdm(total=total, initial=first - 1, desc=stage, unit=unit, disable=None, leave=False) as progress:
            for step in range(first, total + 1):
                with self.timed(stage):
                    yield step
                self.done[stage] = step
                progress.update()
                if step % every == 0 or step == total or self.signum:
                    self.save()
                if self.signum:
                    raise Stopped(self.signum)

    @contextlib.contextmanager
    def timed(self, name: str):
        """Add the seconds spent within to facts["seconds"][name]."""
        start = time.perf_counter()
        yield
        seconds = self.facts.setdefault("seconds", {})
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    def save(self):
        """Write the state beside the last one, make it safe, and only then let it take its place.

        Raises UserError when a loss (LossMeter) or a weight is not finite: a checkpoint is never made of a run that has gone wrong.
        """
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        for name, part in self.parts.items():
            for key, value in part.named_parameters() if isinstance(part, nn.Module) else ():
                if not torch.isfinite(value).all():
                    raise UserError(f"{name}.{key} holds NaN or infinity: lower the learning rates. What was saved before stays: {self.path}")
        state = {"identity": self.identity, "parts": parts | self.waiting, "facts": self.facts | {"logged": self.run.sync()},
                 "steps": self.done}
        save_tensors(self.path, state)

    @contextlib.contextmanager
    def signals(self):
        """Within: SIGTERM and Ctrl-C stop the run after the step in hand. A second Ctrl-C does not wait."""
        def ask_to_stop(signum, _):
            if self.signum:
                raise KeyboardInterrupt
            self.signum = signum
            print("stopping after this step (Ctrl-C again: at once)", file=sys.stderr, flush=True)

        before = {signum: signal.signal(signum, ask_to_stop) for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

"""All that a GPU has to show, part by part, each saved as soon as it is there (docs/gpu.md).

    python -m benchmarks.gpu                              everything: 8 minutes on an H100
    python -m benchmarks.gpu --parts cub,cub_tf32         these parts; others stay as they were
    python -m benchmarks.gpu --minutes 4                  half the time for each part
    python -m benchmarks.gpu --small --output FOLDER      a rehearsal at small sizes, without a GPU

Writes docs/benchmark_gpu.md and docs/records/benchmark_gpu_<card>.json, or both below --output.
The exit status is 1 if a part failed.
"""

import argparse
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.parts import MINUTES, PARTS, ROOT, Job, Outcome, Part, run_part
from benchmarks.gpu.record import Record
from util import FlagParser, UserError, exit_on_user_error


def main(argv=None):
    """Run the parts; exit with 1 if one failed."""
    options = parse_arguments(argv)
    chosen = choose_parts(options.parts)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    output = options.output or ROOT / "docs"
    if options.output is None and (options.small or card is None):
        raise UserError(
            "figures are kept in docs/ only if a GPU made them at full size: rehearse with "
            "--small --output FOLDER"
        )

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a part must not outlive us
    record = Record(output, card, options.small)
    print(f"{card or 'CPU rehearsal: no figure of a GPU is among these'}, {len(chosen)} parts")
    states = run_parts(chosen, options, record)

    failed = [name for name, outcome in states.items() if outcome.state == "failed"]
    print(f"\nwrote {record.page_path} and {record.json_path}")
    if failed:
        print(f"{len(failed)} of {len(states)} parts failed: {', '.join(failed)}")
        sys.exit(1)


def parse_arguments(argv=None) -> argparse.Namespace:
    """The command line's options. Raises UserError for one that cannot be."""
    parser = FlagParser("Measure everything that a GPU has to show.")
    add = parser.add_argument
    add("--parts", help=f"some of {','.join(part.name for part in PARTS)} (default: all)")
    helps = f"for the whole command; each part gets its share (default: {MINUTES:.0f})"
    add("--minutes", type=float, default=MINUTES, help=helps)
    add("--small", action="store_true", help="a rehearsal: everything at small sizes")
    add("--output", type=Path, help="folder of the page and of records/ (default: docs)")
    helps = "photographs for part e (default: TOY's, which are rendered)"
    add("--photographs", type=Path, metavar="FOLDER", help=helps)
    options = parser.parse_args(argv)

    if options.photographs:
        options.photographs = options.photographs.resolve()  # parts run in the checkout
    if not options.minutes > 0:
        raise UserError(f"--minutes {options.minutes}: must be above 0")
    return options


def choose_parts(names: str | None) -> list[Part]:
    """The parts of these names, in their order; all for None. Raises UserError for others."""
    if names is None:
        return PARTS
    wanted = names.split(",")
    unknown = set(wanted) - {part.name for part in PARTS}
    if unknown:
        known = ", ".join(part.name for part in PARTS)
        raise UserError(f"--parts {','.join(sorted(unknown))}: the parts are {known}")
    return [part for part in PARTS if part.name in wanted]


def run_parts(parts: list[Part], options, record: Record) -> dict[str, Outcome]:
    """Run the parts, each within its share of the time, and note what comes of them."""
    share = options.minutes / MINUTES
    ends = time.monotonic() + 60 * options.minutes
    outcomes = {}

    for part in parts:
        limit = min(part.seconds * share, ends - time.monotonic())
        print(f"\n{part.title} (at most {limit:.0f} s)", flush=True)
        note = partial(record.note, part, limit)
        # what a part had started and was ended with it may still hold its files for a moment
        made = tempfile.TemporaryDirectory(prefix=f"{part.name}-", ignore_cleanup_errors=True)
        with made as folder:
            job = Job(Path(folder), 0.0, options.small, options.photographs)
            outcome = run_part(part, limit, job, tell=note)
        note(outcome)
        outcomes[part.name] = outcome
        problem = f": {outcome.error}" if outcome.error else ""
        print(f"{outcome.state} in {outcome.seconds:.0f} s{problem}", flush=True)
    return outcomes


if __name__ == "__main__":
    exit_on_user_error(main)

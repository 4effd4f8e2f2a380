"""Check a finished run's numbers, or let it name pictures.

    python evaluate.py --run runs/X                          its table again, every number checked
    python evaluate.py --run runs/X --report                 and per_class.csv, confusions.csv
    python evaluate.py --run runs/X --images a.jpg folder/   the most probable classes of pictures

Exit status 1: a number differs, or a picture could not be read; 2: a mistake.
"""

import scegg  # noqa: F401, first: it sets what torch reads when it is loaded

# isort: split
import contextlib
import os
import sys
from pathlib import Path

import torch

from scegg.datasets.layouts import add_own_layouts
from scegg.features.images import MEGAPIXELS
from scegg.report.evaluation import differences, evaluate_run, write_report
from scegg.report.prediction import FORMATS, HEADS, Predictor, predict
from scegg.run.summary import result_rows, result_table
from scegg.run.trained import RunFiles, read_run, winners_of, with_features
from scegg.speed.allocator import keep_freed_memory
from scegg.speed.onednn import fast_matmul
from scegg.speed.threads import fix_threads
from util import FlagParser, UserError, exit_on_user_error, one_line, pick_device


def main(argv=None):
    """Do what the flags ask for. Raises UserError for what a user can put right."""
    options = parse_arguments(argv)
    keep_freed_memory()
    fix_threads()

    add_own_layouts(Path("data"))
    files = read_run(options.run)
    torch.set_float32_matmul_precision(files.config.matmul_precision)
    all_is_well = name_pictures if options.images else check_numbers
    if not all_is_well(files, options):
        sys.exit(1)


def parse_arguments(argv=None):
    """The flags. Raises UserError for wrong ones."""
    parser = FlagParser(__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--run", type=Path, required=True, help="the run's folder")
    flag("--device", help="cpu, cuda or a GPU's number (default: the run's kind, if it is there)")
    flag("--output", type=Path, help="folder of what is written (default: the run's)")

    flag("--features", type=Path, help="HDF5 feature file (default: where preprocessing puts it)")
    flag("--report", action="store_true", help="write per_class.csv and confusions.csv")

    flag("--images", type=Path, nargs="+", help="picture files, and folders of them")
    flag("--attention", action="store_true", help="draw what spoke for each picture's best class")
    flag("--format", choices=list(FORMATS), default="text", help="json: one object a line")
    flag("--weights", type=Path, help="the backbone's state dict, if the features had one")
    help = f"a larger picture is refused as a decompression bomb (default: {MEGAPIXELS})"
    flag("--max_megapixels", type=int, default=MEGAPIXELS, help=help)
    options = parser.parse_args(argv)

    others = ("features", "report") if options.images else ("attention", "weights")
    wrong = [f"--{name}" for name in others if getattr(options, name)]
    if options.format != "text" and not options.images:
        wrong.append("--format")
    if wrong:
        raise UserError(f"{wrong[0]} goes {'without' if options.images else 'with'} --images")
    if options.max_megapixels < 1:
        raise UserError(f"--max_megapixels {options.max_megapixels}: must be at least 1")
    if options.output and not (options.report or options.attention):
        raise UserError("--output goes with --report or --attention")
    return options


def device_of_run(files: RunFiles, name: str | None) -> torch.device:
    """The device named, else one of the run's kind if there is one, and a line if there is none."""
    kind = "cuda" if files.summary.get("device") == "cuda" else "cpu"
    if name is None and kind == "cuda" and not torch.cuda.is_available():
        print("the run was computed on cuda, which is not here: this is on cpu", file=sys.stderr)
        kind = "cpu"
    return pick_device(name or kind)


def check_numbers(files: RunFiles, options) -> bool:
    """Print the run's table from its features and weights; whether all numbers are as reported."""
    winners = winners_of(files)
    device = device_of_run(files, options.device)
    run = with_features(files, options.features)
    with fast_matmul(device):
        numbers, answers = evaluate_run(run, winners, device)

    rows = result_rows({"protocol": run.config.protocol} | numbers)
    features = run.features
    published, w2v = features.split.is_published(run.dataset), features.provenance.get("w2v")
    print(result_table(run.dataset, published, rows, w2v))
    if options.report:
        folder = options.output or options.run
        write_report(folder, answers, run.features.class_names)
        print(f"wrote {folder}: per_class.csv, confusions.csv")

    wrong = differences(numbers, files.summary)
    for line in wrong:
        print(f"differs: {line}", file=sys.stderr)
    if wrong:
        print(
            f"{len(wrong)} numbers differ: the run was computed on {files.summary.get('device')}, "
            f"this on {device.type}. Is {run.features.path} the file it was trained on, else name "
            "it with --features? On another processor, or with another torch, rounding can change "
            "last digits and move an image to another class",
            file=sys.stderr,
        )
    else:
        print(f"all {len(numbers)} numbers of summary.json are the same to the last digit")
    return not wrong


def name_pictures(files: RunFiles, options) -> bool:
    """Print the most probable classes of pictures; whether every picture could be read."""
    problems = 0

    def tell(line: str):
        nonlocal problems
        problems += 1
        print(f"error: {one_line(line)}", file=sys.stderr, flush=True)

    out, count = sys.stdout, 0
    if hasattr(out, "reconfigure"):  # file names may be of any bytes
        out.reconfigure(encoding="utf-8", errors="surrogateescape")
    folder = (options.output or options.run) / "attention" if options.attention else None
    device = device_of_run(files, options.device)

    with contextlib.redirect_stdout(sys.stderr), fast_matmul(device):
        predictor = Predictor(files, device, options.weights)
        put(out, HEADS.get(options.format, ""))
        pictures = predict(predictor, options.images, device, tell, folder, options.max_megapixels)
        for item in pictures:
            put(out, FORMATS[options.format](item))
            count += 1

    if not count and not problems:
        raise UserError(f"{', '.join(map(str, options.images))}: there are no pictures in there")
    if problems:
        print(f"{count} pictures were named, {problems} could not be read", file=sys.stderr)
    return not problems


def put(out, text: str):
    """Print at once. Raises UserError if nobody reads it or the disk is full."""
    if out is None:
        raise UserError("the classes could not be printed (stdout is closed)")
    try:
        out.write(text)
        out.flush()
    except OSError as error:
        # else Python tries once more at its end, and complains
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        raise UserError(f"the classes could not be printed ({error.strerror})") from None


if __name__ == "__main__":
    exit_on_user_error(main)

"""Figures of runs: t-SNE of the visual spaces, attention maps, seen-unseen and learning curves.

    python visualize.py tsne --run runs/X --cnn_run runs/Y      Y: a run with visual_features: cnn
    python visualize.py attention --run runs/X --count 4        test images of the run's dataset
    python visualize.py attention --run runs/X --images a.jpg   any images
    python visualize.py curve --run runs/X                      the seen-unseen curve
    python visualize.py curves --run runs/X runs/Y              learning curves; X, Y: seeds

Each command writes a PDF and a PNG into the run's folder; curves of several runs lie beside it.
"""

from pathlib import Path

from matplotlib.figure import Figure

from scegg.datasets.layouts import add_own_layouts
from scegg.features.images import MEGAPIXELS
from scegg.report.attention import attention_figure, dataset_images, read_images
from scegg.report.curves import curve_figure, read_curve
from scegg.report.learning import learning_figure, read_logs
from scegg.report.style import save
from scegg.report.tsne import tsne_figure
from scegg.run.trained import RunFiles, TrainedRun, read_run, with_features
from util import FlagParser, UserError, exit_on_user_error

# what a run and its baseline share in summary.json; older runs lack some of it
SAME_DATA = ("dataset", "split_fingerprint", "backbone", "features")


def main(argv=None):
    """Draw the figure and write its files."""
    options = parse_arguments(argv)
    save(draw(options), options.output or default_output(options))


def default_output(options) -> Path:
    """Where a figure goes: into the run's folder, that of several runs beside the first."""
    if options.command != "curves":
        return options.run / options.command
    folder = options.run[0] if len(options.run) == 1 else options.run[0].resolve().parent
    return folder / "curves"


def draw(options) -> Figure:
    """The figure that the command line asks for."""
    if options.command == "curves":
        return learning_figure(read_logs(options.run))
    if options.command == "curve":
        curve = read_curve(options.run / "seen_unseen_curve.csv")
        return curve_figure(curve, options.run.resolve().name)

    add_own_layouts(getattr(options, "data_root", Path("data")))
    files = read_run(options.run)
    run = with_features(files, options.features)
    print(run.features.split.describe(run.dataset))
    if options.command == "tsne":
        return tsne_figure(run, baseline_of(files, options), options.seed)

    if options.images:
        images = read_images(run, options.images, options.weights, options.max_megapixels)
    else:
        images = dataset_images(
            run, options.data_root, options.count, options.seed, options.max_megapixels
        )
    return attention_figure(run, images)


def baseline_of(run: RunFiles, options) -> TrainedRun | None:
    """The run that --cnn_run names. Raises UserError unless it was trained on `run`'s features."""
    if options.cnn_run is None:
        return None
    cnn = read_run(options.cnn_run)
    known = [name for name in SAME_DATA if name in run.summary and name in cnn.summary]
    if any(run.summary[name] != cnn.summary[name] for name in known):
        raise UserError(
            f"{options.cnn_run} was not trained on the features of {options.run}: leave --cnn_run "
            "out, or name a run on the same ones"
        )
    return with_features(cnn, options.features)


def parse_arguments(argv=None):
    """The command and its flags. Raises UserError for wrong ones, and for runs that are missing."""
    parser = FlagParser("Draw figures of a finished run, as PDF and PNG.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=command_parser)
    add_tsne(commands)
    add_attention(commands)
    add_curve(commands)
    add_curves(commands)
    options = parser.parse_args(argv)

    for name, least in (("seed", 0), ("count", 1), ("max_megapixels", 1)):
        value = getattr(options, name, least)
        if not least <= value < 2**32:
            raise UserError(f"--{name} {value}: must be from {least} to {2**32 - 1}")
    runs = options.run if isinstance(options.run, list) else [options.run]
    for folder in (*runs, getattr(options, "cnn_run", None)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder}: there is no such run")
    return options


def command_parser(prog: str, description: str) -> FlagParser:
    """A command's parser, which argparse names itself."""
    parser = FlagParser(description)
    parser.prog = prog
    return parser


def add_command(
    commands, name: str, help: str, runs: str = "the run's folder", **several
) -> FlagParser:
    """A command with the flags that all have."""
    command = commands.add_parser(name, help=help, description=help)
    command.add_argument("--run", type=Path, required=True, help=runs, **several)
    command.add_argument(
        "--output",
        type=Path,
        default=None,
        help="file name less .pdf (default: in the run's folder)",
    )
    return command


def add_features(command: FlagParser):
    """The flags of a command that reads feature maps."""
    command.add_argument(
        "--features",
        type=Path,
        default=None,
        help="HDF5 feature file (default: where preprocessing.py puts it)",
    )

    command.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the choice of classes and images, and of t-SNE",
    )


def add_tsne(commands):
    """visualize.py tsne."""
    text = "t-SNE of real and synthetic features in the CNN's and the dense-semantic visual space"
    command = add_command(commands, "tsne", text)
    add_features(command)

    command.add_argument(
        "--cnn_run",
        type=Path,
        default=None,
        help="run of the CNN-feature baseline, for its synthetic features",
    )


def add_attention(commands):
    """visualize.py attention."""
    command = add_command(commands, "attention", "attention maps over images")
    add_features(command)

    command.add_argument(
        "--images",
        type=Path,
        nargs="+",
        default=None,
        help="image files (default: test images of the dataset)",
    )

    command.add_argument("--count", type=int, default=4, help="so many test images")
    command.add_argument(
        "--max_megapixels",
        type=int,
        default=MEGAPIXELS,
        help=f"a larger image is refused as a decompression bomb (default: {MEGAPIXELS})",
    )
    command.add_argument(
        "--data_root", type=Path, default=Path("data"), help="where the dataset's images are"
    )
    command.add_argument(
        "--weights",
        type=Path,
        default=None,
        help="the backbone's state dict, if the features were made with one",
    )


def add_curve(commands):
    """visualize.py curve."""
    add_command(commands, "curve", "accuracy on seen over accuracy on unseen classes")


def add_curves(commands):
    """visualize.py curves."""
    text = "learning curves: losses, the critic's terms, accuracies with the picked epoch"
    runs = "the run's folder, or those of several seeds of one config: mean and band"
    add_command(commands, "curves", text, runs, nargs="+")


if __name__ == "__main__":
    exit_on_user_error(main)

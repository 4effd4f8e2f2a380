"""What a run shows at its end: its figures, and what W&B has of them.

This module is cheap to import. Matplotlib and scikit-learn, which take seconds to load, are
imported when there is something to draw.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path

from scegg.features.reader import Features
from scegg.run.identity import identity_of_data
from scegg.run.main import Job
from scegg.run.reuse import finished_runs
from scegg.run.trained import RunFiles, TrainedRun, load_run, read_run, winners_of
from scegg.run.wandb_mirror import Mirror
from scegg.speed.onednn import fast_matmul
from util import UserError

IMAGES = 4  # that the attention figure shows
CAPTIONS = {
    "curves": "learning curves; a star is a picked epoch",
    "tsne": "t-SNE of real and synthetic features in both visual spaces",
    "attention": "attention: the image, GEN's map, LEN's best attributes",
    "curve": "accuracy on seen over accuracy on unseen classes, by seen_bias",
}


def report_run(folder: Path, job: Job, data_root: Path, mirror: Mirror):
    """Draw what the config of a finished run asks for into its folder, and tell W&B.

    That are the learning curves (`log_curves`), t-SNE, attention maps and the seen-unseen curve
    (`log_figures`); with `log_model` W&B gets the accuracy of every class as a table. What fails
    is said in one line: the run is finished, a picture is not worth a traceback.
    """
    names = ["curves"] if job.config.log_curves else []
    if job.config.log_figures:
        names += ["tsne", "attention", "curve"]
    drawings = run_drawings(folder, job, data_root)

    for name in names:
        with told(f"no {name} picture"):
            from scegg.report.style import save

            save(drawings[name](), folder / name)
            caption = f"{job.dataset}: {CAPTIONS[name]}"
            mirror.log_picture(name, folder / f"{name}.png", caption)
    if job.config.log_model:
        with told("no table of the classes"):
            log_classes(folder, job, mirror)


@contextlib.contextmanager
def told(problem: str):
    """Within: an error is said in one line."""
    try:
        yield
    except Exception as error:
        print(f"{problem}: {UserError(error)}")


def run_drawings(folder: Path, job: Job, data_root: Path) -> dict[str, Callable]:
    """What draws each picture of a finished run. Each imports what it alone needs."""

    @functools.cache
    def run() -> TrainedRun:
        return trained(folder, job, read_run(folder))

    def draw_curves():
        from scegg.report.learning import learning_figure, read_logs

        return learning_figure(read_logs([folder]))

    def draw_tsne():
        from scegg.report.tsne import tsne_figure

        return tsne_figure(run(), baseline_beside(folder, job.dataset, job.features))

    def draw_attention():
        from scegg.report.attention import attention_figure, dataset_images

        return attention_figure(run(), dataset_images(run(), data_root, IMAGES, job.config.seed))

    def draw_curve():
        from scegg.report.curves import curve_figure, read_curve

        return curve_figure(read_curve(folder / "seen_unseen_curve.csv"), folder.name)

    return {
        "curves": draw_curves,
        "tsne": draw_tsne,
        "attention": draw_attention,
        "curve": draw_curve,
    }


def trained(folder: Path, job: Job, files: RunFiles) -> TrainedRun:
    """The finished run, with the features that it has open."""
    return TrainedRun(folder.name, job.dataset, job.config, job.features, files.weights)


def log_classes(folder: Path, job: Job, mirror: Mirror):
    """W&B's table of every class's accuracy, for each group of the run's numbers."""
    from scegg.report.evaluation import PER_CLASS, evaluate_run, per_class_rows

    files = read_run(folder)
    with fast_matmul(job.device):  # as the run computed: the same answers
        run = trained(folder, job, files)
        _, answers = evaluate_run(run, winners_of(files), job.device)
    names = job.features.class_names
    rows = [row for answer in answers for row in per_class_rows(answer, names)]
    mirror.log_table("per_class", PER_CLASS, rows)


def baseline_beside(folder: Path, dataset: str, features: Features) -> TrainedRun | None:
    """The newest run of the CNN-feature baseline on the same features, beside a run's folder.

    None if there is none.
    """
    wanted = identity_of_data(features) | {"dataset": dataset, "visual_features": "cnn"}
    found = next(finished_runs(folder.parent, wanted), None)
    return None if found is None else load_run(found, features.path)

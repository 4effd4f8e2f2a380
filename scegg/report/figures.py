"""The figures that a run with log_figures draws at its end.

This module is cheap to import. Matplotlib and scikit-learn, which take seconds to load, are
imported when there is something to draw.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from scegg.config import Config
from scegg.features.reader import Features
from scegg.run.identity import identity_of_data
from scegg.run.reuse import finished_runs
from scegg.run.trained import TrainedRun, load_run
from util import UserError

IMAGES = 4  # that the attention figure shows


def draw_run_figures(
    folder: Path,
    dataset: str,
    config: Config,
    features: Features,
    data_root: Path,
    log_picture: Callable[[str, Path, str], None],
):
    """Draw a finished run's t-SNE, attention maps and curves into its folder.

    features: those of the run. log_picture(name, path, caption) is told of every PNG. A figure that
    cannot be drawn is said in one line: the run is finished, a picture is not worth a traceback.
    """
    from scegg.report.attention import attention_figure, dataset_images
    from scegg.report.curves import curve_figure, read_curve
    from scegg.report.learning import learning_figure, read_logs
    from scegg.report.style import save
    from scegg.report.tsne import tsne_figure

    weights = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
    run = TrainedRun(folder.name, dataset, config, features, weights)

    def draw_tsne():
        return tsne_figure(run, baseline_beside(folder, dataset, features))

    def draw_attention():
        return attention_figure(run, dataset_images(run, data_root, IMAGES, config.seed))

    def draw_curve():
        return curve_figure(read_curve(folder / "seen_unseen_curve.csv"), folder.name)

    def draw_curves():
        return learning_figure(read_logs([folder]))

    drawings = {
        "curves": (draw_curves, "learning curves; a star is a picked epoch"),
        "tsne": (draw_tsne, "t-SNE of real and synthetic features in both visual spaces"),
        "attention": (draw_attention, "attention: the image, GEN's map, LEN's best attributes"),
        "curve": (draw_curve, "accuracy on seen over accuracy on unseen classes, by seen_bias"),
    }
    for name, (draw, caption) in drawings.items():
        try:
            save(draw(), folder / name)
            log_picture(name, folder / f"{name}.png", f"{dataset}: {caption}")
        except Exception as error:
            print(f"no {name} picture: {UserError(error)}")


def baseline_beside(folder: Path, dataset: str, features: Features) -> TrainedRun | None:
    """The newest run of the CNN-feature baseline on the same features, beside a run's folder.

    None if there is none.
    """
    wanted = identity_of_data(features) | {"dataset": dataset, "visual_features": "cnn"}
    found = next(finished_runs(folder.parent, wanted), None)
    return None if found is None else load_run(found, features.path)

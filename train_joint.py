"""One run of SC-EGG: SCEN (LEN + GEN), scaler, distillation, EGGN with evaluation; TOY by default.

    python train_joint.py                  the embedded TOY dataset
    python train_joint_CUB.py --seed 1     a dataset of the paper; any key of its config is a flag
"""
import contextlib
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from config import Config, parse_flags, read_config
from dataset import BalancedSampler, FeatureMaps, Features, Place, choose_place, open_features
from eggn import EGGN, train_epoch
from evaluation import Metrics, evaluate, logits_metrics
from logs import Run, git_commit, wandb_mode
from model import SCEN
from scen import distill, embed_splits, fit_scen
from util import FlagParser, UserError, exit_on_user_error, keep_freed_memory, peak_memory_gb, pick_device, seed_everything
from xlsa17 import LAYOUTS, feature_file, read_split

CONFIGS = Path(__file__).resolve().parent / "wandb_config"
SPLITS = ("trainval", "test_seen", "test_unseen")


class Stopwatch:
    """Seconds each stage took, by name."""

    def __init__(self):
        self.seconds = {}

    @contextlib.contextmanager
    def stage(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def bar(total: int, what: str, unit: str) -> tqdm:
    """A progress bar, quiet when stderr is not a terminal."""
    return tqdm(total=total, desc=what, unit=unit, disable=None, leave=False)


def place_of_maps(features: Features, device: torch.device, cache: str) -> Place:
    """Where trainval's feature maps are to be kept, printed."""
    size = len(features.split.trainval) * math.prod(features.shape) * 4
    place = choose_place(size, device, features.path.parent, features.compressed, cache)
    print(f"feature maps of trainval, {size / 1e9:.2f} GB: kept {place}")
    return place


def load_maps(features: Features, device: torch.device, place: Place) -> dict[str, FeatureMaps]:
    """The feature maps of each split: trainval at `place` (stage 1 draws from it), the others streamed once."""
    indices = {name: getattr(features.split, name) for name in SPLITS}
    with bar(len(indices["trainval"]), "reading feature maps", "image") as progress:
        maps = {"trainval": FeatureMaps(features, indices["trainval"], device, place, progress.update)}
    return maps | {name: FeatureMaps(features, indices[name], device) for name in SPLITS[1:]}


class Best:
    """Final and best metrics of a run, the best by the paper's protocol: by H (by acc_zs without GZSL), acc_zs apart."""

    def __init__(self, gzsl: bool):
        self.gzsl, self.last, self.epoch = gzsl, None, None
        self.acc_zs, self.gzsl_metrics = -1.0, Metrics(-1.0, -1.0, -1.0, -1.0)

    def update(self, epoch: int, metrics: Metrics) -> dict:
        """Take an epoch's metrics; returns what is logged of it."""
        self.last = metrics
        if metrics.acc_zs > self.acc_zs:
            self.acc_zs = metrics.acc_zs
            self.epoch = self.epoch if self.gzsl else epoch
        if self.gzsl and metrics.H > self.gzsl_metrics.H:
            self.gzsl_metrics, self.epoch = metrics, epoch
        return {"epoch": epoch} | present(metrics._asdict()) | self.as_dict()

    def as_dict(self) -> dict:
        """best_acc_zs, and best_acc_unseen, best_acc_seen, best_H of the epoch with the best H."""
        best = {"best_acc_zs": self.acc_zs}
        if self.gzsl:
            best |= {f"best_{name}": getattr(self.gzsl_metrics, name) for name in ("acc_unseen", "acc_seen", "H")}
        return best


def present(values: dict) -> dict:
    """The entries that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def train(dataset: str, features: Features, config: Config, device: torch.device, place: Place, run: Run) -> tuple[str, dict]:
    """The whole procedure. Returns the result table as text and the summary."""
    seed_everything(config.seed)
    torch.set_float32_matmul_precision(config.matmul_precision)
    clock, split = Stopwatch(), features.split
    with clock.stage("read"):
        maps = load_maps(features, device, place)
    labels = {name: torch.from_numpy(split.labels[getattr(split, name)]).to(device) for name in SPLITS}
    seen, unseen, att = (torch.from_numpy(array).to(device) for array in (split.seen, split.unseen, split.att))
    sampler = BalancedSampler(labels["trainval"].cpu(), config.batch_size)
    table = ResultTable(dataset, split.is_published(dataset))

    def log_iteration(stage):
        return lambda iteration, losses: run.log(stage, {"iteration": iteration} | losses)

    # stage 1: LEN and GEN jointly
    scen = SCEN(torch.from_numpy(features.w2v), att.cpu(), features.shape[0], config.compose_runtime).to(device)
    with clock.stage("scen"), bar(config.scen_iterations, "stage 1: SCEN", "iteration") as progress:
        fit_scen(scen, maps["trainval"], sampler, labels["trainval"], seen, config, log_iteration("scen"), progress.update)

    # SCEN is frozen from here on: every image is embedded once, and the feature maps are done with
    with clock.stage("embed"), bar(sum(map(len, maps.values())), "dense-semantic features", "image") as progress:
        embeddings = embed_splits(scen.requires_grad_(False).eval(), {name: (maps[name], labels[name]) for name in SPLITS},
                                  progress.update)
    del maps
    trainval, test_seen, test_unseen = (embeddings[name] for name in SPLITS)
    table.add(run, "local classifier (stage 1)", "local",
              logits_metrics(test_unseen.local_logits, test_unseen.y, test_seen.local_logits, test_seen.y, unseen))

    # stage 2: semantic distillation
    with clock.stage("distill"), bar(config.distill_iterations, "stage 2: distillation", "iteration") as progress:
        classifier = distill(trainval, sampler, config, log_iteration("distill"), progress.update)
    with torch.no_grad():
        table.add(run, "global classifier (stage 2)", "global",
                  logits_metrics(classifier(test_unseen.x), test_unseen.y, classifier(test_seen.x), test_seen.y, unseen))

    # stage 3: EGGN
    eggn = EGGN(features.shape[0], att, classifier, config).to(device)
    best = Best(config.gzsl)
    iterations = -(-len(trainval.x) // sampler.batch_size) * config.feedback_loop
    for epoch in range(1, config.nepoch + 1):
        with clock.stage("eggn"), bar(iterations, f"stage 3: EGGN {epoch}/{config.nepoch}", "iteration") as progress:
            losses = train_epoch(eggn, trainval.x, trainval.y, sampler, unseen, progress.update)
        values = {"epoch": epoch} | losses
        if epoch % config.test_freq_epoch == 0 or epoch == config.nepoch:
            with clock.stage("evaluate"):
                metrics = evaluate(eggn, embeddings, unseen, config)
            values |= best.update(epoch, metrics)
            print(f"epoch {epoch}: {describe(metrics)}", flush=True)
        run.log("eggn", values)
    if best.last:
        table.rows += [("EGGN, last epoch", best.last),
                       (f"EGGN, best on test (epoch {best.epoch})", best.gzsl_metrics._replace(acc_zs=best.acc_zs)
                        if config.gzsl else Metrics(best.acc_zs, None, None, None))]

    run.save_weights({"scen": scen.state_dict(), "global_cls": classifier.state_dict(), "eggn": eggn.state_dict(),
                      "split_fingerprint": split.fingerprint, "attribute_names": features.attribute_names,
                      "class_names": features.class_names})
    summary = {"dataset": dataset, "split_fingerprint": split.fingerprint, "full_published_split": split.is_published(dataset),
               "backbone": str(features.provenance.get("backbone", config.backbone)), "seed": config.seed,
               "git_commit": git_commit(), "device": str(device), "torch": torch.__version__,
               "seconds": {name: round(value, 3) for name, value in clock.seconds.items()}} | peak_memory_gb(device)
    summary |= table.summary | (present(best.last._asdict()) | best.as_dict() | {"best_epoch": best.epoch} if best.last else {})
    return str(table), summary


def describe(metrics: Metrics) -> str:
    """acc_zs 66.2  acc_unseen 54.8  acc_seen 58.2  H 56.4"""
    return "  ".join(f"{name} {value:.1f}" for name, value in present(metrics._asdict()).items())


class ResultTable:
    """The rows printed at the end of a run, under them the paper's where, and only where, the data are the paper's."""

    def __init__(self, dataset: str, published: bool):
        self.dataset, self.rows, self.summary = dataset, [], {}
        self.scegg = Metrics(*LAYOUTS[dataset].scegg) if published else None
        self.note = "" if published or LAYOUTS[dataset].published is None else " (not the paper's full dataset)"

    def add(self, run: Run, title: str, prefix: str, metrics: Metrics):
        """A row that is printed, logged and put into the summary as `<prefix>_acc_zs` and so on."""
        self.rows.append((title, metrics))
        values = {f"{prefix}_{name}": value for name, value in metrics._asdict().items()}
        self.summary |= values
        run.log(prefix, values)
        print(f"{title}: {describe(metrics)}", flush=True)

    def __str__(self):
        rows = self.rows + ([("published SC-EGG", self.scegg)] if self.scegg else [])
        lines = [f"{self.dataset + self.note:<40}{'acc_zs':>8}{'U':>8}{'S':>8}{'H':>8}"]
        for title, metrics in rows:
            cells = (f"{value:8.1f}" if value is not None else f"{'-':>8}" for value in metrics)
            lines.append(f"{title:<40}" + "".join(cells))
        return "\n".join(lines)


def check_against_xlsa17(data_root: Path, dataset: str, features: Features):
    """Raises UserError if data_root has an xlsa17 split and the features were made with another one."""
    if (data_root / "xlsa17" / "data" / dataset / "att_splits.mat").is_file():
        try:
            fingerprint = read_split(data_root, dataset, features.split.labels)[0].fingerprint
        except UserError:  # labels of one dataset, locations of another
            fingerprint = "of other images"
        if fingerprint != features.split.fingerprint:
            raise UserError(f"{features.path} was made with split {features.split.fingerprint}, but {data_root} holds "
                            f"split {fingerprint}: run preprocessing.py again, or name the right --data_root")


def made_features(dataset: str, backbone: str) -> Path:
    """Where preprocessing.py puts the features of a backbone; raises UserError with its command, and what else is there."""
    path = feature_file(dataset, backbone)
    if not path.is_file():
        others = sorted(other.name for other in path.parent.glob("*.hdf5"))
        raise UserError(f"{path} is missing: make it with preprocessing.py --dataset {dataset} --backbone {backbone}, or name it with "
                        "--features" + (f" (there is {', '.join(others)}: give its --backbone)" if others else ""))
    return path


def main(dataset: str, config_name: str, argv=None):
    """Parse flags, check everything that can be checked, train, print the table."""
    parser = FlagParser(f"Train SC-EGG on {dataset}.")
    parser.add_argument("--config", type=Path, default=CONFIGS / config_name, help="W&B YAML file")
    parser.add_argument("--features", type=Path, default=None, help="HDF5 feature file (default: where preprocessing.py puts it)")
    parser.add_argument("--data_root", type=Path, default=Path("data"), help="its xlsa17 split, if there, must be the features' own")
    parser.add_argument("--device", default=None, help="cpu, cuda or a GPU's number (default: CUDA if there is one)")
    parser.add_argument("--cache", choices=("auto", "device", "ram", "disk", "none"), default="auto",
                        help="where trainval's feature maps are kept (default: the fastest place that holds them)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    parser.add_argument("--wandb", choices=("online", "offline", "disabled"), default=None,
                        help="default: WANDB_MODE, else online if logged in and offline if not")
    options, overrides = parse_flags(parser, argv)
    keep_freed_memory()
    config = read_config(options.config, overrides)
    device = pick_device(options.device)
    features = open_features(options.features or made_features(dataset, config.backbone), config.backbone, config.img_size, dataset)
    check_against_xlsa17(options.data_root, dataset, features)
    print(features.split.describe(dataset))
    place = place_of_maps(features, device, options.cache)
    run = Run(dataset, config, wandb_mode(options.wandb), options.runs)
    print(f"run {run.folder} on {device}")
    try:
        table, summary = train(dataset, features, config, device, place, run)
        run.finish(summary)
    except BaseException:
        run.close(exit_code=1)
        raise
    print(f"saved {run.folder}: config.yaml, metrics.jsonl, summary.json, model.pt\n\n{table}")


if __name__ == "__main__":
    exit_on_user_error(lambda: main("TOY", "toy.yaml"))

"""The numbers of a finished run, computed again from its features and what model.pt keeps."""

import csv
import io
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from model import Scaler
from scegg.datasets.splits import Split, validation_split
from scegg.features.storage import FeatureMaps
from scegg.method.calibration import area_under, seen_columns, seen_unseen_curve
from scegg.method.embeddings import Embedding, embed_images
from scegg.method.evaluation import Metrics, in_percent, logits_metrics, per_class_accuracy
from scegg.run.trained import (
    TrainedRun,
    channels_of,
    not_fitting,
    require_channels,
    restore_classifier,
    restore_eggn,
    restore_embedder,
)
from util import without_none, write_text

TEST_PARTS = ("test_seen", "test_unseen")
PER_CLASS = ("numbers", "task", "class", "kind", "images", "correct", "accuracy")
WORST = 20  # confusions of a classifier that are reported
# by protocol: what winners are called, and the prefix of their numbers in summary.json
PREFIXES = {
    "paper": {"last_epoch": "", "picked": "best_"},
    "validated": {"picked": "", "validation": "val_best_"},
}
PREFIXES_OF_BOTH = {"local": "local_", "global": "global_", "nothing_picked": "last_"}


class Answers(NamedTuple):
    """True and predicted labels (n,) of the test images.

    task: czsl, unseen test images among unseen classes; gzsl, all of them among all classes.
    unseen (Cu,) labels.
    """

    numbers: str
    task: str
    y: Tensor
    predicted: Tensor
    unseen: Tensor


class Judge:
    """Has winners of a run classify the test images of a split of its features."""

    def __init__(self, run: TrainedRun, split: Split, device: torch.device):
        self.run, self.split, self.device = run, split, device
        self.unseen = torch.from_numpy(split.unseen).to(device)
        self.classes = len(split.att)
        self.known = {}

    def embedded(self, winner: dict) -> dict[str, Embedding]:
        """The Embedding of each part; winners with the same embedder share it."""
        embedder = winner.get("scen") or winner["scaler"]
        key = tuple(map(id, embedder.values()))
        if key not in self.known:
            self.known[key] = self.embed(winner)
        return self.known[key]

    @torch.no_grad()
    def embed(self, winner: dict) -> dict[str, Embedding]:
        """The Embedding of each part."""
        run, device, shape = self.run, self.device, self.split.att.shape
        embedder = restore_embedder(run.name, winner, run.config, shape).to(device)
        require_channels(run.name, winner, run.features.shape[0])
        found = {}
        for part in TEST_PARTS:
            indices = getattr(self.split, part)
            y = torch.from_numpy(self.split.labels[indices]).to(device)
            if isinstance(embedder, Scaler):
                x = embedder(run.features.pooled(indices).to(device))
                found[part] = Embedding(x, torch.empty(0, device=device), y)
                continue

            maps = FeatureMaps(run.features, indices, device)
            with tqdm(total=len(maps), desc=part, unit="image", disable=None, leave=False) as bar:
                g, local_logits = embed_images(embedder, maps, bar)
            found[part] = Embedding(embedder.gen.scaler(g), local_logits, y)
        return found

    @torch.no_grad()
    def of_stage(self, name: str, winner: dict) -> tuple[Metrics, list[Answers]]:
        """What the local or the global classifier reaches, and what it says."""
        parts = self.embedded(winner)
        logits = {part: embedding.local_logits for part, embedding in parts.items()}
        if name == "global":
            classifier = self.classifier(winner, self.classes)
            logits = {part: classifier(embedding.x) for part, embedding in parts.items()}

        seen, unseen = (parts[part].y for part in TEST_PARTS)
        czsl = self.unseen[logits["test_unseen"][:, self.unseen].argmax(dim=1)]
        gzsl = [logits[part].argmax(dim=1) for part in TEST_PARTS]
        metrics = logits_metrics(
            logits["test_unseen"], unseen, logits["test_seen"], seen, self.unseen
        )
        return metrics, [
            Answers(name, "czsl", unseen, czsl, self.unseen),
            Answers(name, "gzsl", torch.cat([seen, unseen]), torch.cat(gzsl), self.unseen),
        ]

    @torch.no_grad()
    def of_epoch(self, name: str, winners: dict) -> tuple[Metrics, list[Answers]]:
        """What the softmax classifiers of CZSL and GZSL reach, and what they say."""
        y = self.embedded(winners["czsl"])["test_unseen"].y
        logits = self.logits(winners["czsl"], "test_unseen", len(self.unseen))
        found = logits.argmax(dim=1)
        acc_zs = per_class_accuracy(torch.searchsorted(self.unseen, y), found, len(self.unseen))
        answers = [Answers(name, "czsl", y, self.unseen[found], self.unseen)]
        if "gzsl" not in winners:
            return in_percent(acc_zs), answers

        bias = self.run.config.seen_bias * seen_columns(self.classes, self.unseen)
        labels, predicted = [], []
        for part in TEST_PARTS:
            labels.append(self.embedded(winners["gzsl"])[part].y)
            logits = self.logits(winners["gzsl"], part, self.classes)
            predicted.append((logits - bias).argmax(dim=1))
        S, U = (
            per_class_accuracy(y, found, self.classes)
            for y, found in zip(labels, predicted, strict=True)
        )
        gzsl = Answers(name, "gzsl", torch.cat(labels), torch.cat(predicted), self.unseen)
        return in_percent(acc_zs, (U, S)), [*answers, gzsl]

    def logits(self, winner: dict, part: str, classes: int) -> Tensor:
        """The logits (n, classes) of a part's images by a winner's classifier."""
        return self.classifier(winner, classes)(self.embedded(winner)[part].x)

    def classifier(self, winner: dict, classes: int) -> torch.nn.Module:
        """A winner's classifier of so many classes."""
        run = self.run
        return restore_classifier(run.name, winner, run.config, classes).to(self.device)

    def ausuc(self, winner: dict) -> float:
        """The area under the seen-unseen curve of the last epoch's GZSL classifier."""
        eggn = restore_eggn(self.run)
        torch.nn.Module.to(eggn, self.device)  # without optimisers
        classifier = self.classifier(winner, self.classes)
        inputs = eggn.classifier_input(torch.zeros(1, channels_of(winner), device=self.device))
        if inputs.shape[1] != classifier.linear.in_features:
            raise not_fitting(self.run.name, "winners'")
        curve = seen_unseen_curve(eggn, classifier.linear, self.embedded(winner), self.unseen)
        return area_under(curve)


# ---- all numbers


def evaluate_run(
    run: TrainedRun, winners: dict, device: torch.device
) -> tuple[dict, list[Answers]]:
    """Every number of summary.json under its name there, and the answers behind them.

    winners: `scegg.run.trained.winners_of`. Raises UserError for weights that do not fit.
    """
    config, split = run.config, run.features.split
    judge = Judge(run, split, device)
    numbers, answers = {}, []
    for name, prefix in (PREFIXES_OF_BOTH | PREFIXES[config.protocol]).items():
        if name not in winners:
            continue
        if name == "validation":
            held_out = validation_split(split, config.val_share, config.seed, run.features.path)
            metrics, said = Judge(run, held_out, device).of_epoch(name, winners[name])
            said = [as_in_whole(some, split, device) for some in said]
        elif name in ("local", "global"):
            metrics, said = judge.of_stage(name, winners[name])
        else:
            metrics, said = judge.of_epoch(name, winners[name])

        answers += said
        numbers |= {f"{prefix}{key}": value for key, value in metrics._asdict().items()}

    if "picked" in winners:
        picked = winners["picked"]
        numbers["best_epoch"] = picked.get("gzsl", picked["czsl"])["epoch"]
    if "gzsl" in winners.get("nothing_picked", {}):
        numbers["ausuc"] = judge.ausuc(winners["nothing_picked"]["gzsl"])
    return without_none(numbers), answers


def as_in_whole(answers: Answers, whole: Split, device: torch.device) -> Answers:
    """Answers on held-out data in the labels of `whole`; theirs number trainval's classes alone."""
    seen = torch.from_numpy(whole.seen).to(device)
    labels = {name: seen[getattr(answers, name)] for name in ("y", "predicted", "unseen")}
    return answers._replace(**labels)


def differences(numbers: dict, summary: dict) -> list[str]:
    """A line for each number that is not, to the last digit, what summary.json says."""
    reported = {name: value for name, value in summary.items() if is_number(name)}
    lines = []
    for name in sorted(numbers.keys() | reported.keys()):
        if numbers.get(name) != reported.get(name):
            lines.append(f"{name} is {numbers.get(name)}, and {reported.get(name)} in summary.json")
    return lines


def is_number(name: str) -> bool:
    """Whether an entry of a summary is a result that can be computed again."""
    return name in ("ausuc", "best_epoch") or name.endswith(Metrics._fields)


# ---- the report


def write_report(folder: Path, answers: list[Answers], class_names: list[str]):
    """per_class.csv and confusions.csv in a folder; accuracies and shares in %."""
    per_class = [PER_CLASS]
    confusions = [
        ("numbers", "task", "class", "kind", "predicted", "predicted_kind", "images", "share")
    ]
    for some in answers:
        per_class += per_class_rows(some, class_names)
        confusions += confusion_rows(some, class_names)

    for name, rows in (("per_class", per_class), ("confusions", confusions)):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_text(folder / f"{name}.csv", text.getvalue())


def kind_of(label: int, answers: Answers) -> str:
    """Whether a class is seen or unseen."""
    return "unseen" if label in answers.unseen.tolist() else "seen"


def per_class_rows(answers: Answers, class_names: list[str]) -> list[tuple]:
    """A row of per_class.csv for each class that has images."""
    rows = []
    for label in answers.y.unique().tolist():
        of_class = answers.y == label
        images, correct = int(of_class.sum()), int((answers.predicted[of_class] == label).sum())
        accuracy = f"{100 * correct / images:.4f}"
        named = (class_names[label], kind_of(label, answers))
        rows.append((answers.numbers, answers.task, *named, images, correct, accuracy))
    return rows


def confusion_rows(answers: Answers, class_names: list[str]) -> list[tuple]:
    """The rows of confusions.csv: the WORST pairs of classes, by their share of the first's."""
    classes = len(class_names)
    counts = torch.bincount(answers.y * classes + answers.predicted, minlength=classes**2)
    counts = counts.view(classes, classes)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    shares.fill_diagonal_(0)

    rows = []
    order = shares.flatten().argsort(descending=True, stable=True)[:WORST]
    for place in order.tolist():
        label, other = divmod(place, classes)
        share = shares[label, other].item()
        if share == 0:
            break
        named = [class_names[label], kind_of(label, answers)]
        named += [class_names[other], kind_of(other, answers)]
        images = int(counts[label, other])
        rows.append((answers.numbers, answers.task, *named, images, f"{100 * share:.4f}"))
    return rows

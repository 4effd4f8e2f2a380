"""From a picture to its most probable classes, by a finished run alone (evaluate.py --images)."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model import Scaler
from scegg.features.images import MEGAPIXELS
from scegg.features.reader import normalize_positions
from scegg.method.calibration import seen_columns
from scegg.report.attention import attention_of, figure_of, row_of
from scegg.report.pictures import (
    AT_ONCE,
    load_backbone,
    picture_files,
    read_batches,
    read_crop,
)
from scegg.report.style import class_title, write_picture
from scegg.run.trained import (
    RunFiles,
    require_channels,
    restore_classifier,
    restore_embedder,
    winners_of,
)
from util import UserError, one_line

CLASSES = 5  # that are named for a picture
ATTRIBUTES = 3  # that are named for a class
LETTERS = 50  # of a picture's name in that of its drawing: names of files end at 255 bytes
COLUMNS = ("image", "rank", "class", "kind", "probability", "attributes", "attention")


class Guess(NamedTuple):
    """A class of a picture. kind: seen or unseen.

    attributes: the names of those that spoke for it, with their terms of SCEN's local logit.
    """

    label: int
    name: str
    kind: str
    probability: float
    attributes: list[tuple[str, float]]


class Seen(NamedTuple):
    """What SCEN saw in a batch: scores (B, K), attention (B, R, K), and the maps' grid (h, w)."""

    scores: Tensor
    attention: Tensor
    grid: tuple[int, int]


class Predictor:
    """The networks of a finished run, from pictures to guesses.

    The classifier is that of the picked epoch: GZSL's, or CZSL's of unseen classes in a run of
    CZSL alone. A run without EGGN has the distilled classifier.
    weights: the backbone's state dict, if the features were made with one of one's own. Raises
    UserError for a run of an older version, and for weights that do not fit.
    """

    def __init__(self, files: RunFiles, device: torch.device, weights: Path | None = None):
        content, self.config, winners = files.weights, files.config, winners_of(files)
        picked = winners.get("picked", {"gzsl": winners.get("global")})
        task = "gzsl" if "gzsl" in picked else "czsl"
        self.run_name, self.winner = files.folder.name, picked[task]

        shape = len(content["class_names"]), len(content["attribute_names"])
        classes = shape[0] if task == "gzsl" else len(content["unseen"])
        embedder = restore_embedder(self.run_name, self.winner, self.config, shape)
        self.embedder = embedder.to(device)
        classifier = restore_classifier(self.run_name, self.winner, self.config, classes)
        self.classifier = classifier.to(device)
        self.backbone = load_backbone(
            self.config, content["features"], files.folder, weights, device
        )

        self.class_names, self.attribute_names = content["class_names"], content["attribute_names"]
        unseen = torch.tensor(content["unseen"], device=device)
        seen = seen_columns(len(self.class_names), unseen)
        self.labels, self.bias = range(len(self.class_names)), 0.0
        if task == "czsl":
            self.labels = content["unseen"]
        elif "picked" in winners:
            self.bias = self.config.seen_bias * seen
        self.kinds = ["seen" if is_seen else "unseen" for is_seen in seen.tolist()]

    @torch.inference_mode()
    def __call__(self, crops: Tensor) -> tuple[list[list[Guess]], Seen | None]:
        """The guesses for each crop (B, 3, S, S) uint8, best first, and what SCEN saw.

        The CNN-feature baseline has no SCEN, and so no attributes.
        """
        x, seen = self.embed(self.backbone(crops))
        logits = self.classifier(x) - self.bias
        # by logits: close ones have the same probability in float32
        top = logits.argsort(dim=1, descending=True)[:, :CLASSES]
        chances = logits.softmax(dim=1).gather(1, top)

        guesses = []
        for row, places in enumerate(top.tolist()):
            scores = None if seen is None else seen.scores[row]
            guesses.append(
                [
                    self.guess(self.labels[place], chance, scores)
                    for place, chance in zip(places, chances[row].tolist(), strict=True)
                ]
            )
        return guesses, seen

    def embed(self, maps: Tensor) -> tuple[Tensor, Seen | None]:
        """x (B, D) of the backbone's maps (B, D, h, w), as in training."""
        require_channels(self.run_name, self.winner, maps.shape[1])
        if isinstance(self.embedder, Scaler):
            return self.embedder(maps.mean(dim=(2, 3))), None

        scen, positions = self.embedder, normalize_positions(maps)
        output = scen(positions)
        g = scen.gen.compose_at_runtime(output.attention, positions)
        return scen.gen.scaler(g), Seen(output.scores, output.attention, maps.shape[2:])

    def terms(self, label: int, scores: Tensor) -> Tensor:
        """The terms (K,) that add up to SCEN's local logit of a class: Z_ck s_k."""
        return self.embedder.Z[label] * scores

    def guess(self, label: int, chance: float, scores: Tensor | None) -> Guess:
        """A class with its probability; scores (K,) of the picture's attributes."""
        attributes = []
        if scores is not None:
            top = self.terms(label, scores).topk(min(ATTRIBUTES, len(scores)))
            for place, term in zip(top.indices.tolist(), top.values.tolist(), strict=True):
                attributes.append((self.attribute_names[place].strip(), term))
        return Guess(label, self.class_names[label], self.kinds[label], chance, attributes)

    def draw(self, path: Path, title: str, crop: Tensor, best: Guess, seen: Seen, row: int):
        """Write the maps of the attributes that spoke for the best class, as a PNG.

        row: the picture's in the batch.
        """
        scores = seen.scores[row]
        terms = self.terms(best.label, scores)
        attention = attention_of(seen.attention[row].T.cpu(), scores.cpu(), terms.cpu())
        pictures = row_of(title, crop, attention, self.attribute_names, seen.grid)
        write_picture(figure_of([pictures]), path)


# ---- a stream of pictures


class Predicted(NamedTuple):
    """A picture with its guesses, and the picture of its attention, if asked for."""

    path: Path
    guesses: list[Guess]
    attention: Path | None


def predict(
    predictor: Predictor,
    places: list[Path],
    device: torch.device,
    tell: Callable[[str], None],
    folder: Path | None = None,
    megapixels: int = MEGAPIXELS,
) -> Iterator[Predicted]:
    """Predict the pictures in these files and folders, one batch after the other.

    folder: where maps of attention are drawn, None for nowhere. tell(line) is told of each picture
    that cannot be read, or has more megapixels. Raises UserError if no file is named and no folder
    has any, and where a run of the baseline is to draw.
    """
    if folder and isinstance(predictor.embedder, Scaler):
        raise UserError("a run of the CNN-feature baseline has no attention: leave --attention out")

    count = 0
    read = partial(read_crop, img_size=predictor.config.img_size, megapixels=megapixels)
    batches = read_batches(picture_files(places, tell), read, AT_ONCE[device.type], tell)
    for paths, crops in batches:
        guesses, seen = predictor(crops)
        for row, path in enumerate(paths):
            count += 1
            drawn = None
            if folder:
                drawn = folder / f"{count:06d}_{path.stem[:LETTERS]}.png"
                best = guesses[row][0]
                title = f"{class_title(best.name)} ({best.kind})"
                predictor.draw(drawn, title, crops[row], best, seen, row)
            yield Predicted(path, guesses[row], drawn)


# ---- formats


def as_text(item: Predicted) -> str:
    """The picture's path, and a line for each class."""
    lines = [one_line(str(item.path))]
    for guess in item.guesses:
        attributes = ", ".join(name for name, _ in guess.attributes)
        name = f"{class_title(guess.name)} ({guess.kind})"
        lines.append(f"  {100 * guess.probability:5.1f} %  {name:<36}  {attributes}".rstrip())
    return "\n".join(lines) + "\n"


def as_json(item: Predicted) -> str:
    """One line: {"image": ..., "classes": [...], "attention": ...}."""
    classes = [
        {
            "class": guess.name,
            "kind": guess.kind,
            "probability": guess.probability,
            "attributes": dict(guess.attributes),
        }
        for guess in item.guesses
    ]
    attention = str(item.attention) if item.attention else None
    content = {"image": str(item.path), "classes": classes, "attention": attention}
    return json.dumps(content) + "\n"


def as_csv(item: Predicted) -> str:
    """A row of COLUMNS for each class."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for rank, guess in enumerate(item.guesses, start=1):
        attributes = "; ".join(f"{name} {term:.4g}" for name, term in guess.attributes)
        named = (item.path, rank, guess.name, guess.kind)
        rows.writerow((*named, f"{guess.probability:.6g}", attributes, item.attention or ""))
    return text.getvalue()


FORMATS = {"text": as_text, "json": as_json, "csv": as_csv}
HEADS = {"csv": ",".join(COLUMNS) + "\n"}

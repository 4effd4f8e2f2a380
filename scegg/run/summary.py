"""What a run says of itself at its end: the printed table, summary.json, the seen-unseen curve."""

import csv
import dataclasses
import io
from pathlib import Path

import torch

from scegg.config import Config
from scegg.datasets.layouts import LAYOUTS
from scegg.features.reader import Features
from scegg.method.evaluation import Metrics
from scegg.method.selection import Selection
from scegg.run.identity import ROOT, git_commit, identity_of_code, identity_of_data
from util import peak_memory_gb, without_none, write_text

PUBLISHED = ROOT / "figs" / "published.csv"  # the paper's comparison table
NOTHING_PICKED = "EGGN, last epoch, nothing picked"

# ---- summary.json


def summarise(
    dataset: str,
    features: Features,
    config: Config,
    device: torch.device,
    notes: dict,
    selection: Selection,
) -> dict:
    """The content of summary.json; accuracies in %. notes: those of the run's checkpoint."""
    summary = {
        "dataset": dataset,
        "method": config.method,
        "protocol": config.protocol,
        "seed": config.seed,
        **identity_of_data(features),
        "full_published_split": features.split.is_published(dataset),
        "w2v": features.provenance.get("w2v"),
        "dtype": features.provenance.get("dtype", "float32"),
        "git_commit": git_commit(),
        **identity_of_code(device),
        "seconds": seconds_of_stages(notes["seconds"]),
        **peak_memory_gb(device),
    }

    summary |= without_none(
        {name: notes.get(name) for name in ("model_sha256", "scen_from", "ausuc")}
    )
    summary |= without_none({"unseen_share": selection.unseen_share})
    if any(notes["graphs"].values()):  # a CPU has none
        summary["graphs"] = notes["graphs"]
    summary |= notes.get("validation", {})
    for name in ("local", "global"):
        metrics = notes.get(name, {})
        summary |= {f"{name}_{key}": value for key, value in metrics.items()}
    return summary | results(selection, config) | {"config": dataclasses.asdict(config)}


def seconds_of_stages(seconds: dict) -> dict:
    """Seconds of each stage. Stage 3 is timed with its evaluations: they are taken from it."""
    seconds = dict(seconds)
    for phase in ("", "validation "):
        if f"{phase}evaluate" in seconds:
            seconds[f"{phase}eggn"] -= seconds[f"{phase}evaluate"]
    return {name: round(value, 3) for name, value in seconds.items()}


def results(selection: Selection, config: Config) -> dict:
    """EGGN's part of summary.json, accuracies in %.

    acc_zs, acc_unseen, acc_seen, H: the last epoch's in the paper's protocol (classifier epoch
    picked on the test set), the validated ones in the other. best_*: of the epochs picked on the
    test set, so only in the paper's protocol. last_*: the last epoch's after the last classifier
    epoch, in which nothing was picked.
    """
    if selection.last is None:
        return {}

    if config.protocol == "validated":
        numbers = selection.metrics()._asdict()
    else:
        numbers = selection.last | selection.best()
    last = {f"last_{name}": value for name, value in selection.unselected.items()}
    return without_none(numbers) | {"best_epoch": selection.epoch} | without_none(last)


# ---- the table


def metrics_line(metrics: Metrics) -> str:
    """acc_zs 66.2  acc_unseen 54.8  acc_seen 58.2  H 56.4"""
    numbers = without_none(metrics._asdict())
    return "  ".join(f"{name} {value:.1f}" for name, value in numbers.items())


def result_rows(summary: dict) -> list[tuple[str, Metrics]]:
    """The rows of a run's table: SCEN after stages 1 and 2, then EGGN.

    summary: the content of summary.json, or its protocol and numbers alone.
    """
    rows = []
    for name, stage in (("local", 1), ("global", 2)):
        if f"{name}_acc_zs" in summary:
            rows.append((f"{name} classifier (stage {stage})", metrics_of(summary, f"{name}_")))
    if "best_epoch" not in summary:
        return rows

    epoch = summary["best_epoch"]
    if summary["protocol"] == "validated":
        title = f"EGGN, picked on validation classes (epoch {epoch})"
        rows.append((title, metrics_of(summary, "")))
    else:
        rows.append(("EGGN, last epoch, classifier picked on test", metrics_of(summary, "")))
        rows.append((f"EGGN, best on test (epoch {epoch})", metrics_of(summary, "best_")))
    return [*rows, (NOTHING_PICKED, metrics_of(summary, "last_"))]


def metrics_of(summary: dict, prefix: str) -> Metrics:
    """The metrics of a summary whose names begin with this prefix."""
    return Metrics(*(summary.get(prefix + name) for name in Metrics._fields))


def result_table(
    dataset: str, published: bool, rows: list[tuple[str, Metrics]], w2v: str | None = None
) -> str:
    """The table printed at the end of a run.

    published: whether the split is the full one that is published. w2v: source of the word vectors,
    as the feature file says it. The paper's row stands below ours only where both are the paper's.
    """
    note = ""
    if LAYOUTS[dataset].paper and not published:
        note = " (not the paper's full dataset)"
    elif LAYOUTS[dataset].paper and w2v == "gaussian":
        note = " (Gaussian word vectors, not the paper's)"

    scegg = published_scegg(dataset) if published and not note else None
    if scegg:
        rows = [*rows, ("published SC-EGG", scegg)]

    lines = [f"{dataset + note:<46}{'acc_zs':>8}{'U':>8}{'S':>8}{'H':>8}"]
    for title, metrics in rows:
        numbers = ["-" if value is None else f"{value:.1f}" for value in metrics]
        lines.append(f"{title:<46}" + "".join(f"{number:>8}" for number in numbers))
    return "\n".join(lines)


def published_scegg(dataset: str) -> Metrics | None:
    """The paper's own numbers of SC-EGG, from figs/published.csv; None for other datasets."""
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        row = next(line for line in csv.DictReader(file) if line["method"] == "SC-EGG")
    if f"{dataset} acc" not in row:
        return None
    return Metrics(*(float(row[f"{dataset} {metric}"]) for metric in ("acc", "U", "S", "H")))


# ---- the seen-unseen curve


def save_curve(path: Path, curve: torch.Tensor):
    """The seen-unseen curve as text: seen_bias, acc_seen and acc_unseen (in %) at every point."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("seen_bias", "acc_seen", "acc_unseen"))
    for bias, S, U in curve.tolist():
        rows.writerow((f"{bias:.6g}", f"{100 * S:.4f}", f"{100 * U:.4f}"))

    write_text(path, text.getvalue())

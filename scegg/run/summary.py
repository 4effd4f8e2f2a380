"""What a run says of itself at its end: the printed table, summary.json's accuracies, the seen-unseen curve."""
import csv
import io
from pathlib import Path

import torch

from scegg.config import Config
from scegg.method.evaluation import Metrics
from scegg.method.selection import Selection, present
from util import write_text
from scegg.datasets.layouts import LAYOUTS


def results(selection: Selection, config: Config) -> dict:
    """EGGN's part of summary.json, accuracies in %.

    acc_zs, acc_unseen, acc_seen, H: the last epoch's in the paper's protocol (classifier epoch picked on the test set), the
    validated ones in the other; best_*: of the epochs picked on the test set, so only in the paper's protocol; last_*: the last epoch's
    after the last classifier epoch, in which nothing was picked.
    """
    if selection.last is None:
        return {}
    validated = config.protocol == "validated"
    numbers = selection.metrics()._asdict() if validated else selection.last | selection.best()
    return present(numbers) | {"best_epoch": selection.epoch} | present({f"last_{name}": value for name, value in selection.unselected.items()})


def save_curve(path: Path, curve: torch.Tensor):
    """The seen-unseen curve as text: seen_bias, acc_seen and acc_unseen (in %) at every operating point."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("seen_bias", "acc_seen", "acc_unseen"))
    rows.writerows((f"{bias:.6g}", f"{100 * S:.4f}", f"{100 * U:.4f}") for bias, S, U in curve.tolist())
    write_text(path, text.getvalue())


def describe(metrics: Metrics) -> str:
    """acc_zs 66.2  acc_unseen 54.8  acc_seen 58.2  H 56.4"""
    return "  ".join(f"{name} {value:.1f}" for name, value in present(metrics._asdict()).items())


def result_table(dataset: str, published: bool, rows: list[tuple[str, Metrics]]) -> str:
    """The rows printed at the end of a run; under them the paper's where, and only where, the data are the paper's."""
    note = "" if published or LAYOUTS[dataset].published is None else " (not the paper's full dataset)"
    lines = [f"{dataset + note:<46}{'acc_zs':>8}{'U':>8}{'S':>8}{'H':>8}"]
    for title, metrics in rows + ([("published SC-EGG", published_scegg(dataset))] if published else []):
        lines.append(f"{title:<46}" + "".join(f"{value:8.1f}" if value is not None else f"{'-':>8}" for value in metrics))
    return "\n".join(lines)


def published_scegg(dataset: str) -> Metrics:
    """The paper's own accuracies of SC-EGG on a dataset, in %."""
    path = Path(__file__).resolve().parents[2] / "figs" / "published.csv"
    with open(path, newline="", encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if row["method"] == "SC-EGG")
    return Metrics(*(float(row[f"{dataset} {column}"]) for column in ("acc", "U", "S", "H")))


def result_rows(facts: dict, selection: Selection, config: Config) -> list[tuple[str, Metrics]]:
    """What the table says of a run."""
    titles = {"local": "local classifier (stage 1)", "global": "global classifier (stage 2)"}
    rows = [(title, Metrics(**facts[name])) for name, title in titles.items() if name in facts]
    if selection.last is None:
        return rows
    if config.protocol == "validated":
        rows.append((f"EGGN, picked on validation classes (epoch {selection.epoch})", selection.metrics()))
    else:
        rows += [("EGGN, last epoch", Metrics(**selection.last)), (f"EGGN, best on test (epoch {selection.epoch})", selection.metrics())]
    return rows + [("EGGN, last epoch, nothing picked", Metrics(**selection.unselected))]

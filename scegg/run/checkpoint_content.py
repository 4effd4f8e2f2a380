"""What a checkpoint holds beside tensors: the kind of each entry, checked before it is used."""

from torch import Tensor

from scegg.method.embeddings import SPLITS
from scegg.method.evaluation import Metrics
from scegg.run.winners import check_winner


def check_frame(saved):
    """Raises an error for what no version writes: it is a ValueError, KeyError or TypeError."""
    for name in ("identity", "parts", "notes", "steps"):
        require(isinstance(saved[name], dict) and all(map(is_text, saved[name])), name)
    require(is_plain(saved["identity"]), "identity")
    require(is_text(saved["notes"]["features"]), "note features")


def check_content(saved: dict):
    """Raises an error for what this version does not write: of any kind that wrong types bring.

    Networks and their optimizers are not looked at.
    """
    steps, notes, parts = saved["steps"], saved["notes"], saved["parts"]
    require(all(map(is_count, steps.values())), "steps")
    require({"logged", "wandb_id"} <= set(notes), "notes")

    for name, note in notes.items():
        is_right = NOTES.get(name.removeprefix("validation "))
        require(is_right is None or is_right(note), f"note {name}")
    for name, part in parts.items():
        is_right = PARTS.get(name, is_losses if name.endswith("_losses") else None)
        require(is_right is None or is_right(part), f"part {name}")
    if has_embedded(steps, notes):
        require(set(parts["embeddings"]) == set(SPLITS), "part embeddings")


def has_embedded(steps: dict, notes: dict) -> bool:
    """Whether the phase that the run is in has its embeddings behind it."""
    phases = ("",) if "choice" in notes else ("", "validation ")
    return any(steps.get(phase + stage) for phase in phases for stage in ("embed", "pool"))


def require(is_right: bool, name: str):
    """Raises ValueError with the name of an entry that is not right."""
    if not is_right:
        raise ValueError(f"the {name} is not what a run writes")


def is_text(value) -> bool:
    """Whether it is a text that could be a path."""
    return isinstance(value, str) and "\0" not in value


def is_yes_or_no(value) -> bool:
    """Whether it is True or False."""
    return isinstance(value, bool)


def is_count(value) -> bool:
    """Whether it is a whole number from 0 on."""
    return type(value) is int and value >= 0


def is_number(value) -> bool:
    """Whether it is a number."""
    return type(value) in (int, float)


def is_plain(value) -> bool:
    """Whether it is made of texts, numbers and None, in lists and dicts: two such compare."""
    if isinstance(value, dict):
        return all(map(is_text, value)) and all(map(is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (str, bool, int, float))


def are_numbers(value) -> bool:
    """Whether it is a dict of numbers by name; what was not measured is None."""
    is_dict = isinstance(value, dict) and all(map(is_text, value))
    return is_dict and all(number is None or is_number(number) for number in value.values())


def are_seconds(value) -> bool:
    """Whether it is seconds by stage; stage 3's are there if its evaluations' are."""
    is_whole = are_numbers(value) and None not in value.values()
    return is_whole and all(
        f"{phase}eggn" in value for phase in ("", "validation ") if f"{phase}evaluate" in value
    )


def is_choice(value) -> bool:
    """Whether it is what was chosen for CZSL and, if it is evaluated, GZSL."""
    is_dict = isinstance(value, dict) and {"czsl"} <= set(value) <= {"czsl", "gzsl"}
    if not is_dict or "gzsl" in value and "unseen_share" not in value["gzsl"]:
        return False
    return all(
        is_count(chosen["epoch"]) and is_share(chosen.get("unseen_share"))
        for chosen in value.values()
    )


def is_share(value) -> bool:
    """Whether it is a share, or None where none was chosen."""
    return value is None or is_number(value) and 0 <= value <= 1


def is_curve(value) -> bool:
    """Whether it is a seen-unseen curve, (n, 3)."""
    return isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == 3


def are_winners(value) -> bool:
    """Whether it is the winners for CZSL and GZSL; they may raise an error instead."""
    for winner in value.values():
        check_winner(winner, {"linear"})
    return all(is_count(winner["epoch"]) for winner in value.values())


# ---- parts


def is_selection(value: dict) -> bool:
    """Whether it is the state of a `Selection`."""
    if not all(
        state is None or is_metrics(state) for state in (value["last"], value["unselected"])
    ):
        return False
    picked = value["picked"]
    return {"czsl"} <= set(picked) <= {"czsl", "gzsl"} and all(
        entry is None
        or is_count(entry["epoch"])
        and is_share(entry.get("unseen_share"))
        and is_metrics(entry["metrics"])
        and is_by_class(entry.get("by_class", []))
        for entry in picked.values()
    )


def is_by_class(value) -> bool:
    """Whether it is accuracies by class: of unseen and of seen ones, or none at all."""
    return isinstance(value, list) and all(
        isinstance(accuracies, Tensor) and accuracies.ndim == 1 for accuracies in value
    )


def is_metrics(value) -> bool:
    """Whether it is a `Metrics` as a dict."""
    return are_numbers(value) and set(value) == set(Metrics._fields)


def is_losses(value: dict) -> bool:
    """Whether it is the state of a `LossMeter`."""
    rows = value["rows"]
    return isinstance(rows, Tensor) and rows.ndim == 2 and is_count(value["first"])


def are_embeddings(value: dict) -> bool:
    """Whether it is the state of `Embeddings`, none or all of them."""
    if value and set(value) != set(SPLITS):
        return False
    return all(
        (x.ndim, y.ndim, len(x)) == (2, 1, len(y)) and len(local_logits) in (0, len(y))
        for x, local_logits, y in value.values()
    )


def are_kept(value: dict) -> bool:
    """Whether it is the state of `Winners`."""
    return are_weights(value["embedder"]) and all(map(are_weights, value["kept"].values()))


def are_weights(value) -> bool:
    """Whether it is a dict of tensors and epochs, and of such dicts."""
    return isinstance(value, dict) and all(
        isinstance(part, Tensor) or is_count(part) or are_weights(part) for part in value.values()
    )


PARTS = {"selection": is_selection, "embeddings": are_embeddings, "winners": are_kept}

# what a run remembers; the metrics of a classifier once more for validation
NOTES = {
    "features": is_text,
    "logged": is_count,
    "wandb_id": is_text,
    "reuse_scen": is_yes_or_no,
    "scen_from": is_text,
    "model_sha256": is_text,
    "seconds": are_seconds,
    "graphs": are_numbers,
    "local": are_numbers,
    "global": are_numbers,
    "ausuc": is_number,
    "curve": is_curve,
    "choice": is_choice,
    "validation": are_numbers,
    "validation_winners": are_winners,
}

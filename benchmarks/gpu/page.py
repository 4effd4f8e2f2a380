"""The record of a card as a page that people read."""

from itertools import groupby

from benchmarks.flop import SIZES, run_cost
from benchmarks.gpu.parts import PARTS, WHOLE_RUN, shown
from scegg.config import default_config, read_config

WARNING = (
    "**CPU rehearsal.** These are no figures of a GPU: the command ran without one, only to show "
    "that it works."
)
SMALL_WARNING = "**Rehearsal at small sizes.** The figures say nothing about real runs."
# the part, its products, and the most minutes that CUB's whole training is to take on an H100
TARGETS = {"cub": ("float32", 5.0), "cub_tf32": ("TF32", 3.5)}
# an H100's: FLOP/s of float32 and of TF32 products, bytes/s of its memory (NVIDIA's data sheet)
NOMINAL = {"float32": 67e12, "TF32": 495e12}
NOMINAL_BYTES = 3.35e12


def page_of(record: dict, json_name: str) -> str:
    """The page, in Markdown."""
    card = record["card"] or "CPU rehearsal"
    lines = [f"# Benchmark on a GPU: {card}", ""]
    if record["card"] is None:
        lines += [WARNING, ""]
    elif record["small"]:
        lines += [SMALL_WARNING, ""]
    lines += [
        "Made by `python -m benchmarks.gpu` ([gpu.md](gpu.md) says how), "
        f"torch {record['torch']}; record: `records/{json_name}`. Medians, unless said.",
        "",
        *overview(record["parts"]),
    ]
    if record["card"] and not record["small"]:
        lines += targets(record["parts"])

    for part in PARTS:
        if part.name in record["parts"]:
            lines += section(record["parts"][part.name])
    return "\n".join(lines)


def overview(parts: dict) -> list[str]:
    """How each part ended."""
    rows = []
    for part in PARTS:
        if part.name not in parts:
            continue
        one = parts[part.name]
        rows.append(
            {
                "part": one["title"],
                "result": one["state"] + (f": {one['error']}" if one["error"] else ""),
                "seconds": f"{one['seconds']:.0f} of {one['limit']:.0f}",
                "date": one["date"],
                "commit": (one["commit"] or "unknown")[:12],
            }
        )
    return table(rows)


def section(part: dict) -> list[str]:
    """The tables of a part."""
    lines = [f"## {part['title']}", ""]
    if part["error"]:
        lines += [f"**Failed:** {part['error']}. What was measured before:", ""]
    for _, rows in groupby(part["rows"], key=lambda row: tuple(row)):
        lines += table(list(rows))
    return lines


def table(rows: list[dict]) -> list[str]:
    """Rows with the same keys as a table of Markdown."""
    if not rows:
        return []
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(cell(value) for value in row.values()) + " |" for row in rows]
    return [*lines, ""]


def cell(value) -> str:
    """A value in a table: a bar would end its cell."""
    return shown(value).replace("|", "\\|").replace("\n", " ")


def targets(parts: dict) -> list[str]:
    """CUB's whole training against its targets and against what an H100 needs at least."""
    rows = []
    for name, (products, minutes) in TARGETS.items():
        reached = extrapolated_minutes(parts.get(name))
        verdict = "not measured"
        if reached is not None:
            verdict = "reached" if reached <= minutes else "missed"
        rows.append(
            {
                "CUB's whole training": products,
                "target, min": minutes,
                "extrapolated, min": reached,
                "so": verdict,
                **cub_floor(products),
            }
        )
    return ["## Targets", "", *table(rows)]


def extrapolated_minutes(part: dict | None) -> float | None:
    """Minutes of the whole run that a rehearsal expects; None if it did not come so far."""
    for row in part["rows"] if part else []:
        if row["measure"].startswith(WHOLE_RUN):
            return row["value"]
    return None


def cub_floor(products: str) -> dict[str, float]:
    """The least minutes of stage 3 on CUB on an H100, by the memory and by the arithmetic."""
    cost = run_cost(SIZES["CUB"], read_config(default_config("CUB"), {}))
    seconds = cost.floor(NOMINAL[products], NOMINAL_BYTES)
    return {
        f"{kind} alone, min": sum(seconds[f"{what}, {kind}"] for what in ("training", "evaluating"))
        / 60
        for kind in ("traffic", "arithmetic")
    }

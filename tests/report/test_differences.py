"""results.py --compare: paired differences, what is marked, named, refused; every format."""

import csv
import io
import statistics

import pytest

import results
from report_helpers import METRICS, accuracies, write_run
from util import UserError

BASE = (20.0, 21.3, 24.4)  # of seeds 1, 2 and 3
OTHER = (19.5, 21.2, 23.0)
PAIRED = [first - second for first, second in zip(BASE, OTHER, strict=True)]


def write_seeds(folder, starts, first_seed=1, **changes):
    """Runs with these starts, one a seed; returns the folder as text."""
    for seed, start in enumerate(starts, first_seed):
        config = {"seed": seed, "syn_num": 300} | changes.get("config", {})
        others = changes | {"config": config}
        write_run(folder, f"CUB-{seed}", start, **{"features": "a", "seed": seed} | others)
    return str(folder)


def compared(capsys, first, second, *argv):
    """The rows of --compare by (block, name), and the lines on stderr."""
    results.main(["--compare", str(first), str(second), "--format", "csv", *argv])
    out, err = capsys.readouterr()
    rows = csv.DictReader(io.StringIO(out))
    return {(row["block"], row["method"]): row for row in rows}, err.splitlines()


def printed(capsys, first, second, format):
    """What --compare prints in a format."""
    results.main(["--compare", first, second, "--format", format])
    return capsys.readouterr().out


# ---- numbers


def test_means_differ_by_the_mean_over_the_seeds_that_both_have(tmp_path, capsys):
    first = write_seeds(tmp_path / "a", (*BASE, 70.0), method="ours")
    second = write_seeds(tmp_path / "b", OTHER, method="theirs")
    write_run(tmp_path / "b", "CUB-9", 0.0, seed=9, method="theirs", config={"syn_num": 300})
    rows, lines = compared(capsys, first, second)

    assert [name for _, name in rows] == ["best on test", "last epoch"] and not lines
    mean, error = statistics.mean(PAIRED), statistics.stdev(PAIRED) / 3**0.5
    for (block, _), row in rows.items():
        assert (block, row["runs"], row["measured_on"]) == ("ours minus theirs", "3", "")
        for name in METRICS:
            assert float(row[name]) == pytest.approx(mean, abs=1e-4)
            assert float(row[name + "_se"]) == pytest.approx(error, abs=1e-4)


def test_pairing_finds_what_the_deviations_of_the_means_hide(tmp_path, capsys):
    """1 ± 0.1 a seed over seeds that differ by tens: beyond two paired standard errors."""
    first = write_seeds(tmp_path / "a", (11.0, 21.1, 30.9), method="ours")
    second = write_seeds(tmp_path / "b", (10.0, 20.0, 30.0), method="theirs")
    rows, _ = compared(capsys, first, second)
    assert float(rows["ours minus theirs", "last epoch"]["H_se"]) < 0.1
    assert "[1.0±0.1]" in printed(capsys, first, second, "text")


def test_a_metric_that_a_run_lacks_has_no_difference(tmp_path, capsys):
    czsl = {prefix + name: ... for prefix in ("", "best_", "last_") for name in METRICS[1:]}
    first = write_seeds(tmp_path / "a", BASE, method="czsl", **czsl)
    second = write_seeds(tmp_path / "b", OTHER, method="theirs")
    rows, _ = compared(capsys, first, second)
    row = rows["czsl minus theirs", "best on test"]
    assert row["acc_zs"] and (row["H"], row["H_se"]) == ("", "")


# ---- formats


def test_every_format_marks_what_lies_beyond_two_standard_errors(tmp_path, capsys):
    # 1 each time but H, whose differences are 1, -1, 0
    first = write_seeds(tmp_path / "a", (21.0, 22.0, 23.0), method="a_b")
    for seed, H in enumerate((40.0, 43.0, 43.0), 1):
        same = {"last_H": H, "features": "a", "config": {"seed": seed, "syn_num": 300}}
        write_run(tmp_path / "b", str(seed), 19.0 + seed, seed=seed, method="c", **same)

    # last_H of ours: start + 19; so 40, 41, 42 against 40, 43, 43
    shown = {
        "text": ("a_b minus c", "[1.0±0.0]", "-1.0±0.6 ", "[Marked] differences lie"),
        "markdown": (r"*a\_b minus c*", "**1.0±0.0**", "| -1.0±0.6 |", "**Marked** differences"),
        "latex": (
            r"\emph{a\_b minus c}",
            r"\textbf{1.0$_{0.0}$}",
            r"-1.0$_{0.6}$ \\",
            r"\textbf{Marked} differences lie beyond two standard errors; standard errors are",
        ),
    }
    for format, texts in shown.items():
        out = printed(capsys, first, str(tmp_path / "b"), format)
        for text in (*texts, "30 of 100 differences"):
            assert text in out, (format, text)


def test_the_output_file_holds_what_is_printed(tmp_path, capsys):
    first = write_seeds(tmp_path / "a", BASE, method="ours")
    second = write_seeds(tmp_path / "b", OTHER, method="theirs")
    text = printed(capsys, first, second, "text")
    results.main(["--compare", first, second, "--output", str(tmp_path / "new" / "table.txt")])
    assert (tmp_path / "new" / "table.txt").read_text(encoding="utf-8") == text


# ---- which groups and rows


def test_every_pair_of_groups_is_a_block(tmp_path, capsys):
    for name in ("x", "y"):
        write_seeds(tmp_path / "a" / name, BASE, method=name)
        write_seeds(tmp_path / "b" / name, OTHER, method=f"{name} changed")
    rows, _ = compared(capsys, tmp_path / "a", tmp_path / "b")
    blocks = {block for block, _ in rows}
    assert blocks == {f"{x} minus {y} changed" for x in "xy" for y in "xy"}


def test_configs_of_one_method_are_named_by_what_sets_them_apart(tmp_path, capsys):
    first = write_seeds(tmp_path / "a", BASE, config={"syn_num": 200, "log_figures": True})
    second = write_seeds(tmp_path / "b", OTHER, config={"syn_num": 400})
    rows, _ = compared(capsys, first, second)
    assert {block for block, _ in rows} == {"SC-EGG (syn_num=200) minus SC-EGG (syn_num=400)"}
    assert ("SCEN alone: local classifier") in {name for _, name in rows}


def test_ways_of_picking_are_compared_across_protocols_and_within_a_group(tmp_path, capsys):
    no_best = dict.fromkeys(accuracies(0, ("best_",)), ...)
    paper = write_seeds(tmp_path / "a", BASE, method="x")
    validated = write_seeds(tmp_path / "b", BASE, method="x", protocol="validated", **no_best)
    rows, _ = compared(capsys, paper, validated)
    assert [name for _, name in rows] == [
        "best on test minus validated",
        "best on test minus validated, last epoch",
        "last epoch minus validated",
        "last epoch minus validated, last epoch",
    ]
    # in `accuracies`, best_ begins 4 above the validated numbers
    assert float(rows["x minus x", "best on test minus validated"]["H"]) == 4

    rows, _ = compared(capsys, paper, paper)
    assert rows["x minus x", "best on test minus last epoch"]["H"] == "-4.0000"
    assert len(rows) == 1


# ---- other data, too few seeds


def test_groups_that_share_too_few_seeds_are_said_in_a_line(tmp_path, capsys):
    first = write_seeds(tmp_path / "a", BASE, method="ours")
    write_seeds(tmp_path / "b" / "few", OTHER, first_seed=3, method="few")
    with pytest.raises(UserError, match="two or more seeds in common"):
        results.main(["--compare", first, str(tmp_path / "b")])
    assert capsys.readouterr().err.endswith("they share one seed, and two are needed\n")

    write_seeds(tmp_path / "b" / "same", OTHER, method="same")
    rows, lines = compared(capsys, first, tmp_path / "b")
    assert {block for block, _ in rows} == {"ours minus same"}
    assert len(lines) == 1 and "ours minus few, CUB: not compared" in lines[0]


def test_other_splits_are_refused(tmp_path, capsys):
    first = write_seeds(tmp_path / "a", BASE, method="ours")
    other = {"split_fingerprint": "0123456789ab"}
    second = write_seeds(tmp_path / "b", OTHER, method="theirs", **other)
    with pytest.raises(UserError, match="the same split"):
        results.main(["--compare", first, second])
    line = capsys.readouterr().err
    assert "their splits differ (62d41356ed4d, 0123456789ab)" in line and line.count("\n") == 1


def test_other_features_are_marked(tmp_path, capsys):
    first = write_seeds(tmp_path / "a", BASE, method="ours")
    second = write_seeds(tmp_path / "b", OTHER, method="theirs", features="b", backbone="vgg16")
    rows, _ = compared(capsys, first, second)
    mark = rows["ours minus theirs", "last epoch"]["measured_on"]
    assert mark.startswith("†1 CUB, split 62d41356ed4d") and "features of vgg16" in mark
    assert "Not on the same feature files (a minus b)" in mark
    assert "last epoch †1" in printed(capsys, first, second, "text")


# ---- the command


def test_a_pattern_in_quotes_names_records(tmp_path, monkeypatch, capsys):
    runs = write_seeds(tmp_path / "a", BASE, method="ours")
    others = write_seeds(tmp_path / "b", OTHER, method="theirs")
    results.main([runs, others, "--record", str(tmp_path / "records")])
    capsys.readouterr()
    expected = printed(capsys, runs, others, "text")

    monkeypatch.chdir(tmp_path)
    assert printed(capsys, "records/cub_ours*", "records/*theirs*", "text") == expected


@pytest.mark.parametrize("more", (["c"], ["--against", "c"], ["--figure", "c.png"]), ids=" ".join)
def test_what_does_not_go_with_compare_is_refused(more):
    with pytest.raises(UserError, match="put quotes around a pattern"):
        results.main(["--compare", "a", "b", *more])


def test_a_place_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\* does not exist"):
        results.main(["--compare", str(tmp_path / "nowhere*"), str(tmp_path)])

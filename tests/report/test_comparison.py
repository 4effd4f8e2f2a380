"""results.py on made-up summaries: groups and rows, marks, duplicates, broken files, mistakes."""

import shutil
import statistics
import subprocess
import sys

import pytest

import results
from helpers import ROOT, run_script
from report_helpers import METRICS, accuracies, printed_table, table_rows, write_run
from scegg.report.comparison import published_rows
from util import UserError

PUBLISHED_SC_EGG = {
    "CUB": (75.1, 64.1, 73.6, 68.5),
    "SUN": (69.2, 45.1, 43.6, 44.3),
    "AWA2": (78.2, 60.9, 89.3, 72.4),
}


# ---- rows


def test_published_numbers_are_the_papers():
    by_family = published_rows(list(PUBLISHED_SC_EGG))
    counts = {family: len(rows) for family, rows in published_rows(["CUB"]).items()}
    assert counts == {"embedding": 6, "generative": 11}

    rows = [row for family in by_family.values() for row in family]
    for row in rows:
        for dataset in PUBLISHED_SC_EGG:
            cells = [row.cells.get((dataset, name), (None,)) for name in METRICS[1:]]
            U, S, H = (cell[0] for cell in cells)
            if H is not None and (row.method, dataset) != ("GCM-CF", "AWA2"):
                assert abs(2 * U * S / (U + S) - H) < 0.11, (row.method, dataset)

    for dataset, published in PUBLISHED_SC_EGG.items():
        assert tuple(rows[-1].cells[dataset, name][0] for name in METRICS) == published


def test_mean_and_sample_deviation_over_seeds(tmp_path, capsys):
    starts = (20.0, 21.3, 24.4)
    for seed, start in enumerate(starts):
        write_run(tmp_path, f"CUB-20260101-00000{seed}-a", start, seed=seed)
    mean, deviation = statistics.mean(starts), statistics.stdev(starts)
    rows, _ = table_rows(capsys, tmp_path)

    # numbers rise in the order of the prefixes in `accuracies`, of which the third has no row
    methods = {
        "SCEN alone: local classifier": 0,
        "SCEN alone: distilled classifier": 1,
        "SC-EGG, best on test": 3,
        "SC-EGG, last epoch": 4,
    }
    for method, index in methods.items():
        row = rows[method, "CUB"]
        assert row["runs"] == "3"
        for offset, name in enumerate(METRICS):
            assert float(row[name]) == pytest.approx(mean + 4 * index + offset, abs=1e-4)
            assert float(row[name + "_std"]) == pytest.approx(deviation, abs=1e-4)


def test_methods_share_a_row_over_datasets(tmp_path, capsys):
    sun = {"dataset": "SUN", "split_fingerprint": "e90b2456563a"}
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", start=30.0, config={"seed": 1, "syn_num": 400}, **sun)

    out, _ = printed_table(capsys, tmp_path, format="markdown")
    (line,) = (line for line in out.splitlines() if "SC-EGG, last epoch" in line)
    name, runs, *numbers = [cell.strip(" *") for cell in line.strip("|").split("|")]
    assert (name, runs) == ("SC-EGG, last epoch", "1/1/-")
    on_cub, on_sun, on_awa2 = numbers[:4], numbers[4:8], numbers[8:]
    assert on_cub == ["36.0", "37.0", "38.0", "39.0"]
    assert on_sun == ["46.0", "47.0", "48.0", "49.0"]
    assert on_awa2 == ["-"] * 4

    only_sun, _ = table_rows(capsys, tmp_path, "--dataset", "SUN")
    assert {dataset for _, dataset in only_sun} == {"SUN"}


def test_czsl_alone_and_validated_runs(tmp_path, capsys):
    czsl = {prefix + name: ... for prefix in ("", "best_", "last_") for name in METRICS[1:]}
    write_run(tmp_path, "a", method="czsl", **czsl)
    no_best = dict.fromkeys(accuracies(0, ("best_",)), ...)
    write_run(tmp_path, "b", protocol="validated", **no_best)

    rows, _ = table_rows(capsys, tmp_path, "--dataset", "CUB")
    row = rows["czsl, best on test", "CUB"]
    assert (row["acc_zs"], row["H"]) == ("32.0000", "")
    # neither best_ nor last_: acc_zs to H themselves
    assert rows["SC-EGG, validated", "CUB"]["H"] == "31.0000"
    assert ("SC-EGG, best on test", "CUB") not in rows
    assert ("SC-EGG, last epoch", "CUB") not in rows

    out, _ = printed_table(capsys, tmp_path, "--dataset", "CUB", format="text")
    (line,) = (line for line in out.splitlines() if line.startswith("czsl, last"))
    assert line.split()[-4:] == ["36.0", "-", "-", "-"]


def test_only_rows_on_the_published_benchmark_are_ranked(tmp_path, capsys):
    prefixes = ("local_", "global_", "best_", "last_")
    best = dict.fromkeys(accuracies(0, prefixes), 99.0)
    small = {"full_published_split": False, "split_fingerprint": "9a9b50b5b76c"}
    write_run(tmp_path, "small", method="small", **best | small)
    write_run(tmp_path, "other", method="other", **best | {"backbone": "vgg16"})
    write_run(tmp_path, "ours", method="ours", best_acc_zs=77.0, best_H=68.54, last_H=68.4)

    out, _ = printed_table(capsys, tmp_path, "--dataset", "CUB", format="markdown")
    rows = [line for line in out.splitlines() if line.startswith("|")]
    lines = {line.split(" |")[0].strip("| "): line for line in rows}
    for marked in ("small, best on test †2", "other, last epoch †1"):
        assert "99.0" in lines[marked]
        assert "**" not in lines[marked] and "<u>" not in lines[marked]
        assert out.index(marked) > out.index("not comparable") > out.index("ours, best on test")
    small_data = "CUB, split 9a9b50b5b76c (not the full published one), features of resnet101"
    assert f"†2 {small_data}" in out
    assert "†1 CUB, split 62d41356ed4d (the full published one), features of vgg16" in out

    # RGEN's 76.1 is third now
    assert "**77.5**" in lines["CE-GZSL 2021 ‡"]
    assert "<u>77.0</u>" in lines["ours, best on test"]
    # equal as printed: both are best
    assert "**68.5**" in lines["ours, best on test"] and "**68.5**" in lines["SC-EGG 2022"]
    assert "<u>68.4</u>" in lines["ours, last epoch"]

    rows, _ = table_rows(capsys, tmp_path)
    assert rows["small, last epoch", "CUB"]["measured_on"].startswith("†2")
    assert rows["ours, last epoch", "CUB"]["measured_on"] == ""


def test_maps_in_two_bytes_have_rows_of_their_own(tmp_path, capsys):
    write_run(tmp_path, "float32")
    write_run(tmp_path, "float16", dtype="float16")
    out, err = printed_table(capsys, tmp_path, format="markdown")
    assert "SC-EGG, best on test |" in out and "SC-EGG, best on test †1 |" in out
    assert "features of resnet101 as float16" in out and err == ""


def test_a_full_run_on_gaussian_word_vectors_is_marked_and_not_ranked(tmp_path, capsys):
    best = dict.fromkeys(accuracies(0, ("local_", "global_", "best_", "last_")), 99.0)
    write_run(tmp_path, "words", w2v="CUB_attribute.pkl")
    write_run(tmp_path, "gaussian", method="gaussian", w2v="gaussian", **best)

    out, _ = printed_table(capsys, tmp_path, "--dataset", "CUB", format="markdown")
    assert "gaussian, best on test †1" in out and "**99.0**" not in out
    assert "†1 CUB, split 62d41356ed4d (the full published one)" in out
    assert "features of resnet101, Gaussian word vectors" in out
    assert "| SC-EGG, best on test |" in out


def test_later_methods_stand_in_a_block_of_their_own_and_are_never_ranked(tmp_path, capsys):
    write_run(tmp_path)
    out, _ = printed_table(capsys, tmp_path, format="markdown")
    later = [line for line in out.splitlines() if "§" in line and line.startswith("|")]
    names = [line.split(" |")[0].strip("| ") for line in later]
    assert names == [
        "TransZero 2022 §1",
        "ViFR 2022 §1",
        "ViFR 2022 §2",
        "ZSLViT 2024 §3",
        "ZeroDiff 2025 §4",
        "GenZSL 2025 §5",
    ]
    assert not any("**" in line or "<u>" in line for line in later)
    assert "§2 ResNet-101, 224 px, not fine-tuned, attributes" in out
    places = [out.index(text) for text in ("SC-EGG 2022", "not ranked", "SC-EGG, best on test")]
    assert places == sorted(places)

    # the paper's rows with other semantics on CUB, and only there
    assert "| CE-GZSL 2021 ‡ |" in out and "| SDGZSL 2021 ‡ |" in out
    assert "CE-GZSL U 52.4, S 60.9, H 56.4 and SDGZSL H 54.9" in out
    rows, _ = table_rows(capsys, tmp_path)
    assert rows["CE-GZSL", "CUB"]["measured_on"].startswith("‡")


def test_keys_that_older_runs_lack_have_their_defaults(tmp_path, capsys):
    write_run(tmp_path, "older")
    newer = {"seed": 2, "syn_num": 300, "lr": 1e-4, "log_model": False, "protocol": "paper"}
    write_run(tmp_path, "newer", seed=2, config=newer)
    rows, _ = table_rows(capsys, tmp_path)
    assert rows["SC-EGG, best on test", "CUB"]["runs"] == "2"


# ---- which runs count


def test_the_newest_of_two_runs_of_one_config_and_seed_stays(tmp_path, capsys):
    newer = write_run(tmp_path / "b", "CUB-20260301-000000-abc", start=30.0)
    older = write_run(tmp_path / "c", "CUB-20260201-000000-abc", start=20.0)
    rows, err = table_rows(capsys, tmp_path)
    row = rows["SC-EGG, best on test", "CUB"]
    assert (row["H"], row["runs"]) == ("45.0000", "1")
    assert err.count("\n") == 1 and str(older) in err and "newer" in err

    (tmp_path / "two").mkdir()
    for month, features in enumerate(("30b47ff0a7db", "a7c76a3f3fd8"), start=1):
        write_run(tmp_path / "two", f"CUB-20260{month}01-000000-abc", features=features)
    _, err = table_rows(capsys, tmp_path / "two")
    assert "a newer run of the same config and seed, on another feature file" in err
    shutil.rmtree(tmp_path / "two")

    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "summary.json").write_text(newer.read_text())
    older.unlink()
    rows, err = table_rows(capsys, tmp_path)
    assert rows["SC-EGG, best on test", "CUB"]["runs"] == "1"
    assert not err  # a copy is no other run


def test_a_row_over_two_feature_files_says_so(tmp_path, capsys):
    for seed, features in enumerate(("30b47ff0a7db", "30b47ff0a7db", "a7c76a3f3fd8")):
        write_run(tmp_path, f"run{seed}", seed=seed, features=features)
    rows, err = table_rows(capsys, tmp_path)
    assert rows["SC-EGG, best on test", "CUB"]["runs"] == "3"
    assert err.startswith("warning: SC-EGG, protocol paper, on CUB: its runs read 2 feature files")


BROKEN_FILES = {
    "half a file": '{"dataset": "CUB", "se',
    "a list": "[1, 2]",
    "no JSON": "\x00\x01",
    "nested deep": "[" * 100_000,
    "another program's": '{"accuracy": 3}',
}
WRONG_VALUES = {
    "a dataset of its own": {"dataset": "ImageNet"},
    "no seed": {"seed": ..., "config": None},
    "not a number": {"best_H": float("nan")},
    "a fraction of text": {"last_H": "0.5"},
    "above 100": {"acc_zs": 101},
    "a method in two lines": {"method": "a\nb"},
    "a config in words": {"config": "default"},
    "an unknown protocol": {"protocol": "x"},
}


def check_left_out(tmp_path, capsys, bad):
    """Beside a good run, a bad one is named in a line of its own and left out."""
    write_run(tmp_path, "good")
    rows, err = table_rows(capsys, tmp_path)
    assert err.startswith(f"warning: {bad} is left out: ") and err.count("\n") == 1
    assert rows["SC-EGG, best on test", "CUB"]["runs"] == "1"


@pytest.mark.parametrize("content", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_what_is_no_summary_is_named_and_left_out(tmp_path, capsys, content):
    bad = write_run(tmp_path, "bad", seed=5)
    bad.write_text(content)
    check_left_out(tmp_path, capsys, bad)


def test_an_own_dataset_without_its_description_is_told_where_that_goes(tmp_path, capsys):
    bad = write_run(tmp_path, "bad", seed=5, dataset="PONIES")
    check_left_out(tmp_path, capsys, bad)
    _, err = table_rows(capsys, tmp_path)
    assert "put its description into data/PONIES/layout.yaml" in err


@pytest.mark.parametrize("changes", WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_a_summary_with_a_wrong_value_is_named_and_left_out(tmp_path, capsys, changes):
    bad = write_run(tmp_path, "bad", **{"seed": 5} | changes)
    check_left_out(tmp_path, capsys, bad)


def test_old_records_and_unfinished_runs(tmp_path, capsys):
    """Summaries without method, protocol, config and last_*: a row, and a warning of the other."""
    lacking = dict.fromkeys(["method", "protocol", "config", *accuracies(0, ("last_",))], ...)
    old = write_run(tmp_path, "old", **lacking)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "metrics.jsonl").write_text("")
    (old.parent / "metrics.jsonl").write_text("")

    rows, err = table_rows(capsys, tmp_path)
    assert rows["SC-EGG (config unknown), best on test", "CUB"]["H"] == "35.0000"
    assert ("SC-EGG (config unknown), last epoch", "CUB") not in rows
    assert "unfinished (no summary.json): 1" in err
    assert "last epoch" in err and err.count("\n") == 2


# ---- the command


def command(*argv, cwd):
    """Run the script; returns (exit status, stderr)."""
    words = [sys.executable, ROOT / "results.py", *argv]
    done = subprocess.run(words, cwd=cwd, text=True, capture_output=True)
    return done.returncode, done.stderr


def test_exit_statuses(tmp_path, monkeypatch):
    write_run(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert command("--format", "latex", "--dataset", "CUB", cwd=tmp_path) == (0, "")

    monkeypatch.chdir(tmp_path)
    for argv in (["nowhere"], ["--colour"], ["--output", "file/table.md"]):
        status, err = run_script("results.py", *argv)
        assert status == 2, (argv, err)
        assert err.startswith("error: ") and err.count("\n") == 1, (argv, err)


def test_nobody_reads_the_table(tmp_path, monkeypatch):
    write_run(tmp_path / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)  # as with >&-
        with pytest.raises(UserError, match="stdout is closed.: use --output FILE"):
            results.main([str(tmp_path / "runs")])

    pipe = f"{sys.executable} {ROOT / 'results.py'} | head -0; exit ${{PIPESTATUS[0]}}"
    bash = {"shell": True, "executable": "/bin/bash"}
    done = subprocess.run(pipe, **bash, cwd=tmp_path, text=True, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == "error: the table could not be printed (Broken pipe)\n"


@pytest.mark.parametrize(
    "argv",
    (
        ["empty"],
        ["--dataset", "AWA2"],
        ["--dataset", "MNIST"],
        ["--format", "html"],
        ["--figure", "results.bmp"],
        ["--figure", "file/results.png"],
        ["--record", "file"],
        ["--output", "empty"],
    ),
    ids=" ".join,
)
def test_mistakes_are_user_errors(tmp_path, monkeypatch, argv):
    """`exit_on_user_error` makes status 2 and one line of them."""
    write_run(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        results.main(argv)
    assert "\n" not in str(error.value)

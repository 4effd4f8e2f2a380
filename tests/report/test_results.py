"""The comparison table on made-up summaries: numbers in every format, ranking, marks, duplicates, broken files, exit statuses."""
import csv
import io
import json
import re
import statistics
import subprocess
import sys

import pytest
from helpers import ROOT

import results
from util import UserError
from scegg.datasets.layouts import LAYOUTS

METRICS = ("acc_zs", "acc_unseen", "acc_seen", "H")
FULL = {"split_fingerprint": "62d41356ed4d", "full_published_split": True, "backbone": "resnet101"}


def numbers(start, prefixes=("local_", "global_", "", "best_", "last_")):
    """Metrics of a summary: start, start + 1, ... in the order of prefixes and METRICS."""
    keys = [prefix + name for prefix in prefixes for name in METRICS]
    return {key: start + index for index, key in enumerate(keys)}


def write_run(folder, name="CUB-20260101-000000-abc", start=20.0, **changes):
    """A run folder with the summary of a run on full CUB; returns the summary's path."""
    summary = {"dataset": "CUB", "seed": 1, "method": "SC-EGG", "protocol": "paper"} | FULL | numbers(start) | changes
    summary.setdefault("config", {"seed": summary["seed"], "syn_num": 300, "lr": 1e-4})
    path = folder / name / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({key: value for key, value in summary.items() if value is not Ellipsis}))
    return path


def table(capsys, folder, *argv, format="csv"):
    """(stdout, stderr) of the command; for CSV, stdout as rows by (method, dataset)."""
    results.main([str(folder), "--format", format, *argv])
    out, err = capsys.readouterr()
    return ({(row["method"], row["dataset"]): row for row in csv.DictReader(io.StringIO(out))} if format == "csv" else out), err


def test_published_numbers_are_the_papers():
    rows = [row for rows in results.published_rows(["CUB", "SUN", "AWA2"]).values() for row in rows]
    assert {family: len(rows) for family, rows in results.published_rows(["CUB"]).items()} == {"embedding": 6, "generative": 11}
    for row in rows:
        for dataset in ("CUB", "SUN", "AWA2"):
            U, S, H = (row.cells.get((dataset, name), (None,))[0] for name in METRICS[1:])
            if H is not None and (row.method, dataset) != ("GCM-CF", "AWA2"):
                assert abs(2 * U * S / (U + S) - H) < 0.11, (row.method, dataset)
    for dataset in ("CUB", "SUN", "AWA2"):
        assert tuple(rows[-1].cells[dataset, name][0] for name in METRICS) == LAYOUTS[dataset].scegg


def test_mean_and_sample_deviation_over_seeds_in_every_format(tmp_path, capsys):
    starts = (20.0, 21.3, 24.4)
    for seed, start in enumerate(starts):
        write_run(tmp_path, f"CUB-20260101-00000{seed}-a", start, seed=seed)
    mean, deviation = statistics.mean(starts), statistics.stdev(starts)
    rows, _ = table(capsys, tmp_path)
    order = ("SCEN alone: local classifier", "SCEN alone: distilled classifier", "", "SC-EGG, best on test", "SC-EGG, last epoch")
    for index, method in enumerate(order):
        for offset, name in enumerate(METRICS if method else ()):
            row = rows[method, "CUB"]
            assert float(row[name]) == pytest.approx(mean + 4 * index + offset, abs=1e-4)
            assert float(row[name + "_std"]) == pytest.approx(deviation, abs=1e-4) and row["runs"] == "3"
    H = mean + 4 * 4 + 3
    shown = {"text": f"{H:.1f}±{deviation:.1f}", "markdown": f"| {H:.1f}±{deviation:.1f} |", "latex": f"{H:.1f}$_{{{deviation:.1f}}}$"}
    for format, expected in shown.items():
        line, = [line for line in table(capsys, tmp_path, format=format)[0].splitlines() if "SC-EGG, last epoch" in line]
        assert expected in line and re.search(r"\b3/-/-", line)
        assert len(re.findall(r"\d+\.\d±|\d+\.\d\$_", line)) == 4


def test_a_single_run_has_no_deviation(tmp_path, capsys):
    write_run(tmp_path)
    row = table(capsys, tmp_path)[0]["SC-EGG, best on test", "CUB"]
    assert row["H"] == "35.0000" and row["H_std"] == ""
    for format in ("text", "markdown", "latex"):
        line, = [line for line in table(capsys, tmp_path, format=format)[0].splitlines() if "SC-EGG, best on test" in line]
        assert "35.0" in line and "±" not in line and "$_" not in line


def test_methods_share_a_row_over_datasets(tmp_path, capsys):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", dataset="SUN", split_fingerprint="e90b2456563a", start=30.0, config={"seed": 1, "syn_num": 400})
    line, = [line for line in table(capsys, tmp_path, format="markdown")[0].splitlines() if "SC-EGG, last epoch" in line]
    cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
    assert cells == ["SC-EGG, last epoch", "1/1/-", "36.0", "37.0", "38.0", "39.0", "46.0", "47.0", "48.0", "49.0"] + ["-"] * 4
    only_sun, _ = table(capsys, tmp_path, "--dataset", "SUN")
    assert {dataset for _, dataset in only_sun} == {"SUN"}


def test_czsl_alone_and_validated_runs(tmp_path, capsys):
    czsl = {prefix + name: ... for prefix in ("", "best_", "last_") for name in METRICS[1:]}
    write_run(tmp_path, "a", method="czsl", **czsl)
    write_run(tmp_path, "b", protocol="validated", **{key: ... for key in numbers(0, ("best_",))})
    rows, _ = table(capsys, tmp_path, "--dataset", "CUB")
    assert (rows["czsl, best on test", "CUB"]["acc_zs"], rows["czsl, best on test", "CUB"]["H"]) == ("32.0000", "")
    assert rows["SC-EGG, validated", "CUB"]["H"] == "31.0000"  # neither best_ nor last_: acc_zs to H themselves
    assert ("SC-EGG, best on test", "CUB") not in rows and ("SC-EGG, last epoch", "CUB") not in rows
    line, = [line for line in table(capsys, tmp_path, "--dataset", "CUB", format="text")[0].splitlines() if line.startswith("czsl, last")]
    assert line.split()[-4:] == ["36.0", "-", "-", "-"]


def test_only_rows_on_the_published_benchmark_are_ranked(tmp_path, capsys):
    best = dict.fromkeys((prefix + name for prefix in ("local_", "global_", "best_", "last_") for name in METRICS), 99.0)
    write_run(tmp_path, "small", method="small", **best | {"full_published_split": False, "split_fingerprint": "9a9b50b5b76c"})
    write_run(tmp_path, "other", method="other", **best | {"backbone": "vgg16"})
    write_run(tmp_path, "ours", method="ours", best_acc_zs=77.0, best_H=68.54, last_H=68.4)
    out, _ = table(capsys, tmp_path, "--dataset", "CUB", format="markdown")
    lines = {line.split(" |")[0].strip("| "): line for line in out.splitlines() if line.startswith("|")}
    for marked in ("small, best on test †2", "other, last epoch †1"):
        assert "99.0" in lines[marked] and "**" not in lines[marked] and "<u>" not in lines[marked]
        assert out.index(marked) > out.index("not comparable") > out.index("ours, best on test")
    assert "†2 CUB, split 9a9b50b5b76c (not the full published one), features of resnet101" in out
    assert "†1 CUB, split 62d41356ed4d (the full published one), features of vgg16" in out
    assert "**77.5**" in lines["CE-GZSL 2021"] and "<u>77.0</u>" in lines["ours, best on test"]  # RGEN's 76.1 is third now
    assert "**68.5**" in lines["ours, best on test"] and "**68.5**" in lines["SC-EGG 2022"]  # equal as printed: both are best
    assert "<u>68.4</u>" in lines["ours, last epoch"]
    rows, _ = table(capsys, tmp_path)
    assert rows["small, last epoch", "CUB"]["measured_on"].startswith("†2") and rows["ours, last epoch", "CUB"]["measured_on"] == ""


def test_configs_that_differ_are_rows_that_say_how(tmp_path, capsys):
    for index, (syn_num, lr) in enumerate(((200, 1e-4), (300, 1e-4), (300, 1e-5))):
        write_run(tmp_path, str(index), config={"seed": 1, "syn_num": syn_num, "lr": lr, "nepoch": 5})
    write_run(tmp_path, "again", seed=2, start=22.0, config={"seed": 2, "syn_num": 200, "lr": 1e-4, "nepoch": 5})
    write_run(tmp_path, "old", config=..., method=..., protocol=...)
    rows, _ = table(capsys, tmp_path, "--dataset", "CUB")
    runs = {method: row["runs"] for (method, _), row in rows.items() if row["block"] == "This code"}
    assert runs == {"SCEN alone: local classifier": "2", "SCEN alone: distilled classifier": "2"} | {
        f"SC-EGG ({differs}), {selection}": count for selection in ("best on test", "last epoch")
        for differs, count in (("lr=0.0001, syn_num=200", "2"), ("lr=0.0001, syn_num=300", "1"), ("lr=1e-05, syn_num=300", "1"),
                               ("config unknown", "1"))}


def test_scen_alone_has_a_row_for_each_of_its_own_configs(tmp_path, capsys):
    for index, (precision, syn_num) in enumerate((("highest", 200), ("highest", 300), ("medium", 200))):
        write_run(tmp_path, str(index), 20.0 + index, config={"seed": 1, "syn_num": syn_num, "matmul_precision": precision})
    rows, _ = table(capsys, tmp_path, "--dataset", "CUB")
    alone = {method: row["acc_zs"] for (method, _), row in rows.items() if method.startswith("SCEN alone: local")}
    assert alone.keys() == {f"SCEN alone: local classifier (matmul_precision={precision})" for precision in ("highest", "medium")}
    assert alone["SCEN alone: local classifier (matmul_precision=medium)"] == "22.0000"


def test_two_releases_of_the_published_split_are_two_rows(tmp_path, capsys):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", start=50.0, split_fingerprint="0123456789ab")
    rows, _ = table(capsys, tmp_path)
    assert rows["SC-EGG (split=62d41356ed4d), last epoch", "CUB"]["H"] == "39.0000"
    assert rows["SC-EGG (split=0123456789ab), last epoch", "CUB"]["H"] == "69.0000"


def test_the_newest_of_two_runs_of_one_config_and_seed_stays(tmp_path, capsys):
    write_run(tmp_path / "b", "CUB-20260301-000000-abc", start=30.0)
    older = write_run(tmp_path / "c", "CUB-20260201-000000-abc", start=20.0)
    rows, err = table(capsys, tmp_path)
    assert rows["SC-EGG, best on test", "CUB"]["H"] == "45.0000" and rows["SC-EGG, best on test", "CUB"]["runs"] == "1"
    assert err.count("\n") == 1 and str(older) in err and "newer" in err
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "summary.json").write_text((tmp_path / "b" / "CUB-20260301-000000-abc" / "summary.json").read_text())
    older.unlink()
    rows, err = table(capsys, tmp_path)
    assert rows["SC-EGG, best on test", "CUB"]["runs"] == "1" and not err  # a copy is no other run


BROKEN = {"half a file": '{"dataset": "CUB", "se', "a list": "[1, 2]", "no JSON": "\x00\x01", "nested deep": "[" * 100_000,
          "another program's": '{"accuracy": 3}', "a dataset of its own": {"dataset": "ImageNet"}, "no seed": {"seed": ..., "config": None},
          "not a number": {"best_H": float("nan")}, "a fraction of text": {"last_H": "0.5"}, "above 100": {"acc_zs": 101},
          "a method in two lines": {"method": "a\nb"}, "a config in words": {"config": "default"}, "an unknown protocol": {"protocol": "x"}}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_is_no_summary_is_named_and_left_out(tmp_path, capsys, content):
    write_run(tmp_path, "good")
    bad = write_run(tmp_path, "bad", seed=5) if isinstance(content, str) else write_run(tmp_path, "bad", **{"seed": 5} | content)
    if isinstance(content, str):
        bad.write_text(content)
    rows, err = table(capsys, tmp_path)
    assert err.startswith(f"warning: {bad} is left out: ") and err.count("\n") == 1
    assert rows["SC-EGG, best on test", "CUB"]["runs"] == "1"


def test_old_records_and_unfinished_runs(tmp_path, capsys):
    """Summaries older than method, protocol, config and last_*: a row, and a warning that it has no honest one."""
    old = write_run(tmp_path, "old", method=..., protocol=..., config=..., **{key: ... for key in numbers(0, ("last_",))})
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "metrics.jsonl").write_text("")
    (old.parent / "metrics.jsonl").write_text("")
    rows, err = table(capsys, tmp_path)
    assert rows["SC-EGG (config unknown), best on test", "CUB"]["H"] == "35.0000"
    assert ("SC-EGG (config unknown), last epoch", "CUB") not in rows
    assert "unfinished (no summary.json): 1" in err and "last epoch" in err and err.count("\n") == 2


def cells_of(line):
    """How many columns a LaTeX row fills, multicolumns counted with what they span."""
    spans = [int(span) for span in re.findall(r"\\multicolumn\{(\d+)\}", line)]
    return len(re.findall(r"(?<!\\)&", line)) + 1 + sum(spans) - len(spans)


@pytest.mark.parametrize("datasets", (["CUB"], ["CUB", "SUN", "AWA2"]))
def test_latex_is_balanced_and_escaped(tmp_path, capsys, datasets):
    write_run(tmp_path, method=r"50% a_b & {c} #1 \x ~^$", full_published_split=False, split_fingerprint="9_9",
              backbone="efficientnet_lite2")
    write_run(tmp_path, "full", seed=3)
    out, _ = table(capsys, tmp_path, "--dataset", *datasets, format="latex")
    assert r"50\% a\_b \& \{c\} \#1 \textbackslash{}x \textasciitilde{}\textasciicircum{}\$, best on test $\dagger$1" in out
    assert r"split 9\_9 (not the full published one), features of efficientnet\_lite2" in out
    columns = re.search(r"\\begin\{tabular\}\{(l?c*)\}", out)[1]
    rows = [line for line in out.splitlines() if line.endswith(r"\\")]
    assert len(columns) == 2 + 4 * len(datasets) and {cells_of(line) for line in rows} == {len(columns)}
    assert len(rows) == 2 + 17 + 4 + 4 + 2 and all(ord(letter) < 128 for letter in out)
    assert out.count(r"\begin{tabular}") == out.count(r"\end{tabular}") == out.count(r"\toprule") == out.count(r"\bottomrule") == 1
    bare = re.sub(r"\\[{}\\$%&#_]", "", out)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0 and not re.search(r"[%#]", bare)
    assert r"\textbf{77.5}" in out and r"\underline{76.1}" in out and out.count(r"\begingroup") == out.count(r"\endgroup") == 1


def test_markdown_escapes_and_has_one_width(tmp_path, capsys):
    write_run(tmp_path, method="a|b_c*d*")
    lines = [line for line in table(capsys, tmp_path, format="markdown")[0].splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert any(line.startswith(r"| a\|b\_c\*d\*, best on test |") for line in lines)


def test_records_give_the_same_table_again(tmp_path, capsys):
    write_run(tmp_path / "runs", "a", seed=1)
    write_run(tmp_path / "runs", "b", seed=2, start=25.0)
    write_run(tmp_path / "runs", "c", seed=1, start=26.0, config={"seed": 1, "syn_num": 200, "lr": 1e-4})
    write_run(tmp_path / "runs", "d", seed=1, protocol="validated")
    write_run(tmp_path / "runs", "e", seed=1, full_published_split=False, split_fingerprint="9a9b50b5b76c", backbone="efficientnet_lite2")
    write_run(tmp_path / "runs", "f", seed=1, method="TF-VAEGAN (CNN features)")
    first, _ = table(capsys, tmp_path / "runs", "--record", str(tmp_path / "records"), format="text")
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == [
        "cub_sc-egg-efficientnet-lite2-9a9b50b5b76c_seed1.json", "cub_sc-egg-syn-num-200_seed1.json", "cub_sc-egg-syn-num-300_seed1.json",
        "cub_sc-egg-syn-num-300_seed2.json", "cub_sc-egg-validated_seed1.json", "cub_tf-vaegan-cnn-features_seed1.json"]
    assert table(capsys, tmp_path / "records", format="text") == (first, "")
    assert table(capsys, tmp_path / "runs", str(tmp_path / "records"), format="text") == (first, "")


def test_figure_and_output_files(tmp_path, capsys):
    write_run(tmp_path / "runs", method="$x_1$")  # no mathematics in a method's name
    printed, _ = table(capsys, tmp_path / "runs", format="markdown")
    out, _ = table(capsys, tmp_path / "runs", "--output", str(tmp_path / "new" / "table.md"),
                   "--figure", str(tmp_path / "new" / "results.png"), format="markdown")
    assert out == "" and (tmp_path / "new" / "table.md").read_text(encoding="utf-8") == printed
    from matplotlib import pyplot
    pixels = pyplot.imread(tmp_path / "new" / "results.png")[..., :3]
    red, blue = ((abs(pixels - color).max(axis=2) < 0.02).sum() for color in ((1, 0, 0), (0, 0, 1)))
    assert pixels.shape[1] > 1500 and red > 1000 and blue > 1000
    assert (pixels[:4] == 1).all() and (pixels[-4:] == 1).all() and (pixels[:, :4] == 1).all() and (pixels[:, -4:] == 1).all()
    with pytest.raises(UserError, match="ends in .png"):
        results.main([str(tmp_path / "runs"), "--figure", str(tmp_path / "results.bmp")])


def command(*argv, cwd):
    """Run the script; returns (exit status, stderr)."""
    done = subprocess.run([sys.executable, ROOT / "results.py", *argv], cwd=cwd, text=True, capture_output=True)
    return done.returncode, done.stderr


def test_exit_statuses(tmp_path):
    write_run(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    status, err = command("--format", "latex", "--dataset", "CUB", cwd=tmp_path)
    assert (status, err) == (0, "")
    for argv in (["nowhere"], ["--colour"], ["--output", "file/table.md"]):
        status, err = command(*argv, cwd=tmp_path)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, (argv, err)
    done = subprocess.run(f"{sys.executable} {ROOT / 'results.py'} | head -0; exit ${{PIPESTATUS[0]}}", shell=True, executable="/bin/bash",
                          cwd=tmp_path, text=True, stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr == "error: the table could not be printed (Broken pipe)\n"


@pytest.mark.parametrize("argv", (["empty"], ["--dataset", "AWA2"], ["--dataset", "MNIST"], ["--format", "html"],
                                  ["--figure", "results.bmp"], ["--figure", "file/results.png"], ["--record", "file"],
                                  ["--output", "empty"]), ids=" ".join)
def test_mistakes_are_user_errors(tmp_path, monkeypatch, argv):
    """`exit_on_user_error` makes status 2 and one line of them."""
    write_run(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        results.main(argv)
    assert "\n" not in str(error.value)

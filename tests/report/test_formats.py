"""The table's formats: numbers as they are printed, escapes, LaTeX, the picture."""

import re
import statistics

import pytest
from matplotlib import pyplot

import results
from report_helpers import printed_table, table_rows, write_run
from util import UserError


def line_of(capsys, folder, method, format):
    """The line of a method in a printed table."""
    out, _ = printed_table(capsys, folder, format=format)
    (line,) = (line for line in out.splitlines() if method in line)
    return line


def test_mean_and_deviation_in_every_format(tmp_path, capsys):
    starts = (20.0, 21.3, 24.4)
    for seed, start in enumerate(starts):
        write_run(tmp_path, f"CUB-20260101-00000{seed}-a", start, seed=seed)

    H = f"{statistics.mean(starts) + 4 * 4 + 3:.1f}"
    deviation = f"{statistics.stdev(starts):.1f}"
    shown = {
        "text": f"{H}±{deviation}",
        "markdown": f"| {H}±{deviation} |",
        "latex": f"{H}$_{{{deviation}}}$",
    }
    for format, expected in shown.items():
        line = line_of(capsys, tmp_path, "SC-EGG, last epoch", format)
        assert expected in line
        assert re.search(r"\b3/-/-", line)
        assert len(re.findall(r"\d+\.\d±|\d+\.\d\$_", line)) == 4


def test_a_single_run_has_no_deviation(tmp_path, capsys):
    write_run(tmp_path)
    rows, _ = table_rows(capsys, tmp_path)
    row = rows["SC-EGG, best on test", "CUB"]
    assert (row["H"], row["H_std"]) == ("35.0000", "")
    for format in ("text", "markdown", "latex"):
        line = line_of(capsys, tmp_path, "SC-EGG, best on test", format)
        assert "35.0" in line
        assert "±" not in line and "$_" not in line


def cells_of(line):
    """How many columns a LaTeX row fills, multicolumns counted with what they span."""
    spans = [int(span) for span in re.findall(r"\\multicolumn\{(\d+)\}", line)]
    return len(re.findall(r"(?<!\\)&", line)) + 1 + sum(spans) - len(spans)


HOSTILE_METHOD = r"50% a_b & {c} #1 \x ~^$"
ESCAPED_METHOD = r"50\% a\_b \& \{c\} \#1 \textbackslash{}x \textasciitilde{}\textasciicircum{}\$"


@pytest.mark.parametrize("datasets", (["CUB"], ["CUB", "SUN", "AWA2"]))
def test_latex_is_balanced_and_escaped(tmp_path, capsys, datasets):
    elsewhere = {"full_published_split": False, "split_fingerprint": "9_9"}
    elsewhere["backbone"] = "efficientnet_lite2"
    write_run(tmp_path, method=HOSTILE_METHOD, **elsewhere)
    write_run(tmp_path, "full", seed=3)
    out, _ = printed_table(capsys, tmp_path, "--dataset", *datasets, format="latex")

    assert ESCAPED_METHOD + r", best on test $\dagger$1" in out
    measured_on = r"split 9\_9 (not the full published one), features of efficientnet\_lite2"
    assert measured_on in out

    columns = re.search(r"\\begin\{tabular\}\{(l?c*)\}", out)[1]
    rows = [line for line in out.splitlines() if line.endswith(r"\\")]
    assert len(columns) == 2 + 4 * len(datasets)
    assert {cells_of(line) for line in rows} == {len(columns)}
    assert len(rows) == 2 + 17 + 6 + 4 + 4 + 3
    assert all(ord(letter) < 128 for letter in out)

    for once in (r"\begin{tabular}", r"\end{tabular}", r"\toprule", r"\bottomrule"):
        assert out.count(once) == 1
    assert out.count(r"\begingroup") == out.count(r"\endgroup") == 1
    bare = re.sub(r"\\[{}\\$%&#_]", "", out)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert not re.search(r"[%#]", bare)
    assert r"\textbf{77.5}" in out and r"\underline{76.1}" in out


def test_markdown_escapes_and_has_one_width(tmp_path, capsys):
    write_run(tmp_path, method="a|b_c*d*")
    out, _ = printed_table(capsys, tmp_path, format="markdown")
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert any(line.startswith(r"| a\|b\_c\*d\*, best on test |") for line in lines)


def test_figure_and_output_files(tmp_path, capsys):
    runs, table, picture = (tmp_path / name for name in ("runs", "new/table.md", "new/results.png"))
    write_run(runs, method="$x_1$")  # no mathematics in a method's name
    printed, _ = printed_table(capsys, runs, format="markdown")
    files = ["--output", str(table), "--figure", str(picture)]
    out, _ = printed_table(capsys, runs, *files, format="markdown")
    assert out == ""
    assert table.read_text(encoding="utf-8") == printed

    pixels = pyplot.imread(picture)[..., :3]
    assert pixels.shape[1] > 1500
    for color in ((1, 0, 0), (0, 0, 1)):  # red the best, blue the second
        assert (abs(pixels - color).max(axis=2) < 0.02).sum() > 1000
    for margin in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]):
        assert (margin == 1).all()

    with pytest.raises(UserError, match=r"ends in .png"):
        results.main([str(runs), "--figure", str(tmp_path / "results.bmp")])

"""Names in scripts that matplotlib's own font lacks: the system's fonts, or a line."""

import warnings
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from scegg.report import style

STIX = Path(matplotlib.get_data_path(), "fonts/ttf/STIXGeneral.ttf")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A system with two fonts: a damaged one, and one that has more than matplotlib's own."""
    damaged = tmp_path / "Damaged-Regular.ttf"
    damaged.write_text("no font")
    monkeypatch.setattr(style, "findSystemFonts", lambda: [str(STIX), str(damaged)])
    style.families_with.cache_clear()


def draw(path, *names):
    """The texts of a figure that was written without a warning."""
    figure = Figure(figsize=(2, 1))
    texts = [figure.text(0.1, 0.5, name) for name in names]
    with warnings.catch_warnings(action="error"):
        style.write_picture(figure, path.with_suffix(".pdf"))
        style.write_picture(figure, path.with_suffix(".png"))
    return texts


def test_a_font_of_the_system_has_the_letters(system, tmp_path, capsys):
    other, plain = draw(tmp_path / "f", "d with a hook: \u1d81", "plain")
    assert other.get_fontfamily() == plain.get_fontfamily() == ["sans-serif", "STIXGeneral"]
    assert capsys.readouterr().out == ""
    assert draw(tmp_path / "f", "plain $x$, grün, белка")[0].get_fontfamily() == ["sans-serif"]


def test_where_no_font_has_them_one_line_says_what_to_install(system, tmp_path, capsys):
    draw(tmp_path / "f", "\u732b", "\u72ac")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "such as CJK UNIFIED IDEOGRAPH-72AC, and" in said
    assert "fonts-noto-cjk" in said
    draw(tmp_path / "g", "\u732b", "\u72ac")
    assert capsys.readouterr().out == ""

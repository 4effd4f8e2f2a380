"""The seen-unseen curve: its points, its area, its picture."""

import pytest
import torch

import visualize
from scegg.method.calibration import area_under
from scegg.report.curves import curve_figure, read_curve

CURVE = "seen_bias,acc_seen,acc_unseen\n-inf,80.0,0.0\n-1,80.0,20.0\n0.5,60.0,40.0\n2,0.0,60.0\n"


def test_curve(tmp_path):
    (tmp_path / "seen_unseen_curve.csv").write_text(CURVE)
    curve = read_curve(tmp_path / "seen_unseen_curve.csv")
    area = area_under(torch.from_numpy(curve / 100))
    assert area == pytest.approx(0.2 * 0.8 + 0.2 * 0.7 + 0.2 * 0.3)

    (axes,) = curve_figure(curve, "TOY").axes
    assert axes.get_title() == "TOY: AUSUC 0.360"
    (marked,) = (line for line in axes.lines if line.get_marker() == "o")
    # the last point that a bias of 0 has reached
    assert marked.get_xydata().tolist() == [[20.0, 80.0]]

    visualize.main(["curve", "--run", str(tmp_path)])
    assert (tmp_path / "curve.pdf").stat().st_size
    assert (tmp_path / "curve.png").stat().st_size

"""Texts that editors and shells have saved anew: marks, UTF-16, line ends."""

import codecs
import json

import pytest

from helpers import SUN_CONFIG
from report_helpers import write_run
from scegg.config import read_config
from scegg.report.curves import read_curve
from scegg.report.summaries import read_run
from util import UserError

CURVE = "seen_bias,acc_seen,acc_unseen\n-1,80.0,20.0\n0.5,60.0,40.0\n"
# Windows' Notepad and PowerShell write these
SAVED = {
    "utf-8 with a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "utf-16-le": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16-be": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "crlf": lambda text: text.replace("\n", "\r\n").encode(),
    "cr": lambda text: text.replace("\n", "\r").encode(),
}


@pytest.mark.parametrize("saved", SAVED.values(), ids=SAVED)
def test_texts_are_read_however_they_were_saved(tmp_path, saved):
    config, curve = tmp_path / "c.yaml", tmp_path / "seen_unseen_curve.csv"
    config.write_bytes(saved("# café\n" + SUN_CONFIG.read_text()))
    assert read_config(config, {}) == read_config(SUN_CONFIG, {})
    curve.write_bytes(saved(CURVE))
    assert read_curve(curve).tolist() == [[-1, 80, 20], [0.5, 60, 40]]

    summary = write_run(tmp_path, method="café")
    summary.write_bytes(saved(json.dumps(json.loads(summary.read_text()), ensure_ascii=False)))
    assert read_run(summary).summary["method"] == "café"


@pytest.mark.parametrize(
    "content", ["café".encode("latin-1"), codecs.BOM_UTF16_LE + b"odd", b"a: \xff\xfe"]
)
def test_other_encodings_are_told_what_to_do(tmp_path, content):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError, match="c.yaml is no UTF-8 .*: save it as UTF-8"):
        read_config(tmp_path / "c.yaml", {})


def test_a_config_that_is_not_there_or_no_file(tmp_path):
    for path, advice in ((tmp_path / "none.yaml", "whether it is there"), (tmp_path, "of a file")):
        with pytest.raises(UserError, match=f"could not be read .*: .*{advice}, and run again"):
            read_config(path, {})

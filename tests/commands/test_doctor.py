"""doctor: it finds what is there, and says what to run next.

Its exit status says whether the installation is sound.
"""

import subprocess
import sys

import h5py
import pytest

import preprocessing
from helpers import ROOT
from scegg import doctor
from scegg.datasets import toy


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Run doctor in an empty folder; returns what it prints below a heading, line by line."""
    monkeypatch.chdir(tmp_path)

    def run(heading, *argv):
        doctor.main(list(argv))
        output = capsys.readouterr().out
        return output.split(f"\n{heading}\n")[1].split("\n\n")[0].splitlines()

    return run


def preprocess_toy(*more):
    """A feature file of TOY at 64 px."""
    flags = ["--backbone", "efficientnet_lite2", "--img_size", "64", "-n", "0"]
    preprocessing.main(["-d", "TOY", *flags, *more])


EMPTY_FOLDER = (
    "W&B has no key for api.wandb.ai: runs are logged offline",
    "GB of disk are free here",
    "data/CUB/CUB_200_2011/images is missing",
    "next: python -m scegg.datasets.toy",
    "next: put AWA2 below data",
    "unfinished\n  nothing",
)


def test_an_empty_folder_is_told_what_to_do(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "scegg.doctor"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )

    assert done.returncode == 0 and not done.stderr
    for line in EMPTY_FOLDER:
        assert line in done.stdout
    assert not list(tmp_path.iterdir())


def test_from_data_to_features_to_training(report, tmp_path):
    toy.render(tmp_path / "data", classes=5, unseen=1, images_per_class=5)
    lines = report("TOY")
    assert "25 images, 5 classes (4 seen, 1 unseen)" in lines[0]
    assert "25 of 25 images are there" in lines[1]
    assert "Gaussian" in lines[2]
    assert lines[3] == (
        "  next: python preprocessing.py --dataset TOY --backbone efficientnet_lite2 "
        "--img_size 224 --normalization backbone"
    )

    preprocess_toy("-c")
    lines = report("TOY")
    features = "efficientnet_lite2 at 64 px, 25 maps 1280x2x2, compressed, 0.00 GB, split "
    assert features in lines[3]
    assert lines[4] == "  next: python train_joint.py"

    made = tmp_path / "data/TOY/feature_map_efficientnet_lite2_TOY.hdf5"
    other = made.rename(made.with_name("mine.hdf5"))
    assert report("TOY")[4] == (
        "  next: python train_joint.py --features data/TOY/mine.hdf5 "
        "--backbone efficientnet_lite2 --img_size 64"
    )

    with h5py.File(other, "r+") as file:
        del file["labels"]
    lines = report("TOY")
    assert "lacks labels" in lines[3] and "preprocessing.py" in lines[4]

    next(tmp_path.glob("data/TOY/images/*/*.jpg")).unlink()
    lines = report("TOY")
    assert "24 of 25 images are there, the first one missing is images/" in lines[1]
    assert lines[-1] == "  next: python -m scegg.datasets.toy"


def test_features_of_another_split_are_not_recommended(report, tmp_path):
    toy.render(tmp_path / "data", classes=5, unseen=1, images_per_class=5)
    preprocess_toy()
    toy.render(tmp_path / "data", classes=6, unseen=1, images_per_class=5)
    assert report("TOY")[-1].startswith("  next: python preprocessing.py --dataset TOY")


def test_what_was_not_finished(report, tmp_path):
    parts = tmp_path / "data/CUB/x.hdf5.parts-0123"
    parts.mkdir(parents=True)
    (parts / "00000000-a.hdf5").write_bytes(bytes(10_000_000))
    for name in ("CUB-1", "TOY-2", "SUN-3"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "checkpoint.pt").touch()
    (tmp_path / "runs/SUN-3/summary.json").touch()

    lines = report("unfinished")
    assert lines[0].startswith("  data/CUB/x.hdf5.parts-0123: 1 parts of preprocessing, 0.01 GB")
    assert "python train_joint_CUB.py --resume runs/CUB-1 goes on" in lines[1]
    assert "train_joint.py --resume runs/TOY-2" in lines[2]
    assert len(lines) == 3


def not_installed(name):
    raise doctor.importlib.metadata.PackageNotFoundError(name)


def test_timm_is_optional(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "version", not_installed)
    assert doctor.timm_line().endswith("--backbone timm/<name> needs requirements-timm.txt")
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "1.0")
    assert doctor.timm_line() == "timm 1.0: --backbone timm/<name> works"


# what is patched, and what doctor says then
BREAKS = [
    ((sys, "version_info", (3, 10, 0)), "BROKEN: Python 3.11 to 3.14 is needed; this is"),
    ((sys, "version_info", (3, 15, 0)), "BROKEN: Python 3.11 to 3.14 is needed; this is"),
    (
        (doctor.importlib.metadata, "version", not_installed),
        "BROKEN: torch is not installed: pip install -r requirements.txt",
    ),
]


def assert_broken(capsys, message):
    with pytest.raises(SystemExit) as stop:
        doctor.main([])
    assert stop.value.code == 1 and message in capsys.readouterr().out


@pytest.mark.parametrize("patched, message", BREAKS)
def test_a_broken_installation_ends_with_status_1(monkeypatch, capsys, patched, message):
    with monkeypatch.context() as patch:
        patch.setattr(*patched)
        assert_broken(capsys, message)


def test_a_package_that_cannot_be_imported_ends_with_status_1(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "h5py", None)
        assert_broken(capsys, "BROKEN: import h5py fails")


def test_wandbs_key_is_found_without_asking(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "has no key" in doctor.wandb_state()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert doctor.wandb_state() == "W&B has a key for api.wandb.ai; WANDB_MODE=offline"


def test_a_pin_counts_where_its_marker_holds(monkeypatch):
    text = 'a==1.0\nb==2.0; python_version < "3.14"\nb==3.0; python_version >= "3.14"\n# c==4\n'
    for version, pinned in (((3, 13), "2.0"), ((3, 14), "3.0")):
        monkeypatch.setattr(sys, "version_info", (*version, 0))
        assert doctor.pins(text) == [("a", "1.0"), ("b", pinned)]


def test_every_line_of_the_requirements_is_a_pin():
    text = (ROOT / "requirements.txt").read_text()
    names = {line.split("==")[0] for line in text.splitlines() if not line.startswith("#")}
    assert {name for name, _ in doctor.pins(text)} == names

"""Files from strangers: nothing in them runs.

None shows what lies outside it, and none takes the machine's memory.
"""

import io
import pickle
import re
import shutil
import struct
import zipfile

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

import evaluate
from helpers import ROOT, feature_arrays, write_features
from scegg.config import read_config
from scegg.datasets import toy
from scegg.datasets.word_vectors import read_vectors
from scegg.datasets.xlsa17 import read_dataset
from scegg.features.backbones import read_state
from scegg.features.images import Images, Unreadable, image_transform
from scegg.features.reader import open_features
from scegg.report.attention import dataset_images, read_crop
from scegg.run.checkpoint import read_checkpoint
from scegg.run.trained import TrainedRun, load_run
from util import UserError


class Hostile:
    """Unpickled by anybody else, it makes the file `canary`."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


@pytest.fixture
def canary(tmp_path):
    yield tmp_path / "it_ran"
    assert not (tmp_path / "it_ran").exists()


def refused(read, match):
    with pytest.raises(UserError, match=match) as caught:
        read()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- pickles


def forged_array(dtype_state):
    """A pickle of a float array whose dtype has the state `dtype_state`; numpy would believe it."""

    class Forged:
        def __reduce__(self):
            make, _, _ = np.array([]).__reduce__()
            state = (1, (1,), Type(), False, b"\x01" * 8)
            return make, (np.ndarray, (0,), b"b"), state

    class Type:
        def __reduce__(self):
            return np.dtype, ("O8", False, True), dtype_state

    return pickle.dumps(Forged())


def pickles(canary):
    """Hostile pickles, by kind."""
    objects = np.empty(1, dtype=object)
    objects[0] = Hostile(canary)
    path = str(canary).encode()
    yield "reduce", pickle.dumps(Hostile(canary))
    yield "object array", pickle.dumps(objects)

    yield "protocol 0", b"cposix\nsystem\n(S'touch " + path + b"'\ntR."
    yield "inst", b"(S'touch " + path + b"'\niposix\nsystem\n."
    yield "builtins", b"cbuiltins\nexec\n(S'open(\"" + path + b'","w")\'\ntR.'
    yield "by a dotted name", b"\x80\x04\x8c\x05numpy\x8c\x0bos.path.join\x93."
    yield "numpy's loader", b"cnumpy\nload\n(S'x'\ntR."
    yield "persistent", b"Pperson\n."
    yield "extension", b"\x80\x02\x82\x01."

    yield "memory by the memo", b"\x80\x02]r\xff\xff\xff\x7f."
    yield "memory by a length", b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."
    yield "object pointers", forged_array((3, "|", None, None, None, -1, -1, 0))
    yield "a false shape", pickle.dumps(np.zeros(3)).replace(b"K\x03\x85", b"K\x09\x85")


@pytest.mark.parametrize("kind", [kind for kind, _ in pickles("")])
def test_word_vector_pickles(tmp_path, canary, kind):
    (tmp_path / "t.pkl").write_bytes(dict(pickles(canary))[kind])
    refused(lambda: read_vectors(tmp_path / "t.pkl", None), "was refused|does not hold a table")


def arrays(canary):
    """Hostile numpy files, by name."""
    objects = np.empty(1, dtype=object)
    objects[0] = Hostile(canary)
    npy, npz = io.BytesIO(), io.BytesIO()
    np.save(npy, objects, allow_pickle=True)
    np.savez(npz, objects=objects)
    endless = npy.getvalue().replace(b"(1,)", b"(99999999999,)").replace(b"|O", b"<f8")

    yield "objects.npy", npy.getvalue()
    yield "an_npz.npy", npz.getvalue()
    yield "a_pickle.npy", pickle.dumps(Hostile(canary))
    yield "endless.npy", endless
    yield "objects.npz", npz.getvalue()


@pytest.mark.parametrize("name", [name for name, _ in arrays("")])
def test_numpy_files(tmp_path, canary, name):
    (tmp_path / name).write_bytes(dict(arrays(canary))[name])
    refused(lambda: read_vectors(tmp_path / name, None), "refused|does not hold|expected .pkl")


def weights(canary, path):
    """Functions that write hostile weights to `path`, by name."""
    hostile = Hostile(canary)

    def script():
        torch.jit.script(torch.nn.Linear(1, 1)).save(path)

    def archive():
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a/data.pkl", pickle.dumps(hostile, 2))
            file.writestr("a/version", "3")

    def legacy():
        torch.save({"x": hostile}, path, _use_new_zipfile_serialization=False)

    return {
        "plain.pth": lambda: path.write_bytes(pickle.dumps(hostile)),
        "saved.pth": lambda: torch.save(hostile, path),
        "nested.pth": lambda: torch.save({"conv.weight": torch.zeros(1), "x": hostile}, path),
        "legacy.pth": legacy,
        "script.pth": script,
        "archive.pth": archive,
        "a_list.pth": lambda: torch.save([torch.zeros(1)], path),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*weights("", None)])
def test_weights(tmp_path, canary, name):
    weights(canary, tmp_path / name)[name]()
    refused(lambda: read_state(tmp_path / name), "can be loaded safely|does not hold a state dict")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*weights("", None)])
def test_checkpoints_and_runs(tmp_path, canary, name):
    """A run's folder from somebody else: its checkpoint.pt and its model.pt run nothing either."""
    for file in ("checkpoint.pt", "model.pt"):
        weights(canary, tmp_path / file)[name]()
    refused(lambda: read_checkpoint(tmp_path / "checkpoint.pt"), "checkpoint.pt is damaged")
    shutil.copy(ROOT / "wandb_config/cub_gzsl.yaml", tmp_path / "config.yaml")
    (tmp_path / "summary.json").write_text('{"dataset": "CUB"}')
    refused(lambda: load_run(tmp_path), "summary.json or model.pt is damaged")
    argv = ["--run", str(tmp_path), "--images", "a.jpg"]
    refused(lambda: evaluate.main(argv), "summary.json or model.pt is damaged")


# --------------------------------------------------------------- feature files that point elsewhere


def external_link(file, other):
    file["labels"] = h5py.ExternalLink(other, "/labels")


def soft_link_to_an_external_one(file, other):
    file["aside"] = h5py.ExternalLink(other, "/labels")
    file["labels"] = h5py.SoftLink("/aside")


def soft_link(file, other):
    file["aside"] = np.arange(108)
    file["labels"] = h5py.SoftLink("/aside")


def external_storage(file, other):
    file.create_dataset("labels", (108,), "i8", external=[(str(other), 0, 108 * 8)])


def virtual(file, other):
    layout = h5py.VirtualLayout((108,), "i8")
    layout[:] = h5py.VirtualSource(str(other), "labels", (108,))
    file.create_virtual_dataset("labels", layout)


def group(file, other):
    file.create_group("labels")


def endless(file, other):
    file.create_dataset("labels", (1 << 50,), "i8", chunks=(1 << 10,))


ELSEWHERE = [external_link, soft_link_to_an_external_one, soft_link, external_storage]
ELSEWHERE += [virtual, group, endless]


@pytest.mark.parametrize("point", ELSEWHERE)
@pytest.mark.parametrize("key", ["labels", "train_loc"])
def test_feature_files_that_point_elsewhere(tmp_path, point, key):
    (tmp_path / "elsewhere").mkdir()
    other = write_features(tmp_path / "elsewhere" / "other.hdf5", feature_arrays())
    path = write_features(tmp_path / "f.hdf5", feature_arrays())
    with h5py.File(path, "r+") as file:
        kept = file["labels"][()]
        del file["labels"]
        point(file, other)

        if key != "labels":  # the same trick on a dataset that a file need not have
            file.move("labels", key)
            file["labels"] = kept
    message = f"{key} is a link or a group|stored in other files|cannot be true|lacks"
    refused(lambda: open_features(path), message)


def test_maps_of_any_size_are_not_believed(tmp_path):
    arrays = feature_arrays()
    del arrays["feature_map"]
    path = write_features(tmp_path / "f.hdf5", arrays)
    with h5py.File(path, "r+") as file:
        shape = (108, 1 << 20, 1 << 10, 1 << 10)
        file.create_dataset("feature_map", shape, "f4", chunks=(1, 1, 1, 1))
    refused(lambda: open_features(path), "feature_map is of shape .*cannot be true")


# ---------------------------------------------------------------- images and .mat files


def bomb(path):
    Image.new("1", (30_000, 30_000)).save(path, "PNG")


def ribbon(path):
    Image.new("1", (1_000_000, 2)).save(path, "PNG")


def postscript(path):
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    path.write_bytes(header + b"%%EndComments\nshowpage\n%%EOF\n")


@pytest.mark.parametrize(
    "make, message",
    [
        (bomb, "decompression bomb|exceeds limit"),
        (ribbon, "no photograph"),
        (postscript, "cannot identify"),
    ],
)
def test_images(tmp_path, make, message):
    path = tmp_path / "bird.jpg"
    make(path)
    item = Images([path], image_transform(224))[0]
    assert isinstance(item, Unreadable) and str(path) in item
    error = str(UserError(item))
    assert re.search(message, error) and "\n" not in error
    refused(lambda: read_crop(path, 224), message)


@pytest.mark.parametrize(
    "tail, message",
    [
        ("../../outside/secret.png", "has no folder"),
        ("/outside/secret.png", "has no folder"),
        ("CUB_200_2011/../../../secret.png", "has no folder"),
        (0, "must be a list of texts"),
    ],
)
def test_image_paths_of_a_feature_file(tmp_path, tail, message):
    """visualize.py opens the images that a feature file names: they must lie in the data root."""
    path = write_features(tmp_path / "f.hdf5", feature_arrays())
    with h5py.File(path, "r+") as file:
        file["image_files"] = [tail] * 108
    config = read_config(ROOT / "wandb_config/cub_gzsl.yaml", {})

    def read():
        run = TrainedRun("run", "CUB", config, open_features(path), {})
        return dataset_images(run, tmp_path, 2, 0)

    refused(read, message)


def test_image_paths_elsewhere(tmp_path):
    path = write_features(tmp_path / "f.hdf5", feature_arrays())
    other = tmp_path / "other.hdf5"
    with h5py.File(other, "w") as file:
        file["tails"] = ["CUB_200_2011/secret.png"] * 108
    with h5py.File(path, "r+") as file:
        file["image_files"] = h5py.ExternalLink(str(other), "/tails")
    refused(lambda: open_features(path), "image_files is a link")

    with h5py.File(path, "r+") as file:
        del file["image_files"]
        file["image_files"] = ["a"] * 3
    refused(lambda: open_features(path), "image_files holds 3 texts, expected 108")


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    toy.render(root, classes=5, unseen=1, images_per_class=5)
    return root, (root / "xlsa17/data/TOY/res101.mat").read_bytes()


LEADING_OUTSIDE = ["/toy/TOY/images/../../../etc/passwd", "images/../../secret.jpg"]
LEADING_OUTSIDE += ["/etc/passwd", "..\\images\\..\\x.jpg", "/x/images/", ""]


@pytest.mark.parametrize("first", LEADING_OUTSIDE)
def test_image_paths_that_lead_outside(toy_root, first):
    root, whole = toy_root
    mat = scipy.io.loadmat(io.BytesIO(whole))
    files = mat["image_files"]
    files[0, 0] = np.array([first])
    arrays = {"image_files": files, "labels": mat["labels"]}
    scipy.io.savemat(root / "xlsa17/data/TOY/res101.mat", arrays)
    refused(lambda: read_dataset(root, "TOY"), "has no folder images|is not a column of texts")


def matlab_object(kind: int) -> bytes:
    """A .mat file whose `labels` is of MATLAB's class `kind`.

    3 is an object, 16 a function handle, 17 opaque.
    """

    def element(code, data):
        return struct.pack("<II", code, len(data)) + data + bytes(-len(data) % 8)

    body = element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack("<ii", 1, 1))
    body += element(1, b"labels") + element(1, b"system") + element(1, b"touch it")
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49)
    return header + element(14, body)


MAT_OBJECTS = [matlab_object(kind) for kind in (3, 16, 17, 99)]
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n" + bytes(200)


@pytest.mark.parametrize("content", [*MAT_OBJECTS, HDF5_SIGNATURE])
def test_mat_files_of_objects(toy_root, content):
    root, _ = toy_root
    (root / "xlsa17/data/TOY/res101.mat").write_bytes(content)
    refused(lambda: read_dataset(root, "TOY"), "res101.mat.*(is not|lacks|damaged|does not hold)")

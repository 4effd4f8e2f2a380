"""What MATLAB saved as v7.3, and texts that blanks pad: read as the older .mat files are."""

import shutil

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse

from scegg.datasets import toy
from scegg.datasets.mat73 import read_mat73
from scegg.datasets.xlsa17 import cell_texts, read_attribute_names, read_dataset, read_mat
from util import UserError

HEADER = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Mon Jan 01 00:00:00 2024"


def save_mat73(path, arrays):
    """Write arrays as MATLAB writes v7.3: axes reversed, texts as UTF-16, cells as references."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            if array.dtype == object:
                save_cell(file, name, array)
            elif array.dtype.kind == "U":
                save_text(file, name, "".join(array))
            else:
                data = np.atleast_2d(array).T
                chunks = {"chunks": True, "compression": "gzip"} if data.size else {}
                dataset = file.create_dataset(name, data=data, **chunks)
                dataset.attrs["MATLAB_class"] = np.bytes_("double")
    with open(path, "r+b") as file:
        file.write(HEADER.ljust(124) + b"\x00\x02IM")
    return path


def save_text(file, name, text):
    codes = np.frombuffer(text.encode("utf-16-le"), "<u2")[:, None]
    dataset = file.create_dataset(name, data=codes)
    dataset.attrs["MATLAB_class"] = np.bytes_("char")
    dataset.attrs["MATLAB_int_decode"] = np.int32(2)


def save_cell(file, name, cells):
    references = np.empty(cells.T.shape, h5py.ref_dtype)
    for place, cell in np.ndenumerate(cells.T):
        inner = f"#refs#/{name}{'_'.join(map(str, place))}"
        save_text(file, inner, str(np.asarray(cell).ravel()[0]))
        references[place] = file[inner].ref
    dataset = file.create_dataset(name, data=references, dtype=h5py.ref_dtype)
    dataset.attrs["MATLAB_class"] = np.bytes_("cell")


def arrays_of(path):
    return {key: value for key, value in scipy.io.loadmat(path).items() if key[0] != "_"}


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mat73")
    toy.render(root, classes=5, unseen=1, images_per_class=5)
    return root


@pytest.fixture
def root(toy_root, tmp_path):
    """A copy of TOY whose .mat files a test may replace."""
    shutil.copytree(toy_root, tmp_path / "data")
    return tmp_path / "data"


def mats(root):
    return [root / "xlsa17/data/TOY" / name for name in ("res101.mat", "att_splits.mat")]


def assert_same_dataset(root, toy_root):
    split, names, tails = read_dataset(root, "TOY")
    expected, expected_names, expected_tails = read_dataset(toy_root, "TOY")
    assert (names, tails) == (expected_names, expected_tails)
    assert split.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(split.att, expected.att)
    np.testing.assert_array_equal(split.val, expected.val)


def test_a_dataset_saved_as_v73_is_the_same(root, toy_root):
    for path in mats(root):
        save_mat73(path, arrays_of(path))
    assert_same_dataset(root, toy_root)


@pytest.mark.parametrize("as_rows", [False, True])
def test_texts_that_blanks_pad(root, toy_root, as_rows):
    """Of savemat: a list of texts becomes rows of characters; a padded array stays padded."""
    for path in mats(root):
        arrays = arrays_of(path)
        for key in ("image_files", "allclasses_names"):
            if key in arrays:
                texts = [str(cell.ravel()[0]) for cell in arrays[key].ravel()]
                width = max(map(len, texts)) + 3
                padded = [text.ljust(width) for text in texts]
                cells = np.array([*padded, None], dtype=object)[:-1, None]
                arrays[key] = texts if as_rows else cells
        scipy.io.savemat(path, arrays)
    assert_same_dataset(root, toy_root)


def test_arrays_are_scipys(tmp_path):
    arrays = {
        "wide": np.arange(6.0).reshape(2, 3),
        "text": np.array(["ÄÖ猫"]),
        "cell": np.array([["a b"], ["longer \U0001f426"]], dtype=object),
    }
    content = read_mat73(save_mat73(tmp_path / "a.mat", arrays), ("wide", "text", "cell", "none"))
    assert list(content) == ["wide", "text", "cell"]
    np.testing.assert_array_equal(content["wide"], arrays["wide"])
    assert content["text"].tolist() == ["ÄÖ猫"]
    assert cell_texts(content["cell"], "cell") == ["a b", "longer \U0001f426"]


def test_attribute_names_saved_as_v73(root):
    (root / "SUN").mkdir()
    names = np.array([["sailing/ boating"], ["dry"]], dtype=object)
    save_mat73(root / "SUN" / "attributes.mat", {"attributes": names})
    assert read_attribute_names(root, "SUN", 2) == ["sailing/ boating", "dry"]


# ---------------------------------------------------------------- as strict as the others


def external_link(file, other):
    file["labels"] = h5py.ExternalLink(str(other), "/labels")


def soft_link(file, other):
    file["aside"] = np.ones((1, 25))
    file["labels"] = h5py.SoftLink("/aside")


def external_storage(file, other):
    file.create_dataset("labels", (1, 25), "f8", external=[(str(other), 0, 200)])


def virtual(file, other):
    layout = h5py.VirtualLayout((1, 25), "f8")
    layout[:] = h5py.VirtualSource(str(other), "labels", (1, 25))
    file.create_virtual_dataset("labels", layout)


def structure(file, other):
    file.create_group("labels")


def endless(file, other):
    file.create_dataset("labels", (1 << 40, 1), "f8", chunks=(1 << 10, 1))


def text_object(file, other):
    file["labels"] = np.ones((1, 25), np.uint32)
    file["labels"].attrs["MATLAB_class"] = np.bytes_("string")


def a_text(file, other):
    save_text(file, "labels", "1 2 3")


HOSTILE = [external_link, soft_link, external_storage, virtual, structure, endless]
HOSTILE += [text_object, a_text]


@pytest.mark.parametrize("make", HOSTILE)
def test_hostile_arrays(root, make):
    path = mats(root)[0]
    other = root / "other.mat"
    save_mat73(other, arrays_of(path))
    save_mat73(path, arrays_of(path))
    with h5py.File(path, "r+") as file:
        del file["labels"]
        make(file, other)
    with pytest.raises(UserError, match="res101.mat: labels ") as caught:
        read_dataset(root, "TOY")
    assert "damaged" not in str(caught.value) and "\n" not in str(caught.value)


def to_nothing(file):
    return h5py.Reference()


def to_a_group(file):
    return file["#refs#"].ref


def to_numbers(file):
    file["#refs#/n"] = np.ones((3, 1))
    file["#refs#/n"].attrs["MATLAB_class"] = np.bytes_("double")
    return file["#refs#/n"].ref


def to_other_files(file):
    dataset = file.create_dataset("#refs#/o", (9, 1), "u2", external=[("/etc/passwd", 0, 18)])
    dataset.attrs["MATLAB_class"] = np.bytes_("char")
    return dataset.ref


def to_too_much(file):
    dataset = file.create_dataset("#refs#/t", (1 << 40, 1), "u2", chunks=(1 << 10, 1))
    dataset.attrs["MATLAB_class"] = np.bytes_("char")
    return dataset.ref


def to_an_empty_text(file):
    file["#refs#/e"] = np.zeros(2, np.uint64)
    file["#refs#/e"].attrs["MATLAB_class"] = np.bytes_("char")
    file["#refs#/e"].attrs["MATLAB_empty"] = np.uint8(1)
    return file["#refs#/e"].ref


def to_itself(file):
    return file["image_files"].ref


REFERENCES = [to_nothing, to_a_group, to_numbers, to_other_files, to_too_much, to_an_empty_text]
REFERENCES += [to_itself]


@pytest.mark.parametrize("make", REFERENCES)
def test_hostile_references(root, make):
    path = mats(root)[0]
    save_mat73(path, arrays_of(path))
    with h5py.File(path, "r+") as file:
        references = file["image_files"][()]
        references[0, 3] = make(file)
        file["image_files"][()] = references
    with pytest.raises(UserError, match="res101.mat: image_files") as caught:
        read_dataset(root, "TOY")
    assert "\n" not in str(caught.value)


def test_image_paths_of_v73_cannot_lead_outside(root):
    path = mats(root)[0]
    arrays = arrays_of(path)
    arrays["image_files"][0, 0] = np.array(["/toy/TOY/images/../../secret.jpg"])
    save_mat73(path, arrays)
    with pytest.raises(UserError, match="has no folder images"):
        read_dataset(root, "TOY")


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.9])
def test_a_truncated_file_is_said_to_be_so(root, keep):
    path = mats(root)[0]
    whole = save_mat73(path, arrays_of(path)).read_bytes()
    path.write_bytes(whole[: round(keep * len(whole))])
    with pytest.raises(UserError, match=r"res101.mat.*: download it again"):
        read_dataset(root, "TOY")


def test_a_missing_array_is_named(tmp_path):
    save_mat73(tmp_path / "a.mat", {"labels": np.ones((3, 1))})
    with pytest.raises(UserError, match="lacks image_files: it is not xlsa17's file"):
        read_mat(tmp_path / "a.mat", ("image_files", "labels"))

"""Where each dataset lies below the data root, and the numbers of its published split.

To add a dataset, add its entry to LAYOUTS.
"""

import dataclasses
from typing import NamedTuple


class Counts(NamedTuple):
    """The numbers of a dataset and its split.

    classes: seen and unseen ones. trainval, test_seen, test_unseen: the images in each part.
    """

    images: int
    classes: int
    seen: int
    attributes: int
    trainval: int
    test_seen: int
    test_unseen: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a dataset lies below `<data root>/<dataset>`, and what its published split holds.

    anchor: the folder with which the usable end of an image path begins, see `xlsa17.image_tail`.
    images: the folder that has to be there before anything is read.
    attribute_files: where the attribute names may be; the first that exists is read.
    published: the numbers of the paper's full split, None for a dataset that no paper uses.
    release: the fingerprint of the release of that split which most people have.
    made_by: the command that makes the dataset, None for one that has to be downloaded.
    """

    anchor: str
    images: str
    attribute_files: tuple[str, ...]
    published: Counts | None = None
    release: str | None = None
    made_by: str | None = None


LAYOUTS = {
    "CUB": Layout(
        anchor="CUB_200_2011",
        images="CUB_200_2011/images",
        attribute_files=(
            "attributes.txt",
            "CUB_200_2011/attributes.txt",
            "CUB_200_2011/attributes/attributes.txt",
        ),
        published=Counts(
            images=11788,
            classes=200,
            seen=150,
            attributes=312,
            trainval=7057,
            test_seen=1764,
            test_unseen=2967,
        ),
        release="62d41356ed4d",
    ),
    "SUN": Layout(
        anchor="images",
        images="images",
        attribute_files=("attributes.mat", "SUNAttributeDB/attributes.mat", "SUN_attributes.mat"),
        published=Counts(
            images=14340,
            classes=717,
            seen=645,
            attributes=102,
            trainval=10320,
            test_seen=2580,
            test_unseen=1440,
        ),
        release="e90b2456563a",
    ),
    "AWA2": Layout(
        anchor="Animals_with_Attributes2",
        images="Animals_with_Attributes2/JPEGImages",
        attribute_files=(
            "Animals_with_Attributes2/predicates.txt",
            "predicates.txt",
            "AWA2_predicates.txt",
        ),
        published=Counts(
            images=37322,
            classes=50,
            seen=40,
            attributes=85,
            trainval=23527,
            test_seen=5882,
            test_unseen=7913,
        ),
        release="dca72b876c46",
    ),
    "TOY": Layout(
        anchor="images",
        images="images",
        attribute_files=("attributes.txt",),
        made_by="python -m scegg.datasets.toy",
    ),
}

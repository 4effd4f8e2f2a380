"""Where each dataset lies below the data root, and the facts of its published split."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a dataset lies under the data root, and the facts its published split is checked against.

    anchor: the folder an image path's tail begins with. published: (images, classes, seen, attributes, trainval,
    test seen, test unseen), None for TOY; release: the fingerprint of the release of that split most people have.
    """
    anchor: str
    images: str
    attribute_files: tuple[str, ...]
    published: tuple[int, ...] | None = None
    release: str | None = None


LAYOUTS = {
    "CUB": Layout("CUB_200_2011", "CUB_200_2011/images",
                  ("attributes.txt", "CUB_200_2011/attributes.txt", "CUB_200_2011/attributes/attributes.txt"),
                  (11788, 200, 150, 312, 7057, 1764, 2967), "62d41356ed4d"),
    "SUN": Layout("images", "images",
                  ("attributes.mat", "SUNAttributeDB/attributes.mat", "SUN_attributes.mat"),
                  (14340, 717, 645, 102, 10320, 2580, 1440), "e90b2456563a"),
    "AWA2": Layout("Animals_with_Attributes2", "Animals_with_Attributes2/JPEGImages",
                   ("Animals_with_Attributes2/predicates.txt", "predicates.txt", "AWA2_predicates.txt"),
                   (37322, 50, 40, 85, 23527, 5882, 7913), "dca72b876c46"),
    "TOY": Layout("images", "images", ("attributes.txt",)),
}

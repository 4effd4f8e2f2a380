"""Images: resized, cropped and normalised as torchvision does it, bit for bit."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from scegg.datasets import toy
from scegg.features.images import Images, PixelNormalization, image_transform


def random_image(width, height):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "size",
    [
        (500, 375),
        (375, 500),
        (448, 448),
        (448, 700),
        (31, 1500),
        (1500, 31),
        (641, 97),
        (1, 50),
        (2001, 1333),
    ],
)
def test_resizing_and_cropping_are_torchvisions_bit_for_bit(size):
    image = random_image(*size)
    for side in (224, 448, 65):
        steps = [transforms.Resize(side), transforms.CenterCrop(side), transforms.PILToTensor()]
        expected = transforms.Compose(steps)(image)
        assert torch.equal(image_transform(side)(image), expected)


def test_pixels_are_torchvisions_bit_for_bit():
    image = random_image(50, 70)
    to_tensor = transforms.ToTensor()
    imagenet = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    own = transforms.Normalize([127 / 255] * 3, [128 / 255] * 3)
    expected, expected_own = imagenet(to_tensor(image)), own(to_tensor(image))

    pixels = transforms.PILToTensor()(image)[None]
    lite = "efficientnet_lite2"
    assert torch.equal(PixelNormalization("resnet101")(pixels)[0], expected)
    assert torch.equal(PixelNormalization(lite)(pixels)[0], expected)
    assert torch.equal(PixelNormalization(lite, "backbone")(pixels)[0], expected_own)
    assert not torch.allclose(expected_own, expected)


def test_images_can_be_sent_to_a_decoding_process(tmp_path):
    toy.render(tmp_path, classes=7, unseen=2, images_per_class=5)
    paths = sorted(tmp_path.glob("TOY/images/*/*.jpg"))[:3]
    images = Images(paths, image_transform(32))
    sent = pickle.loads(pickle.dumps(Images(paths, image_transform(32), workers=2)))

    ours, theirs = images.__getitems__([0, 1, 2]), sent.__getitems__([0, 1, 2])
    for image, sent_image in zip(ours, theirs, strict=True):
        assert image.shape == (3, 32, 32) and torch.equal(image, sent_image)

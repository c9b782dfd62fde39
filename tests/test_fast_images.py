"""`data.fast_images`: other pixels than Pillow's by next to nothing, and all else as without it."""

import io

import numpy as np
import pytest
from PIL import Image

from shared.data import fast_images
from shared.data.images import decode_rgb, plain_bytes
from shared.data.resizing import resize_visible

ORIENTATION = 274  # EXIF's tag


def picture(width, height, seed=0):
    """A smooth image with edges and some noise."""
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 5, height))
    waves = np.stack([np.sin(x + y), np.cos(x * 2), np.sin(y * 3)], axis=-1) * 100 + 128
    waves[height // 4 : height // 2, width // 3 : width // 2] = 250
    noise = np.random.default_rng(seed).normal(0, 5, waves.shape)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


CROPS = [
    ((96, 72), (0, 0, 96, 72)),
    ((400, 300), (0, 0, 128, 128)),
    ((400, 300), (211, 130, 339, 258)),
    ((401, 301), (273, 173, 401, 301)),
    ((160, 120), (25, 0, 153, 120)),
    ((1000, 700), (7, 0, 135, 128)),
    ((300, 60), (90, 0, 218, 60)),  # of which Pillow resizes the columns first
]


@pytest.mark.parametrize("resample", [Image.BILINEAR, Image.BICUBIC, Image.LANCZOS, Image.HAMMING])
@pytest.mark.parametrize(("size", "box"), CROPS)
def test_resizing_what_stays_of_an_image_gives_pillow_s_bits(size, box, resample):
    image = picture(201, 143)
    expected = np.asarray(image.resize(size, resample).crop(box))
    assert (np.asarray(resize_visible(image, size, box, resample)) == expected).all()


@pytest.mark.parametrize("resample", [Image.BILINEAR, Image.BICUBIC, Image.LANCZOS, Image.HAMMING])
@pytest.mark.parametrize(("size", "box"), CROPS[:-1])
def test_fast_resizing_is_next_to_pillow_s(size, box, resample):
    image = picture(201, 143)
    expected = np.asarray(image.resize(size, resample).crop(box)).astype(int)
    difference = abs(fast_images.resize_visible(np.asarray(image), size, box, resample) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.05


@pytest.mark.parametrize("flip", [None, Image.FLIP_LEFT_RIGHT, Image.FLIP_TOP_BOTTOM, Image.ROTATE_180])
def test_a_flip_is_pillow_s(flip):
    image = picture(31, 22)
    expected = np.asarray(image if flip is None else image.transpose(flip))
    assert (fast_images.flipped(np.asarray(image), flip) == expected).all()


def odd_images():
    image = picture(80, 60)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    plain = encoded(image, quality=90)
    middle = len(plain) // 2
    return {
        "JPEG": plain,
        "progressive": encoded(image, progressive=True),
        "grey": encoded(image.convert("L")),
        "turned": encoded(image, exif=exif),
        "upside down": encoded(image, exif=_orientation(3)),
        "not turned": encoded(image, exif=_orientation(1)),
        "CMYK": encoded(image.convert("CMYK")),
        "palette": encoded(image.quantize(32), "PNG"),
        "16 bits": encoded(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13), "PNG"),
        "PNG": encoded(image, "PNG"),
        "transparent": encoded(image.convert("RGBA"), "PNG"),
        "WebP": encoded(image, "WEBP"),
        "cut out": plain[:middle] + plain[middle + 150 :],
        "spoiled": plain[:middle] + bytes(60) + plain[middle + 60 :],
        "no end": plain[:-2],
        "no pixels": plain[:700] + b"\xff\xd9",
    }


def _orientation(value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def outcome(decode, data):
    try:
        return np.asarray(decode(plain_bytes(data)))
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("kind", odd_images())
def test_odd_files_are_decoded_as_without_it(kind):
    expected, found = (outcome(decode, odd_images()[kind]) for decode in (decode_rgb, fast_images.decode))
    assert np.array_equal(found, expected)
    assert found is expected or found.flags.c_contiguous


def test_a_jpeg_that_is_much_larger_than_what_is_wanted_is_decoded_smaller():
    image = picture(640, 480)
    data = encoded(image, quality=95)
    assert fast_images.decode(data, (160, 120)).shape == (240, 320, 3)
    assert fast_images.decode(data, (161, 121)).shape == (480, 640, 3)
    assert fast_images.decode(data, (20, 15)).shape == (60, 80, 3)
    assert fast_images.decode(encoded(picture(641, 480)), (20, 15)).shape == (480, 641, 3)  # would be shifted
    small = fast_images.resize(fast_images.decode(data, (160, 120)), (160, 120))
    difference = abs(small.astype(int) - np.asarray(decode_rgb(data).resize((160, 120), Image.BILINEAR)))
    assert difference.mean() < 1

"""Colours become sRGB by what their profile does, and not by what it is called."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageCms

from tests.hyperrt.pictures import (
    BLUE,
    RED,
    encoded,
    grey_profile,
    half_and_half,
    load_bytes,
    noise,
    shows,
    srgb_profile,
)

# https://www.color.org: both adapted to D50
DISPLAY_P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
ADOBE_RGB = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])


def loaded(colour: tuple[int, int, int], profile: bytes, tmp_path) -> list[int]:
    image = Image.new("RGB", (40, 40), colour)
    return load_bytes(encoded(image, icc_profile=profile), tmp_path)[20, 20].tolist()


@pytest.mark.parametrize("name", ["sRGB", "mine"])
def test_a_profile_that_is_srgb_changes_nothing_whatever_its_name(name, tmp_path):
    image = noise()
    content = encoded(image, icc_profile=srgb_profile(name))
    assert np.array_equal(load_bytes(content, tmp_path), np.asarray(image))


@pytest.mark.parametrize("name", ["sRGB", "line"])
def test_a_linear_profile_is_converted_whatever_its_name(name, tmp_path):
    assert loaded((55, 55, 55), srgb_profile(name, gamma=1), tmp_path) == [128, 128, 128]


def test_a_wide_profile_named_srgb_is_converted(tmp_path):
    # The numbers wanted are those of the matrices in https://www.w3.org/TR/css-color-4
    assert np.allclose(
        loaded((200, 100, 100), srgb_profile(primaries=DISPLAY_P3), tmp_path), [215, 93, 97], atol=2
    )
    adobe = srgb_profile(gamma=563 / 256, primaries=ADOBE_RGB)
    assert np.allclose(loaded((150, 180, 150), adobe, tmp_path), [137, 181, 150], atol=2)


def test_a_profile_with_red_and_blue_swapped_is_seen_in_the_picture(tmp_path):
    profile = srgb_profile().replace(b"rXYZ", b"swap").replace(b"bXYZ", b"rXYZ").replace(b"swap", b"bXYZ")
    picture = load_bytes(encoded(half_and_half(), icc_profile=profile), tmp_path)
    assert shows(picture, left=BLUE, right=RED, within=8)


def test_a_profile_that_is_damaged_or_does_not_fit_changes_nothing(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (lab, b"no profile", srgb_profile()[:300], grey_profile(1.0)):
        assert shows(load_bytes(encoded(half_and_half(), icc_profile=profile), tmp_path), within=0)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_the_profile_of_a_grey_photo_counts_too(mode, tmp_path):
    image = Image.new("L", (40, 40), 55).convert(mode)
    assert np.all(load_bytes(encoded(image, icc_profile=grey_profile(1.0)), tmp_path) == 128)

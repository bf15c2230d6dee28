"""Every error says what, why and what to do, and has the exit code that the design gives it."""

from __future__ import annotations

import pickle
import re

import pytest

from hyperrt import errors
from hyperrt.errors import BadImage, HyperRTError

CODES = {
    "HyperRTError": 1,
    "UsageError": 2,
    "BadInput": 3,
    "BadImage": 3,
    "BadPrompt": 3,
    "LinkedPhotos": 3,
    "LoraError": 3,
    "NotFound": 4,
    "Incompatible": 5,
    "LoraMismatch": 5,
    "BundleMismatch": 5,
    "ResourceError": 6,
    "IntegrityError": 8,
    "BundleError": 8,
    "NumericError": 9,
}
CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
each_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


def test_every_error_has_the_exit_code_of_the_design():
    assert {kind.__name__: kind.code for kind in CLASSES} == CODES


@each_class
def test_one_class_catches_them_all(kind):
    assert issubclass(kind, HyperRTError)


@each_class
def test_an_error_reads_as_three_lines(kind):
    what, why, do = str(kind("dog.png", "it is empty", "copy it again")).split("\n")
    assert "dog.png" in what
    assert (why, do) == ("  why: it is empty", "  do:  copy it again")


@each_class
def test_lines_that_would_be_empty_are_left_out(kind):
    assert re.fullmatch(r".*dog\.png.*", str(kind("dog.png", "", "")))


@each_class
def test_an_error_survives_the_way_back_from_a_worker_process(kind):
    error = kind("dog.png", "it is empty", "copy it again")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert (str(back), vars(back)) == (str(error), vars(error))


def test_a_usage_error_is_a_value_error():
    assert issubclass(errors.UsageError, ValueError)


def test_a_mismatch_is_a_kind_of_what_it_is_a_mismatch_of():
    assert issubclass(errors.LoraMismatch, errors.LoraError)
    assert issubclass(errors.BundleMismatch, errors.BundleError)


def test_the_name_of_a_bad_image_is_quoted_so_that_it_cannot_steer_a_terminal():
    assert "\x1b" not in str(BadImage("\x1b[2Jdog.png", "it is empty"))

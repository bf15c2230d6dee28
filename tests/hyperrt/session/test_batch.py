"""Requests in one batch: each is drawn as it would be alone, and they may leave between two steps."""

from __future__ import annotations

import numpy as np
import pytest

from hyperrt.errors import UsageError
from hyperrt.runtime import Runtime
from hyperrt.sampling.loop import denoise
from hyperrt.session.batch import Batch
from tests.hyperrt import fake_bundle

PROMPT = "a [V] robot on the beach"
CLOSE = {"rtol": 2e-4, "atol": 2e-5}  # of a row in a batch to the row alone


@pytest.fixture(params=["plain", "open"])
def runtime(request, tmp_path):
    fake_bundle.register()
    is_open = request.param == "open"
    folder = fake_bundle.write(tmp_path / "bundle", sdxl=is_open, open_category=is_open)
    with Runtime.open(folder, "fake") as runtime:
        yield runtime


@pytest.fixture
def other(runtime):
    return runtime.personalize([np.full((40, 40, 3), 200, np.uint8)], "mug")


def batch_of(runtime, *requests):
    batch = Batch(runtime._graphs, runtime._conditioning, runtime._lock)
    for request in requests:
        batch.add(request)
    return batch


def last(batch):
    *_, step = denoise(batch.step, batch.trajectory)
    return step.latents


def drawn(runtime, request):
    """The latents of each pair of a request, drawn by the runtime."""
    steps = runtime.sample(request)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return np.concatenate([result.latents for result in end.value])


def test_requests_of_one_batch_are_each_drawn_as_alone(runtime, subject, other):
    requests = [
        runtime.request(PROMPT, subject, seed=3, n=2, batch_size=2, steps=4),
        runtime.request("a [V] mug in snow", other, seed=9, strength=0.5, steps=4),
        runtime.request([PROMPT, "a red cat"], [other, None], seed=5, steps=4),
    ]
    batch = batch_of(runtime, *requests)
    latents = last(batch)
    assert len(latents) == 5
    for request in requests:
        np.testing.assert_allclose(latents[batch.images_of(request)], drawn(runtime, request), **CLOSE)


def test_all_requests_of_a_batch_share_one_engine_call_a_step(runtime, subject, other):
    batch = batch_of(runtime, *(runtime.request(PROMPT, one, steps=4) for one in (subject, other)))
    fake_bundle.calls.clear()
    last(batch)
    assert fake_bundle.calls.count("denoiser") == 4


@pytest.mark.parametrize("leaving", [0, 1, 2])
def test_a_request_that_leaves_changes_nothing_for_the_others(runtime, subject, other, leaving):
    orders = ((PROMPT, subject), ("a [V] mug in snow", other), ("a [V] robot in snow", subject))
    requests = [runtime.request(prompt, one, seed=seed, steps=5) for seed, (prompt, one) in enumerate(orders)]
    batch = batch_of(runtime, *requests)
    for step in denoise(batch.step, batch.trajectory):
        if step.index == 1:
            batch.remove(requests[leaving])
    assert len(step.latents) == 2
    for request in requests[:leaving] + requests[leaving + 1 :]:
        np.testing.assert_allclose(step.latents[batch.images_of(request)], drawn(runtime, request), **CLOSE)


def test_a_request_may_join_before_the_first_step_and_not_later(runtime, subject, other):
    batch = batch_of(runtime, runtime.request(PROMPT, subject, steps=4))
    batch.add(runtime.request(PROMPT, other, steps=4))
    loop = denoise(batch.step, batch.trajectory)
    assert len(next(loop).latents) == 2
    with pytest.raises(UsageError, match="cannot join") as caught:
        batch.add(runtime.request(PROMPT, other, steps=4))
    assert "1 steps" in caught.value.why and len(batch.trajectory) == 2
    assert len(next(loop).latents) == 2


@pytest.mark.parametrize(
    "options",
    [{"steps": 5}, {"kappa": 0.5}, {"guidance_scale": 2.0}, {"solver": "euler"}, {"cfg": True}],
    ids=str,
)
def test_a_request_with_another_table_or_guidance_cannot_join(runtime, subject, options):
    batch = batch_of(runtime, runtime.request(PROMPT, subject, steps=4))
    with pytest.raises(UsageError, match="cannot join"):
        batch.add(runtime.request(PROMPT, subject, **{"steps": 4, **options}))
    assert len(last(batch)) == 1


def test_a_request_is_in_a_batch_once(runtime, subject):
    request = runtime.request(PROMPT, subject, steps=4)
    batch = batch_of(runtime, request)
    with pytest.raises(UsageError, match="in the batch already"):
        batch.add(request)
    np.testing.assert_array_equal(last(batch), drawn(runtime, request))


def test_a_batch_that_all_have_left_takes_a_request_of_any_kind(runtime, subject):
    first = runtime.request(PROMPT, subject, steps=4)
    batch = batch_of(runtime, first)
    next(denoise(batch.step, batch.trajectory))
    batch.remove(first)
    assert batch.trajectory.is_done
    second = runtime.request(PROMPT, subject, steps=3, solver="euler")
    batch.add(second)
    np.testing.assert_array_equal(last(batch), drawn(runtime, second))


def test_a_stochastic_solver_keeps_the_noise_of_those_that_stay(runtime, subject, other):
    options = {"steps": 4, "solver": "euler_ancestral"}
    subjects = enumerate((subject, other))
    requests = [runtime.request(PROMPT, one, seed=seed, **options) for seed, one in subjects]
    batch = batch_of(runtime, *requests)
    for step in denoise(batch.step, batch.trajectory):
        if step.index == 0:
            batch.remove(requests[0])
    np.testing.assert_allclose(step.latents, drawn(runtime, requests[1]), **CLOSE)


def test_an_empty_batch_and_a_stranger_are_refused(runtime, subject):
    batch = Batch(runtime._graphs, runtime._conditioning, runtime._lock)
    for use in (lambda: batch.trajectory, batch.bind):
        with pytest.raises(UsageError, match="empty"):
            use()
    with pytest.raises(ValueError, match="not in the batch"):
        batch.remove(runtime.request(PROMPT, subject))


def test_a_step_binds_nothing_while_the_batch_stays_the_same(runtime, subject):
    batch = batch_of(runtime, runtime.request(PROMPT, subject, steps=6))
    loop = denoise(batch.step, batch.trajectory)
    next(loop)
    uploads = list(runtime._graphs.engine("denoiser").uploads)
    list(loop)
    assert runtime._graphs.engine("denoiser").uploads == uploads


def test_the_rows_are_bound_before_the_first_step_alone(runtime, subject, monkeypatch):
    batch = batch_of(runtime, runtime.request(PROMPT, subject, steps=3))
    bind, calls = batch.bind, []
    monkeypatch.setattr(batch, "bind", lambda: calls.append(batch.trajectory.index) or bind())
    last(batch)
    assert calls == [0]


def test_after_another_batch_ran_the_first_binds_its_own_rows_again(runtime, subject, other):
    first, second = (runtime.request(PROMPT, one, steps=3) for one in (subject, other))
    expected = [drawn(runtime, request) for request in (first, second)]
    batches = [batch_of(runtime, request) for request in (first, second)]
    loops = [denoise(batch.step, batch.trajectory) for batch in batches]
    *_, steps = zip(*loops, strict=True)
    for step, latents in zip(steps, expected, strict=True):
        np.testing.assert_array_equal(step.latents, latents)


def test_a_bundle_by_refit_takes_one_subject_in_a_batch(tmp_path, photos):
    fake_bundle.register()
    with Runtime.open(fake_bundle.write(tmp_path / "refit", refit=True), "fake") as runtime:
        grey = [np.full((40, 40, 3), 120, np.uint8)]
        subject, other = runtime.personalize(photos), runtime.personalize(grey)
        batch = batch_of(runtime, runtime.request(PROMPT, subject, steps=3))
        batch.add(runtime.request("a [V] robot in snow", subject, steps=3))
        with pytest.raises(UsageError, match="2 subjects cannot share"):
            batch.add(runtime.request(PROMPT, other, steps=3))
        assert len(last(batch)) == 2

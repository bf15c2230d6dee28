"""Which of diffusers' schedulers describe a model that the solvers can sample."""

import inspect

import diffusers
import pytest

from hyperrt.training.model import noise_schedule
from hyperrt.training.model.noise_schedule import KNOWN, fault, with_defaults

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
OTHERS = [
    "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler", "CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler",
    "DDPMWuerstchenScheduler", "SCMScheduler", "ScoreSdeVeScheduler", "UnCLIPScheduler",
]  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_scheduler_of_another_process_is_named_whatever_betas_are_left_over(name):
    assert hasattr(diffusers, name)
    assert f"its scheduler is {name}" in fault(BETAS | {"_class_name": name})


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_scheduler_is_made_of_betas(name):
    found = inspect.signature(getattr(diffusers, name)).parameters
    optional = name == "DPMSolverSDEScheduler"  # a stand-in without parameters where torchsde is missing
    assert optional or {"beta_schedule", "beta_start", "prediction_type"} <= found.keys()
    assert fault(BETAS | {"_class_name": name}) == ""


def test_the_class_in_the_index_counts_as_much_as_the_one_in_the_configuration():
    config = BETAS | {"_class_name": "EulerDiscreteScheduler"}
    assert fault(config, "PNDMScheduler") == ""
    assert "EDMEulerScheduler" in fault(config, "EDMEulerScheduler")
    assert "EDMEulerScheduler" in fault(BETAS | {"_class_name": "EDMEulerScheduler"}, "PNDMScheduler")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"beta_schedule": "sigmoid"}, "'sigmoid'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"prediction_type": "flow_prediction"}, "'flow_prediction'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
        ({"thresholding": True}, "thresholding"),
    ],
)
def test_a_setting_that_changes_what_the_model_was_trained_with_is_refused_by_name(setting, words):
    assert words in fault(BETAS | setting)
    assert fault(BETAS) == ""


def test_a_setting_that_the_scheduler_does_not_read_is_left_over():
    assert fault(BETAS | {"_class_name": "PNDMScheduler", "thresholding": True}) == ""


def test_only_sdxls_pipeline_leaves_clip_sample_on():
    of_ddim = BETAS | {"_class_name": "DDIMScheduler"}
    assert fault(of_ddim) == ""
    assert "clip_sample" in fault(of_ddim, is_sdxl=True)
    assert fault(of_ddim | {"clip_sample": False}, is_sdxl=True) == ""
    assert fault(BETAS | {"_class_name": "EulerDiscreteScheduler", "clip_sample": True}, is_sdxl=True) == ""


def test_what_a_configuration_leaves_out_is_what_its_class_has():
    assert with_defaults({"_class_name": "LCMScheduler"})["beta_schedule"] == "scaled_linear"
    assert with_defaults({"_class_name": "DDIMScheduler"}, "LCMScheduler")["beta_end"] == 0.012
    assert with_defaults({"beta_end": 0.5}, "LCMScheduler")["beta_end"] == 0.5


@pytest.mark.parametrize("kind", ["Nothing", "FrozenDict", 3, [], ""])
def test_a_class_that_is_none_is_refused(kind):
    assert "its scheduler is" in fault(BETAS | {"_class_name": kind})


def test_every_setting_has_a_reason():
    named = {*noise_schedule.OTHER_PROCESS, "thresholding", "clip_sample"}
    assert noise_schedule.REASONS.keys() == named

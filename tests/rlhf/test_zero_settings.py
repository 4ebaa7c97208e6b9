from __future__ import annotations

import inspect
import os
from itertools import product

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before deepspeed is imported

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from rlhf.config import Exaone4TinyModel, OptimizerConfig, TrainingConfig
from rlhf.training.zero_settings import (
    OptimizerName,
    ParameterSizes,
    frozen_settings,
    memory_environment,
    optimizer_name,
    zero_settings,
)

TINY = ParameterSizes(total=660_864, largest=34_816, layer=147_840)
LARGE = ParameterSizes(total=32_000_000_000, largest=524_288_000, layer=482_344_960)
OPTIMIZER = OptimizerConfig(learning_rate=2e-6, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1, max_grad_norm=0.7)
DTYPES = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")
LAYOUTS = [(1, False, False), (2, False, False), (2, True, False), *product([3], [False, True], [False, True])]
"""(ZeRO stage, offload_optimizer, offload_parameters), where the rules of the configuration allow it."""


def model(dtype: str = "bfloat16") -> Exaone4TinyModel:
    return Exaone4TinyModel(kind="exaone4_tiny", dtype=dtype)


def training(stage: int, offload_optimizer: bool = False, offload_parameters: bool = False) -> TrainingConfig:
    return TrainingConfig(zero_stage=stage, offload_optimizer=offload_optimizer, offload_parameters=offload_parameters)


# --- DeepSpeed takes them -----------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [TINY, LARGE], ids=["tiny", "large"])
@pytest.mark.parametrize(("dtype", "device"), list(product(DTYPES, DEVICES)))
@pytest.mark.parametrize(("stage", "optimizer", "weights"), LAYOUTS)
def test_deepspeed_accepts_the_settings_and_means_the_same_by_them(
    stage, optimizer, weights, dtype, device, parameters
):
    settings = zero_settings(model(dtype), training(stage, optimizer, weights), OPTIMIZER, device, parameters)
    read = DeepSpeedConfig(settings)
    assert read.bfloat16_config.enabled == (dtype == "bfloat16")
    assert read.gradient_clipping == 0.7
    assert read.gradient_accumulation_steps == read.train_micro_batch_size_per_gpu == 1
    assert read.optimizer_name == "adamw"
    assert read.zero_force_ds_cpu_optimizer is False
    zero = read.zero_config
    assert zero.stage == stage
    assert (zero.offload_optimizer is not None, zero.offload_param is not None) == (optimizer, weights)
    assert zero.overlap_comm == (stage == 3 and device == "cuda")
    # DeepSpeed knows the stage-3 limits under shorter names: one that it does not know would change nothing.
    aliases = {field.alias or name: name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for key, value in settings["zero_optimization"].items():
        if not isinstance(value, dict):
            assert getattr(zero, aliases[key]) == value, key


def test_deepspeed_refuses_a_key_that_it_does_not_know():
    settings = zero_settings(model(), training(3), OPTIMIZER, "cpu", TINY)
    settings["zero_optimization"]["stage3_nothing"] = 1
    with pytest.raises(ValueError, match="stage3_nothing"):
        DeepSpeedConfig(settings)


@pytest.mark.parametrize(("dtype", "device", "weights"), list(product(DTYPES, DEVICES, [False, True])))
def test_a_frozen_model_is_partitioned_without_an_optimiser(dtype, device, weights):
    # Also where the policy itself is trained under another stage.
    settings = frozen_settings(model(dtype), training(2, False, weights), device, TINY)
    read = DeepSpeedConfig(settings)
    assert read.optimizer_name is None
    assert read.zero_config.stage == 3
    assert read.zero_config.offload_optimizer is None
    assert (read.zero_config.offload_param is not None) == weights


# --- the optimiser ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offload", "device", "expected"),
    [
        (False, "cpu", OptimizerName.TORCH_FUSED),
        (False, "cuda", OptimizerName.DEEPSPEED_FUSED),
        (True, "cpu", OptimizerName.DEEPSPEED_CPU),
        (True, "cuda", OptimizerName.DEEPSPEED_CPU),
    ],
)
def test_the_optimiser_fits_the_place_where_it_runs(offload, device, expected):
    chosen = training(2, offload)
    assert optimizer_name(chosen, device) == expected
    params = zero_settings(model(), chosen, OPTIMIZER, device, TINY)["optimizer"]["params"]
    assert params.get("torch_adam", False) == (expected is OptimizerName.TORCH_FUSED)


def test_another_optimiser_takes_the_place_of_one_that_cannot_be_built():
    settings = zero_settings(model(), training(2, True), OPTIMIZER, "cuda", TINY, adam=OptimizerName.TORCH_FUSED)
    assert settings["optimizer"]["params"]["torch_adam"]


@pytest.mark.parametrize("adam", OptimizerName)
def test_the_optimiser_gets_the_hyperparameters_and_knows_all_of_them(adam):
    settings = zero_settings(model(), training(3), OPTIMIZER, "cpu", TINY, adam=adam)
    params = dict(settings["optimizer"]["params"])
    expected = {"lr": 2e-6, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.1}
    assert {key: params.get(key) for key in expected} == expected
    params.pop("torch_adam", None)  # DeepSpeed's own key
    kinds = {
        OptimizerName.TORCH_FUSED: torch.optim.AdamW,
        OptimizerName.DEEPSPEED_CPU: DeepSpeedCPUAdam,
        OptimizerName.DEEPSPEED_FUSED: FusedAdam,
    }
    inspect.signature(kinds[adam]).bind([torch.zeros(1)], **params)


def test_an_engine_whose_stages_bring_their_own_optimiser_starts_with_none():
    settings = zero_settings(model(), training(2), None, "cpu", TINY)
    assert settings["optimizer"]["params"]["lr"] == 0.0
    DeepSpeedConfig(settings)


def test_the_fused_update_on_a_cpu_is_the_plain_one_to_float32_precision():
    def trained(fused: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        weights = torch.nn.Parameter(torch.randn(10_000, generator=generator))
        settings = zero_settings(model(), training(2), OPTIMIZER, "cpu", TINY)
        params = {key: value for key, value in settings["optimizer"]["params"].items() if key != "torch_adam"}
        adam = torch.optim.AdamW([weights], foreach=None, **(params | {"fused": fused, "lr": 1e-3}))
        for _ in range(50):
            weights.grad = torch.randn(10_000, generator=generator)
            adam.step()
        return weights.detach()

    fused, plain = trained(True), trained(False)
    assert not torch.equal(fused, torch.zeros_like(fused))
    torch.testing.assert_close(fused, plain, rtol=2e-6, atol=2e-7)


# --- buffers ------------------------------------------------------------------------------------------


def zero(parameters: ParameterSizes, device: str = "cpu") -> dict:
    return zero_settings(model(), training(3), OPTIMIZER, device, parameters)["zero_optimization"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parameters", [TINY, LARGE], ids=["tiny", "large"])
def test_no_buffer_is_larger_than_a_layer_or_than_a_collective_needs(parameters, device):
    settings = zero(parameters, device)
    for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "sub_group_size"):
        assert settings[key] <= min(parameters.layer + 1024, 50_001_000), key
        assert settings[key] % 2 == 0
    assert settings["stage3_max_reuse_distance"] <= parameters.layer
    assert settings["stage3_max_live_parameters"] <= 2 * max(parameters.layer, parameters.largest)


def test_matrices_are_partitioned_and_norms_are_not_in_models_of_any_size():
    # The tiny model: norms of 128 and 32 elements, the smallest matrix has 128 x 64.
    assert 128 <= zero(TINY)["stage3_param_persistence_threshold"] < 128 * 64
    # EXAONE 4.0 32B: norms of 5,120 elements, the smallest matrix has 5,120 x 1,024.
    assert 5_120 <= zero(LARGE)["stage3_param_persistence_threshold"] < 5_120 * 1_024


def test_sizes_are_those_of_the_whole_model_its_largest_tensor_and_its_largest_layer():
    shapes = {
        "model.embed_tokens.weight": (100, 8),
        "model.layers.0.mlp.weight": (8, 20),
        "model.layers.0.norm.weight": (8,),
        "model.layers.1.mlp.weight": (8, 30),
        "model.layers.1.norm.weight": (8,),
        "model.norm.weight": (8,),
        "lm_head.weight": (101, 8),
    }
    assert ParameterSizes.of(shapes) == ParameterSizes(total=2032, largest=808, layer=248)
    assert ParameterSizes.of({"weight": (3, 5), "bias": (5,)}) == ParameterSizes(20, 15, 15)


def test_only_zero_3_pays_page_faults_for_memory():
    assert memory_environment(training(2)) == {}
    assert int(memory_environment(training(3))["MALLOC_MMAP_THRESHOLD_"]) == 128 * 2**10

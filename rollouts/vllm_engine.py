"""vLLM's `AsyncLLM` behind the `GenerationEngine` protocol. Only this file and `weight_receiver` import vllm here."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from rlhf.config import RunConfig
from rlhf.errors import ConfigError
from rlhf.samples import VersionSpan
from rlhf.vllm_environment import vllm_environment
from rlhf.weight_sync.transports import PackedTensor, receiver_of
from rollouts.engine import AbortedError, Completion, EngineStats, Sampling, Tokens


class VllmEngine:
    """One vLLM engine with its weights, started from `model_path`; weight version 0 means those on disk."""

    def __init__(self, model_path: str, settings: Mapping[str, Any], transport: str, seed: int) -> None:
        """`settings` are vLLM engine arguments (dtype, max_model_len, tensor_parallel_size, ...)."""
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(**complete_settings(model_path, settings, transport, seed))
        import rollouts.weight_receiver  # noqa: F401  (registers the backends in this process too)

        self._stats = StatCounter()
        self._llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[lambda *_: self._stats])
        self._probes = itertools.count()
        self._salt = "0"  # prefix blocks are shared among requests that began under the same weights

    async def generate(
        self, request_id: str, prompt_token_ids: Tokens, sampling: Sampling, stop_token_ids: Sequence[int]
    ) -> list[Completion]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=sampling.samples,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            stop_token_ids=list(stop_token_ids),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        final = await self._run(request_id, prompt_token_ids, params)
        outputs = sorted(final.outputs, key=lambda output: output.index)
        if any(output.finish_reason == "abort" for output in outputs):
            raise AbortedError(sum(len(output.token_ids) for output in outputs))
        return [_completion(output) for output in outputs]

    async def abort(self, request_id: str) -> None:
        await self._llm.abort(request_id)

    async def prompt_logprobs(self, token_ids: Tokens) -> list[float]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        final = await self._run(f"probe-{next(self._probes)}", token_ids, params)
        return [0.0, *_one_per_token(final.prompt_logprobs, token_ids[1:])]

    async def _run(self, request_id: str, token_ids: Tokens, params: Any) -> Any:
        prompt = {"prompt_token_ids": [int(token) for token in token_ids], "cache_salt": self._salt}
        final = None
        async for output in self._llm.generate(prompt, params, request_id=request_id):
            final = output
        assert final is not None and final.finished
        return final

    def stats(self) -> EngineStats:
        return self._stats.read()

    async def pause(self, clear_kv_cache: bool) -> None:
        await self._llm.pause_generation(mode="keep", clear_cache=clear_kv_cache)

    async def resume(self) -> None:
        await self._llm.resume_generation()

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def stage_weights(self, version: int, number: int, tensors: Sequence[PackedTensor]) -> None:
        plain = [(one.name, one.dtype, list(one.shape), one.data.data) for one in tensors]
        await self._llm.collective_rpc("stage_weights", args=(version, number, plain))

    async def load_staged_weights(self, version: int) -> None:
        await self.start_weight_update()
        await self.update_weights({})
        await self.finish_weight_update(version)

    async def start_weight_update(self) -> None:
        await self._llm.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def finish_weight_update(self, version: int) -> None:
        await self._llm.finish_weight_update(weight_version=str(version))
        self._salt = str(version)

    async def weight_digests(self) -> list[dict[str, str]]:
        return await self._llm.collective_rpc("received_digests")

    async def weight_version(self) -> int:
        return _version(await self._llm.get_weight_version())

    async def sleep(self) -> None:
        """Free the GPU: weights to host memory, the key-value cache dropped."""
        await self._llm.sleep(level=1)

    async def wake(self) -> None:
        await self._llm.wake_up()

    async def shutdown(self) -> None:
        self._llm.shutdown()


class StatCounter:
    """A vLLM stat logger that adds up what `EngineStats` says."""

    def __init__(self) -> None:
        self._now = EngineStats()

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None:
            cache = scheduler_stats.prefix_cache_stats
            self._now = replace(
                self._now,
                running=scheduler_stats.num_running_reqs,
                waiting=scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                cache_usage=scheduler_stats.kv_cache_usage,
                prefix_queries=self._now.prefix_queries + cache.queries,
                prefix_hits=self._now.prefix_hits + cache.hits,
            )
        if iteration_stats is not None:
            preemptions = self._now.preemptions + iteration_stats.num_preempted_reqs
            self._now = replace(self._now, preemptions=preemptions)

    def read(self) -> EngineStats:
        found = self._now
        self._now = replace(found, prefix_queries=0, prefix_hits=0, preemptions=0)
        return found

    def log(self) -> None: ...

    def log_engine_initialized(self) -> None: ...

    def record_sleep_state(self, is_awake: int, level: int) -> None: ...


def _version(label: str) -> int:
    # vLLM calls the weights that came from disk "default".
    return 0 if label == "default" else int(label)


def _completion(output: Any) -> Completion:
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a request with finish_reason {output.finish_reason!r}")
    token_ids = np.asarray(output.token_ids, np.int32)
    logprobs = _one_per_token(output.logprobs, token_ids)
    spans = tuple(VersionSpan(_version(s.version), s.start, s.end) for s in output.weight_versions)
    return Completion(token_ids, logprobs, output.finish_reason, spans)


def _one_per_token(flat: Any, token_ids: Tokens) -> np.ndarray:
    """The log-probs float32 [n] of vLLM's `FlatLogprobs`, which was asked for those of the tokens themselves alone."""
    if len(flat.token_ids) != len(token_ids) or not np.array_equal(flat.token_ids, token_ids):
        raise RuntimeError(f"vLLM returned {len(flat.token_ids)} log-probs for {len(token_ids)} tokens")
    return np.asarray(flat.logprobs, np.float32)


def engine_settings(config: RunConfig) -> dict[str, Any]:
    """vLLM engine arguments of this run."""
    rollouts, on_cpu = config.rollouts, config.cluster.device == "cpu"
    colocated = config.cluster.placement == "colocated"
    settings: dict[str, Any] = {
        "dtype": config.model.dtype,
        "max_model_len": config.model.max_context_tokens,
        "tensor_parallel_size": rollouts.tensor_parallel_size,
        # The probe of a weight sync must find room beside the samples, or it would wait for one of them to end.
        "max_num_seqs": rollouts.max_concurrent_samples + config.weight_sync.attestation.probe_sequences,
        "trust_remote_code": config.model.trust_remote_code,
        # In a placement group vLLM would pick Ray, which refuses the one bundle that holds all GPUs of an engine.
        "distributed_executor_backend": "mp" if rollouts.tensor_parallel_size > 1 else "uni",
    }
    if on_cpu:
        settings |= {"enforce_eager": True}
    else:
        settings |= {"gpu_memory_utilization": 0.6 if colocated else 0.9, "enable_sleep_mode": colocated}
    return settings | rollouts.engine_args


def complete_settings(model_path: str, settings: Mapping[str, Any], transport: str, seed: int) -> dict[str, Any]:
    """The settings with what every engine has."""
    return {
        "model": model_path,
        "seed": seed,
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": {"backend": f"groupwise_{transport}"},
        "worker_extension_cls": "rollouts.weight_receiver.ReceiverExtension",
        "skip_tokenizer_init": True,
        "enable_log_requests": False,
        "disable_log_stats": True,
        **settings,
    }


# --- before anything starts -------------------------------------------------------------------------------------------


def check_cache(config: RunConfig, shape: PreTrainedConfig) -> None:
    """The cache of a CPU engine holds one whole sequence of a model of this shape. Raises ConfigError."""
    if config.cluster.device != "cpu":
        return  # vLLM measures what the GPU has left, and says so itself
    gib = config.rollouts.kv_cache_gib
    context = config.model.max_context_tokens
    needed = sequence_cache_bytes(shape, context, 4 if config.model.dtype == "float32" else 2)
    needed //= config.rollouts.tensor_parallel_size
    if needed <= gib << 30:
        return
    takes = f"{needed / (1 << 30):.3g} GiB"
    rule = f"must hold one sequence of model.max_context_tokens = {context}, which takes {takes}"
    fix = f"Set it to {-(-needed >> 30)} or more, or lower the context."
    raise ConfigError([f"rollouts.kv_cache_gib = {gib}: {rule}. An engine could not start. {fix}"])


def sequence_cache_bytes(shape: PreTrainedConfig, context: int, bytes_per_value: int) -> int:
    """Size of the keys and values of one sequence of `context` tokens; a sliding layer keeps its window."""
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    layers = getattr(shape, "layer_types", None) or ["full_attention"] * shape.num_hidden_layers
    window = getattr(shape, "sliding_window", None) or context
    tokens = sum(min(window, context) if layer == "sliding_attention" else context for layer in layers)
    return 2 * heads * width * bytes_per_value * tokens


def check_settings(config: RunConfig, model_path: Path) -> None:
    """Have vLLM's own classes accept the engine arguments, in a process of its own. Raises ConfigError."""
    settings = complete_settings(str(model_path), engine_settings(config), receiver_of(config.transport), config.seed)
    device, cache = config.cluster.device, config.rollouts.kv_cache_gib
    variables = {**os.environ, **vllm_environment(device, cache), "VLLM_LOGGING_LEVEL": "ERROR"}
    variables["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "rollouts.vllm_engine", json.dumps(settings), device]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith(_REFUSED)]
        reason = lines[-1].removeprefix(_REFUSED) if lines else done.stderr.strip().splitlines()[-1]
        given = ", ".join(f"{name}={value}" for name, value in config.rollouts.engine_args.items())
        fix = "Correct or remove the argument; `vllm serve --help` lists them with hyphens."
        raise ConfigError([f"rollouts.engine_args = {{{given}}}: must be accepted by vLLM. {reason} {fix}"])


_REFUSED = "REFUSED "


def _check(settings: dict[str, Any], device: str) -> str:
    """The reason why vLLM refuses the settings, or an empty string."""
    import torch
    from vllm import AsyncEngineArgs

    import rollouts.weight_receiver  # noqa: F401

    try:
        arguments = AsyncEngineArgs(**settings)
        # A driver without a GPU cannot build the rest; the engines will.
        if device == "cpu" or torch.cuda.is_available():
            arguments.create_engine_config()
    except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return " ".join(lines[:3]).rstrip(".") + "."
    return ""


if __name__ == "__main__":
    if found := _check(json.loads(sys.argv[1]), sys.argv[2]):
        print(_REFUSED + found)
        sys.exit(1)

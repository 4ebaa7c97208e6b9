"""vLLM's `AsyncLLM` behind the `GenerationEngine` protocol. Only this file and `weight_receiver` import vllm here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.config import RunConfig
from rlhf.samples import VersionSpan
from rlhf.weight_sync.transports import PackedTensor
from rollouts.engine import Completion, SamplingRequest, Tokens


class VllmEngine:
    """One vLLM engine with its weights, started from `model_path`; weight version 0 means those on disk."""

    def __init__(self, model_path: str, settings: Mapping[str, Any], transport: str, device: str, seed: int) -> None:
        """`settings` are vLLM engine arguments (dtype, max_model_len, tensor_parallel_size, ...)."""
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        cpu_settings = {"distributed_executor_backend": "uni"} if device == "cpu" else {}
        if settings.get("tensor_parallel_size", 1) > 1:
            cpu_settings = {}
        arguments = AsyncEngineArgs(
            model=model_path,
            seed=seed,
            logprobs_mode="processed_logprobs",
            weight_transfer_config={"backend": f"groupwise_{transport}"},
            worker_extension_cls="rollouts.weight_receiver.ReceiverExtension",
            skip_tokenizer_init=True,
            enable_log_requests=False,
            disable_log_stats=True,
            **{**settings, **cpu_settings},
        )
        import rollouts.weight_receiver  # noqa: F401  (registers the backends in this process too)

        self._llm = AsyncLLM.from_engine_args(arguments)
        self._requests = itertools.count()
        self._tensor_parallel_size = int(settings.get("tensor_parallel_size", 1))

    async def generate(self, prompt_token_ids: Tokens, request: SamplingRequest) -> list[Completion]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            n=request.samples,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k or -1,
            stop_token_ids=list(request.stop_token_ids),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        final = await self._run(prompt_token_ids, params)
        return [_completion(output) for output in sorted(final.outputs, key=lambda o: o.index)]

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
        final = await self._run(token_ids, params)
        return [0.0, *_one_per_token(final.prompt_logprobs, token_ids[1:])]

    async def _run(self, token_ids: Tokens, params: Any) -> Any:
        prompt = {"prompt_token_ids": [int(token) for token in token_ids]}
        final = None
        async for output in self._llm.generate(prompt, params, request_id=str(next(self._requests))):
            final = output
        assert final is not None and final.finished
        return final

    async def pause(self, clear_kv_cache: bool) -> None:
        await self._llm.pause_generation(mode="keep", clear_cache=clear_kv_cache)

    async def resume(self) -> None:
        await self._llm.resume_generation()

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def stage_weights(self, version: int, number: int, tensors: Sequence[PackedTensor]) -> None:
        plain = [(one.name, one.dtype, list(one.shape), memoryview(one.data)) for one in tensors]
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
    rollouts = config.rollouts
    settings: dict[str, Any] = {
        "dtype": config.model.dtype,
        "max_model_len": config.model.max_context_tokens,
        "tensor_parallel_size": rollouts.tensor_parallel_size,
        "max_num_seqs": rollouts.max_concurrent_samples,
        "enable_prefix_caching": rollouts.prefix_caching,
        "trust_remote_code": config.model.trust_remote_code,
    }
    if config.cluster.device == "cpu":
        return {**settings, "enforce_eager": True}
    colocated = config.cluster.placement == "colocated"
    return {**settings, "gpu_memory_utilization": rollouts.gpu_memory_utilization, "enable_sleep_mode": colocated}

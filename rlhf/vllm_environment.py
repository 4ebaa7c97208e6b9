"""How vLLM is set up before it is imported; nothing here imports it."""

from __future__ import annotations

CPU_ENVIRONMENT = {
    # One process: on CPU an engine process beside its client only makes the two fight for the same core.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # The first request would otherwise wait 15 s for a log-prob helper to be compiled.
    "TORCHDYNAMO_DISABLE": "1",
    # A reload of weights allocates as much as they take. With pages of 2 MiB instead of 4 KiB a pause is 40 % shorter.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "INFO"}


def vllm_environment(device: str, kv_cache_gib: int, *, shares_memory: bool = False) -> dict[str, str]:
    """Environment variables that must be set before vllm is imported in a process that uses `device`.

    `shares_memory`: weights come as handles of GPU memory, which vLLM's processes pass on to each other as pickles.
    """
    if device != "cpu":
        return {**ENVIRONMENT, **({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if shares_memory else {})}
    return {**ENVIRONMENT, **CPU_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib)}

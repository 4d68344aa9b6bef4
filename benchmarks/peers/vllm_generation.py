"""vLLM's side of benchmarks/generation.py: run by the Python of an environment that has vLLM, in-process on the CPU.

    python -m benchmarks.peers.vllm_generation MODEL_FOLDER < requests > results

One line of JSON in ({"prompts": [[ids]], "n", "max_tokens", "stop_token_ids", "max_sequences"}), one out (CPU seconds of this
process for the call, tokens generated). An engine is made per max_sequences, before the line that needs it is measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in-process: no time of other processes escapes the measurement
    "TORCHDYNAMO_DISABLE": "1",  # else the first request compiles C++
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    import torch
    import vllm

    results, sys.stdout = sys.stdout, sys.stderr  # what vLLM prints is not a result
    print(json.dumps({"vllm": vllm.__version__, "torch": torch.__version__}), file=results, flush=True)
    engines: dict[int, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        limit = request["max_sequences"]
        if limit not in engines:
            engines.clear()
            engines[limit] = vllm.LLM(
                model=sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=256,
                max_num_seqs=limit, kv_cache_memory_bytes=2**30, seed=0, logprobs_mode="processed_logprobs",
            )  # fmt: skip
        params = vllm.SamplingParams(
            n=request["n"], max_tokens=request["max_tokens"], stop_token_ids=request["stop_token_ids"], temperature=1.0,
            logprobs=0, detokenize=False,
        )  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        started = time.process_time()
        outputs = engines[limit].generate(prompts, params, use_tqdm=False)
        num_tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        reply = {"cpu_s": time.process_time() - started, "num_tokens": num_tokens}
        print(json.dumps(reply), file=results, flush=True)


if __name__ == "__main__":
    main()

"""vLLM as `benchmarks.engine` drives it: a workload a line on stdin, its seconds on stdout."""

import json
import sys
import time

from vllm import LLM, SamplingParams


def main() -> None:
    llm = LLM(
        model=sys.argv[1],
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=64,
        gpu_memory_utilization=0.2,  # of the memory, on a CPU too
        enable_prefix_caching=True,
        seed=0,
    )
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        llm.reset_prefix_cache()  # as after an update of the weights
        params = [
            SamplingParams(temperature=1.0, max_tokens=n, min_tokens=n, ignore_eos=True, logprobs=0)
            for n in work["lengths"]
        ]
        prompts = [{"prompt_token_ids": ids} for ids in work["prompts"]]
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()

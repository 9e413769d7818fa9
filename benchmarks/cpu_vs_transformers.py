"""jaxengine and transformers on the CPU, the same float32 weights, side by side in one process.

    python -m benchmarks.cpu_vs_transformers --model .models/SmolLM2-135M-Instruct.Q4_1.gguf

Batch 1: 128 greedy tokens after a short prompt. Batch 16: requests of mixed prompt and output
lengths, all there at the start. transformers runs them the two usual ways, as one batch padded on
the left that goes on until the longest request is done, and one after the other; its better one
counts. Only the tokens asked for are useful. The engines take turns, and the best of the repeats
counts for each. Compile time is printed and not part of any figure. "cores" is CPU time by wall
time: well below ``--threads`` the machine was not quiet, and torch suffers most from that.

Prints a table, and last one JSON line.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from jaxengine import LLM, SamplingParams, convert

TARGETS = {"batch 1": 2.0, "batch 16": 3.0}
PROMPT = "The history of the lighthouse begins with fires that were lit on"
SINGLE_OUTPUT = 128
# Prompt and output lengths drawn once, log-uniform from 8 to 192: some short, a few long.
MIXED_SEED, MIXED_LOW, MIXED_HIGH = 16, 8, 192
REST_S = 1.0  # idle threads of one library keep spinning for a while: let them fall asleep

Request = tuple[list[int], int]  # prompt ids, number of output tokens
Run = Callable[[list[Request]], list[list[int]]]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    hf = load_transformers(args.model)
    print(f"transformers loaded in {time.perf_counter() - started:.1f} s", flush=True)
    started = time.perf_counter()
    llm = LLM(
        str(args.model),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=16,
        max_num_batched_tokens=args.max_num_batched_tokens,
        disable_log_stats=True,
    )
    print(f"jaxengine loaded in {time.perf_counter() - started:.1f} s", flush=True)

    single = [(llm.get_tokenizer()(PROMPT)["input_ids"], SINGLE_OUTPUT)]
    mixed = mixed_requests(llm)
    results = [
        compare("batch 1", single, llm, {"one by one": one_by_one(hf)}, args.repeats),
        compare(
            "batch 16",
            mixed,
            llm,
            {"padded batch": padded_batch(hf), "one by one": one_by_one(hf)},
            args.repeats,
        ),
    ]
    print_table(results)
    print(json.dumps({"environment": environment(args), "results": results}))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="GGUF file or HF directory")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-num-batched-tokens", type=int, default=256)
    return parser.parse_args()


def load_transformers(source: Path) -> Any:
    """Build the model of transformers from the tensors that we read ourselves."""
    checkpoint = convert.open_checkpoint(source)
    config = transformers.AutoConfig.for_model(**checkpoint.hf_config)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = {
        name: torch.from_numpy(np.array(checkpoint.read(name), np.float32))
        for name in checkpoint.names
    }
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected, unexpected
    assert missing in ([], ["lm_head.weight"]), missing  # tied to the embedding
    model.tie_weights()
    # Lengths are given by each call; nothing else may end or change an output.
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return model


def mixed_requests(llm: LLM) -> list[Request]:
    rng = np.random.default_rng(MIXED_SEED)
    low, high = np.log(MIXED_LOW), np.log(MIXED_HIGH)
    lengths = np.exp(rng.uniform(low, high, (16, 2))).astype(int)
    vocab_size = llm.engine.model_config.vocab_size
    return [(rng.integers(3, vocab_size, n_in).tolist(), int(n_out)) for n_in, n_out in lengths]


def jaxengine(llm: LLM) -> Run:
    def run(requests: list[Request]) -> list[list[int]]:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n in requests]
        outputs = llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
        llm.reset_prefix_cache()  # the next repeat must compute its prompts
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run


@torch.inference_mode()
def hf_generate(model: Any, requests: list[Request]) -> list[list[int]]:
    """One call of ``generate``: prompts padded on the left, the longest output for all."""
    longest = max(len(prompt) for prompt, _ in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, _) in enumerate(requests):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    tokens = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max(n for _, n in requests)
    )
    pairs = zip(tokens[:, longest:].tolist(), requests, strict=True)
    return [row[:n] for row, (_, n) in pairs]


def padded_batch(model: Any) -> Run:
    return lambda requests: hf_generate(model, requests)


def one_by_one(model: Any) -> Run:
    return lambda requests: [hf_generate(model, [request])[0] for request in requests]


def compare(
    name: str, requests: list[Request], llm: LLM, rivals: dict[str, Run], repeats: int
) -> dict[str, Any]:
    """Time all on the same requests, in turns; check that they give the same tokens."""
    runs = {"jaxengine": jaxengine(llm), **rivals}
    warm_up_s, tokens = {}, {}
    for engine, run in runs.items():
        warm_up_s[engine], _, tokens[engine] = timed(run, requests)
    seconds: dict[str, list[float]] = {engine: [] for engine in runs}
    cores: dict[str, list[float]] = {engine: [] for engine in runs}
    useful = sum(n for _, n in requests)
    for _ in range(repeats):
        for engine, run in runs.items():
            wall_s, cpu_s, _ = timed(run, requests)
            seconds[engine].append(wall_s)
            cores[engine].append(cpu_s / wall_s)
            print(
                f"{name}: {engine} {useful / wall_s:.1f} tok/s, {cpu_s / wall_s:.2f} cores",
                flush=True,
            )
    speed = {engine: useful / min(times) for engine, times in seconds.items()}
    best = max(rivals, key=lambda engine: speed[engine])
    return {
        "name": name,
        "requests": len(requests),
        "prompt_tokens": sum(len(prompt) for prompt, _ in requests),
        "useful_tokens": useful,
        "tok_s": {engine: round(value, 1) for engine, value in speed.items()},
        "median_tok_s": {
            engine: round(useful / statistics.median(times), 1) for engine, times in seconds.items()
        },
        "cores": {engine: round(max(values), 2) for engine, values in cores.items()},
        "warm_up_s": {engine: round(value, 1) for engine, value in warm_up_s.items()},
        "best_rival": best,
        "ratio": round(speed["jaxengine"] / speed[best], 2),
        "target": TARGETS[name],
        "equal_requests": sum(
            ours == theirs
            for ours, theirs in zip(tokens["jaxengine"], tokens["one by one"], strict=True)
        ),
    }


def timed(run: Run, requests: list[Request]) -> tuple[float, float, list[list[int]]]:
    """Return wall seconds, CPU seconds of all threads, and the tokens."""
    time.sleep(REST_S)
    started, cpu_started = time.perf_counter(), time.process_time()
    tokens = run(requests)
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    assert [len(row) for row in tokens] == [n for _, n in requests]
    return wall_s, cpu_s, tokens


def print_table(results: list[dict[str, Any]]) -> None:
    print(f"\n{'workload':10}{'engine':28}{'tok/s':>8}{'ratio':>8}{'cores':>7}{'warm-up s':>11}")
    for result in results:
        for engine, speed in result["tok_s"].items():
            ratio = result["tok_s"]["jaxengine"] / speed
            label = engine if engine == "jaxengine" else f"transformers, {engine}"
            warm_up_s = result["warm_up_s"][engine]
            print(
                f"{result['name']:10}{label:28}{speed:8.1f}{ratio:8.2f}"
                f"{result['cores'][engine]:7.2f}{warm_up_s:11.1f}"
            )
        print(
            f"{'':10}{result['ratio']:.2f} times transformers' better way (target "
            f"{result['target']}); {result['equal_requests']} of {result['requests']} requests "
            "have the same tokens\n"
        )


def environment(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": args.model.name,
        "dtype": "float32",
        "cpus": os.cpu_count(),
        "torch_threads": args.threads,
        "load": round(os.getloadavg()[0], 2),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    main()

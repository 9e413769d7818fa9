"""The leader of an engine over several "hosts", all of them on this machine; prints JSON lines.

python -m tests.distributed.leader_run MODEL '{"engine argument": value}' tokens|endless
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from jaxengine import LLM, SamplingParams
from jaxengine.engine.engine import Engine
from tests.helpers import assert_idle, greedy, make_llm, output_ids, random_prompts

PROMPTS = random_prompts(14, 15, 40)  # the last one comes in chunks of 16
NUM_TOKENS = 24
# Few step shapes. The first two prompts need 3 blocks each to their end, and there are 4.
SIZES = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "num_gpu_blocks_override": 5}
SEEDED = SamplingParams(
    temperature=0.9,
    top_p=0.9,
    seed=7,
    repetition_penalty=1.2,
    logprobs=2,
    prompt_logprobs=1,
    max_tokens=NUM_TOKENS,
    ignore_eos=True,
)
# Its masks are known to the leader only, after the step's other inputs have been sent.
STRUCTURED = SamplingParams(
    temperature=0.9, seed=8, max_tokens=NUM_TOKENS, structured_outputs={"regex": "([a-z]{3} )+"}
)


def say(**values: Any) -> None:
    """Print a line of JSON."""
    print(json.dumps(values), flush=True)


def generate(llm: LLM) -> dict[str, Any]:
    """Greedy twice (then with a cached prefix), and seeded with penalties and logprobs."""
    first = llm.generate(PROMPTS, greedy(NUM_TOKENS), use_tqdm=False)
    second = llm.generate(PROMPTS[2:], greedy(NUM_TOKENS), use_tqdm=False)
    sampled = llm.generate(PROMPTS, SEEDED, use_tqdm=False)
    structured = llm.generate(PROMPTS, [STRUCTURED, SEEDED, STRUCTURED], use_tqdm=False)
    if isinstance(llm.engine, Engine):  # not a group of replicas
        assert_idle(llm)
    scores = [
        round(entry[token].logprob, 3)
        for output, prompt in zip(sampled, PROMPTS, strict=True)
        for token, entry in zip(prompt[1:], (output.prompt_logprobs or [])[1:], strict=True)
    ]
    return {
        "greedy": output_ids(first),
        "greedy_again": output_ids(second),
        "num_cached_tokens": second[0].num_cached_tokens,
        "num_preemptions": llm.stats().num_preemptions,
        "sampled": output_ids(sampled),
        "structured": output_ids(structured),
        "logprobs": [round(output.outputs[0].cumulative_logprob, 2) for output in sampled],
        "prompt_logprobs": scores,
    }


def generate_until_it_fails(llm: LLM) -> None:
    """Say that it has begun, and what ended it."""
    llm.generate(PROMPTS, greedy(4), use_tqdm=False)
    say(has_begun=True)
    while True:
        try:
            llm.generate(PROMPTS, greedy(100), use_tqdm=False)
        except RuntimeError as error:
            request_ids = getattr(error, "request_ids", None)
            say(error=str(error), request_ids=request_ids, time=time.time())
            return


def main() -> None:
    """Make the engine, and run the scenario."""
    model, arguments, scenario = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
    llm = make_llm(model, **SIZES, **arguments)
    if scenario == "tokens":
        say(**generate(llm))
    else:
        generate_until_it_fails(llm)


if __name__ == "__main__":
    main()

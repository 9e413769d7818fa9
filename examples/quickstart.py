"""Four prompts and a question to a chat model, served in one batch.

    python examples/quickstart.py MODEL

MODEL is a hub name, a Hugging Face directory, a GGUF file or a converted directory.
"""

import logging
import sys
import time

from jaxengine import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
]
QUESTION = "Explain in two sentences why the sky is blue."


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("jaxengine").setLevel(logging.INFO)  # the start: memory, seconds
    llm = LLM(model=sys.argv[1], max_model_len=2048)

    chat = llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    greedy = SamplingParams(temperature=0, max_tokens=48)
    creative = SamplingParams(temperature=0.8, top_p=0.95, seed=0, max_tokens=48)
    params = [greedy, greedy, creative, greedy, greedy.clone(max_tokens=96)]

    print("The first time, each step's program is compiled ...", flush=True)
    llm.generate([*PROMPTS, chat], params)
    llm.reset_prefix_cache()
    print("... and now it is there:", flush=True)
    started = time.perf_counter()
    outputs = llm.generate([*PROMPTS, chat], params)
    seconds = time.perf_counter() - started

    for prompt, output in zip([*PROMPTS, QUESTION], outputs, strict=True):
        print(f"\n>>> {prompt}\n{output.outputs[0].text.strip()}")
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"\n{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.1f} tokens/s")


if __name__ == "__main__":
    main()

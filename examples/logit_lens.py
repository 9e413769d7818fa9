"""What a model would say after each layer: the logit lens.

    python examples/logit_lens.py MODEL "The capital of France is"

The stream behind each layer goes through the final norm and the head, as if it were the last. Where
the likeliest token settles early, the later layers have little to add.
Source: https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru
"""

import sys

import jax
import jax.numpy as jnp

from jaxengine import LLM


def logit_lens(llm: LLM, token_ids: list[int]) -> jax.Array:
    """Return the scores [layers, V] of the next token, read behind every layer."""
    model = llm.functional()
    tokens = jnp.array(token_ids)
    _, seen = model.apply(model.weights, tokens, capture="layers.*.output")

    def read(stream: jax.Array) -> jax.Array:
        return model.apply(model.weights, tokens, edits={"layers.-1.output": stream})[-1]

    return jnp.stack([read(stream) for stream in seen.values()])


def main() -> None:
    llm = LLM(model=sys.argv[1], max_model_len=2048)
    tokenizer = llm.get_tokenizer()
    scores = logit_lens(llm, tokenizer(sys.argv[2]).input_ids)
    for layer, row in enumerate(jax.nn.softmax(scores, axis=-1)):
        best = jnp.argsort(-row)[:5]
        words = "  ".join(f"{tokenizer.decode(int(t))!r} {row[t]:.2f}" for t in best)
        print(f"layer {layer:3}  {words}")


if __name__ == "__main__":
    main()

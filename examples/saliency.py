"""Which tokens of a prompt the next one hangs on: gradient times input.

    python examples/saliency.py MODEL "The capital of France is"

A token's part is the inner product of its embedding and the gradient of the likeliest next token's
log probability by it. Source: arXiv:1312.6034, arXiv:1605.01713.
"""

import sys

import jax
import jax.numpy as jnp

from jaxengine import LLM


def saliency(llm: LLM, token_ids: list[int]) -> tuple[int, jax.Array]:
    """Return the likeliest next token, and each prompt token's part [T] in its log probability."""
    model = llm.functional()
    tokens = jnp.array(token_ids)
    logits, seen = model.apply(model.weights, tokens, capture="embedding")
    best = jnp.argmax(logits[-1])

    def log_probability(embedding: jax.Array) -> jax.Array:
        logits = model.apply(model.weights, tokens, edits={"embedding": embedding})
        return jax.nn.log_softmax(logits[-1].astype(jnp.float32))[best]

    embedding = seen["embedding"]
    return int(best), jnp.sum(jax.grad(log_probability)(embedding) * embedding, axis=-1)


def main() -> None:
    llm = LLM(model=sys.argv[1], max_model_len=2048)
    tokenizer = llm.get_tokenizer()
    token_ids = tokenizer(sys.argv[2]).input_ids
    best, parts = saliency(llm, token_ids)
    print(f"next: {tokenizer.decode(best)!r}")
    for token, part in zip(token_ids, parts, strict=True):
        print(f"{part:+9.4f}  {tokenizer.decode(token)!r}")


if __name__ == "__main__":
    main()

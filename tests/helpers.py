"""What several test files need: tiny random models, engines on them, and slow obvious versions."""

import copy
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxengine.pallas_kernels.target import Target

from jaxengine.batch import InputBatch
from jaxengine.engine.device.kv_cache import CACHE_SPEC, KVCacheSpec, kv_heads
from jaxengine.engine.engine import Engine
from jaxengine.engine.scheduling.block_pool import BlockPool
from jaxengine.engine.scheduling.scheduler import Scheduler
from jaxengine.llm import LLM
from jaxengine.model_config import ModelConfig
from jaxengine.models.options import ModelOptions
from jaxengine.models.registry import ModelRegistry
from jaxengine.outputs import RequestOutput
from jaxengine.request_loop import RequestLoop
from jaxengine.sampling_params import SamplingParams
from jaxengine.sharding import LOGITS_SPEC, make_mesh
from jaxengine.weights import load_params, merge_params, open_model, param_specs

TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


TRANSFORMERS_NAMES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def model_class_of(family: str) -> Any:
    """The class with a head of a family ("Llama", "GPT2", ...) in transformers."""
    import transformers

    return getattr(transformers, TRANSFORMERS_NAMES.get(family, f"{family}ForCausalLM"))


def save_tiny_model(directory: Path, family: str, seed: int = 0, **overrides: Any) -> Any:
    """Save a random HF model of a family ("Llama", "Qwen3", ...) in float32; return it.

    Norms and biases are randomised too: at their initial 1 and 0 they would hide mistakes.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **overrides})
    model_class = model_class_of(family)
    # Eager attention is the one with soft caps; with ALiBi it adds Falcon's biases twice.
    is_eager = "softcapping" in str(config.to_dict()) or not model_class._supports_sdpa
    attention = "eager" if is_eager else "sdpa"
    model = model_class._from_config(config, attn_implementation=attention)
    model = model.float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                offset = 1.0 if "norm" in name or "ln_" in name else 0.0
                parameter.copy_(offset + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn_like(buffer))
    model.save_pretrained(directory)
    return model


def hf_logits(model: Any, token_ids: list[int]) -> np.ndarray:
    """Logits [T, V] of an HF model."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].numpy()


# For programs that run once: they are compiled in half the time.
UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def our_logits(
    source: Path,
    token_ids: list[int],
    *,
    max_model_len: int = 256,
    num_shards: int = 1,
    attention_backend: str | None = None,
) -> np.ndarray:
    """Logits [T, V] of our model, as one prefill of a single row."""
    checkpoint = open_model(source)
    config = ModelConfig.from_hf(checkpoint.hf_config, "float32")
    mesh = make_mesh(jax.devices()[:num_shards])
    target = Target.of(mesh.devices.flat[0])
    options = ModelOptions(
        max_model_len=max_model_len,
        target=target,
        num_shards=num_shards,
        attention_backend=attention_backend,
    )
    factory = ModelRegistry.resolve(config.architecture)
    definition, specs = param_specs(lambda: factory(config, options))
    params = load_params(checkpoint, specs, mesh, show_progress=False)
    num_blocks = -(-len(token_ids) // 16)
    heads = kv_heads(config, range(config.num_layers), num_shards)
    caches = KVCacheSpec(heads, 16, config.dtype).allocate(num_blocks + 1, mesh)

    def all_logits(params: dict, caches: list, batch: InputBatch) -> jax.Array:
        model = merge_params(definition, params)
        hidden, _ = model(batch, caches)
        return model.compute_logits(hidden)

    cache_specs = CACHE_SPEC
    sharded = jax.shard_map(
        all_logits,
        mesh=mesh,
        in_specs=({path: spec.spec for path, spec in specs.items()}, cache_specs, P()),
        out_specs=LOGITS_SPEC,
        check_vma=False,
    )
    run = jax.jit(sharded, compiler_options=UNOPTIMISED)
    return np.asarray(run(params, caches, _prefill_batch(token_ids, num_blocks)))


def _prefill_batch(token_ids: list[int], num_blocks: int) -> InputBatch:
    ints = functools.partial(jnp.array, dtype=jnp.int32)
    length = len(token_ids)
    positions = np.arange(length)
    return InputBatch(
        token_ids=ints(token_ids),
        positions=ints(positions),
        slot_mapping=ints(positions + 16),  # blocks 1, 2, ... in order
        block_tables=ints([range(1, num_blocks + 1)]),
        seq_lens=ints([length]),
        query_start_loc=ints([0, length]),
        num_decode_rows=ints(0),
        logits_indices=ints([length - 1]),
        decode_only=False,
    )


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")
CORPUS = (
    "the quick brown fox jumps over the lazy dog and runs away from the other animals",
    "once upon a time there was a small engine that generated text one token at a time",
    "pages of keys and values are kept in blocks so that nothing is wasted",
)


def save_tiny_chat_model(directory: Path, seed: int = 0, **overrides: Any) -> Path:
    """Save a random Llama whose tokenizer knows printable ASCII only: any token is real text."""
    sizes = {"vocab_size": 160, "tie_word_embeddings": False}
    model = save_tiny_model(directory, "Llama", seed, **{**sizes, **overrides})
    generation_config = model.generation_config
    generation_config.update(do_sample=True, temperature=0.7, top_k=9, top_p=0.8)
    generation_config.repetition_penalty = 1.2
    generation_config.save_pretrained(directory)
    save_tiny_tokenizer(directory, model.config.vocab_size)
    return directory


def save_tiny_tokenizer(directory: Path, vocab_size: int) -> None:
    """Save a byte-level BPE tokenizer of exactly ``vocab_size`` tokens, ids 0 to 2 as in TINY."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    printable = [chr(code) for code in range(33, 127)] + ["Ġ"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=printable,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    assert tokenizer.get_vocab_size() == vocab_size, "the corpus has too few words"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)


def make_llm(source: Path | str, **engine_args: Any) -> LLM:
    """An LLM of few step shapes, so that little is compiled: chunks of at most 16 tokens."""
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "num_gpu_blocks_override": 65}
    quiet = {"disable_log_stats": True}
    return LLM(model=str(source), **{**sizes, **quiet, **engine_args})


def with_scheduler(llm: LLM, *, num_blocks: int = 65, max_in_flight: int = 2, **limits: Any) -> LLM:
    """A view of an LLM that schedules otherwise, on the same weights and compiled programs.

    Args:
        llm: Idle; one of the two may run at a time.
        num_blocks: At most those that ``llm`` has.
        max_in_flight: 1 is synchronous.
        limits: Of ``Scheduler``; by default those of ``llm``.
    """
    scheduler, engine = llm.engine.scheduler, llm.engine
    defaults = {
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_model_len": scheduler.max_model_len,
    }
    assert num_blocks <= scheduler.block_pool.num_blocks
    other = copy.copy(llm)
    other.__dict__.pop("llm_engine", None)
    other.engine = Engine(
        Scheduler(
            block_pool=BlockPool(num_blocks, scheduler.block_pool.block_size),
            max_in_flight=max_in_flight,
            **{**defaults, **limits},
        ),
        engine.runner,
        model_config=engine.model_config,
        eos_token_ids=engine.eos_token_ids,
    )
    other._requests = RequestLoop(other.engine, llm._requests.processor)
    return other


def run_on_virtual_devices(module: str, *args: Path | str, unoptimised: bool = False) -> Any:
    """Run a program on 8 virtual CPU devices; return the JSON that it prints last.

    The number of devices is fixed when jax starts, so it is a process of its own.

    Args:
        module: The program.
        args: Its arguments.
        unoptimised: Compile in half the time what then runs slower.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    if unoptimised:
        flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    done = subprocess.run(
        [sys.executable, "-m", module, *args],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_idle(llm: LLM) -> None:
    """Nothing runs, and every block and slot is free again."""
    scheduler = llm.engine.scheduler
    while llm.engine.has_unfinished_requests and not scheduler.has_unfinished_requests:
        llm.engine.step()  # dispatched before the last request ended; nobody waits for it
    assert not llm.engine.has_unfinished_requests
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.block_pool.num_free_blocks == scheduler.block_pool.num_usable_blocks
    scheduler.check_integrity()


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    """Greedy sampling that does not end early, unless asked otherwise."""
    defaults = {"temperature": 0.0, "ignore_eos": True}
    return SamplingParams(max_tokens=max_tokens, **{**defaults, **fields})


def output_ids(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    """Token ids of the first completion of each output."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def random_prompts(*lengths: int, vocab_size: int = 128, seed: int = 0) -> list[list[int]]:
    """Token ids, none of them special."""
    rng = np.random.default_rng(seed)
    return [rng.integers(len(SPECIAL_TOKENS), vocab_size, length).tolist() for length in lengths]


def hf_greedy(model: Any, token_ids: list[int], num_tokens: int) -> list[int]:
    """The next tokens by transformers, without a cache: the whole sequence at every step."""
    tokens = list(token_ids)
    for _ in range(num_tokens):
        tokens.append(int(hf_logits(model, tokens)[-1].argmax()))
    return tokens[len(token_ids) :]

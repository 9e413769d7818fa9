"""The most likely token of a vocabulary that is cut over devices."""

import json
import os
import subprocess
import sys

PROGRAM = """
import json, jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from jaxengine.layers.vocabulary import argmax_over_shards
from jaxengine.sharding import LOGITS_SPEC, make_mesh

rng = np.random.default_rng(0)
logits = rng.integers(-5, 5, (200, 40)).astype(np.float32)  # most rows have equal maxima
logits[7] = np.nan
expected = np.argmax(logits, axis=1)
expected[7] = 39  # a row of NaN: the last token
found = {}
for size in (1, 2, 4):
    f = jax.shard_map(
        lambda x: argmax_over_shards(x, None), mesh=make_mesh(jax.devices()[:size]),
        in_specs=LOGITS_SPEC, out_specs=P(), check_vma=False,
    )
    types = (np.float32, jnp.bfloat16)
    found[size] = [np.asarray(jax.jit(f)(logits.astype(t))).tolist() for t in types]
print(json.dumps({"expected": expected.tolist(), "found": found}))
"""


def test_it_is_the_lowest_one_among_equals_on_any_number_of_shards() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    for found in result["found"].values():
        assert found == [result["expected"]] * 2

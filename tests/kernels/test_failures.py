"""A kernel that does not compile is found, named in one warning and left out; others stay."""

import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jaxengine.pallas_kernels.backends import call_kernel, first_that_serves
from jaxengine.pallas_kernels.failures import (
    forget_all,
    num_retired,
    retire_failing_kernels,
    without_failing_kernels,
)
from jaxengine.pallas_kernels.operands import AttentionOptions
from jaxengine.pallas_kernels.paged_attention import paged_attention
from jaxengine.pallas_kernels.target import Target

from tests.kernels.problems import decode_problem, expected, keywords

DEVICE = jax.devices()[0]
KERNELS = {
    name: f"{__name__}:{name}" for name in ("refuses", "does_not_trace", "does_not_lower", "serves")
}
without_lowering = Primitive("without_lowering")
without_lowering.def_abstract_eval(lambda x: x)


def refuses(x: jax.Array, *, factor: float) -> jax.Array:
    raise NotImplementedError("rows of this length")


def does_not_trace(x: jax.Array, *, factor: float) -> jax.Array:
    raise TypeError("no such layout\nand a page of details")


def does_not_lower(x: jax.Array, *, factor: float) -> jax.Array:
    return without_lowering.bind(x)


def serves(x: jax.Array, *, factor: float) -> jax.Array:
    return x * factor


@pytest.fixture(autouse=True)
def nothing_has_failed() -> Iterator[None]:
    forget_all()
    yield
    forget_all()


def program(*order: str) -> Any:
    """Traced and lowered anew by each call, as a step's program is."""

    def make() -> Any:
        def run(x: jax.Array) -> jax.Array:
            return first_that_serves(KERNELS, order, x, factor=2.0)

        return jax.jit(run).lower(jnp.ones(3)).compile()

    return make


@pytest.mark.parametrize("broken", ["does_not_trace", "does_not_lower"])
def test_a_program_is_made_again_without_the_kernel_that_fails(
    broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        compiled = without_failing_kernels(program("refuses", broken, "serves"), DEVICE)
    np.testing.assert_array_equal(compiled(jnp.ones(3)), [2, 2, 2])
    (message,) = caplog.messages
    assert message.startswith(f"{broken}(float32[3]) does not compile here and is left out: ")
    assert len(message.splitlines()) == 1
    assert num_retired() == 1


def test_it_is_not_tried_again_and_of_other_shapes_it_is() -> None:
    without_failing_kernels(program("does_not_trace", "serves"), DEVICE)
    with pytest.raises(NotImplementedError, match="failed to compile here: TypeError: no such"):
        call_kernel(KERNELS["does_not_trace"], jnp.ones(3), factor=2.0)
    for changed in ({"factor": 3.0}, {"factor": 2.0, "x": jnp.ones(4)}):
        x = changed.pop("x", jnp.ones(3))
        with pytest.raises(TypeError, match="no such layout"):
            call_kernel(KERNELS["does_not_trace"], x, **changed)


def test_a_failure_that_is_no_kernels_is_raised_as_it_is() -> None:
    def make() -> None:
        program("serves")()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        without_failing_kernels(make, DEVICE)
    assert num_retired() == 0


def test_what_another_thread_has_found_is_reason_to_try_again() -> None:
    outcomes = [RuntimeError("the kernel that the other thread has found"), "a program"]

    def make() -> str:
        outcome = outcomes.pop(0)
        if isinstance(outcome, RuntimeError):
            raise outcome
        return outcome

    before = num_retired()
    without_failing_kernels(program("does_not_trace", "serves"), DEVICE)  # the other thread's
    assert without_failing_kernels(make, DEVICE, since=before) == "a program"


def test_an_op_whose_kernels_do_not_compile_here_is_served_by_xla(
    caplog: pytest.LogCaptureFixture,
) -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("Triton's kernels do compile here")
    problem = decode_problem([5, 20], dtype=jnp.bfloat16)
    how = keywords(problem)
    assert how["options"] == AttentionOptions(scale=0.125)

    def make() -> Any:
        def run(*arrays: jax.Array) -> jax.Array:
            return paged_attention(*arrays, **how, decode_only=True, target=Target("gpu"))

        return jax.jit(run).lower(*problem).compile()

    with caplog.at_level(logging.WARNING):
        found = without_failing_kernels(make, DEVICE)(*problem)
    np.testing.assert_allclose(found.astype(jnp.float32), expected(problem), atol=2e-2)
    assert [message.split("(")[0] for message in caplog.messages] == ["paged_decode_triton"]


def test_kernels_that_compile_stay() -> None:
    program("serves")()
    assert not retire_failing_kernels(DEVICE)
    assert num_retired() == 0

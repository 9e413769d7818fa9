"""Where a family keeps the weights of a mixture of experts, and the rules that follow.

Ours are stacked: gate and up of all experts [E, 2, F, D], down [E, D, F]. Checkpoints have a tensor
for each expert, or stacks of their own. Each source is read and placed alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jaxengine.convert.model_spec import ExpertsSpec
from jaxengine.convert.rules import Rule, Shape, Source, same


@dataclass(frozen=True)
class ExpertsLayout:
    """Names of the tensors of a mixture, relative to the layer; "{e}" stands for the expert.

    A name without it is one of a stack of all experts.

    Attributes:
        router: Without its ".weight" and ".bias".
        correction: Of the numbers that are added for the choice alone.
        gate_up: Names of gate and up, or one of a stack that holds both.
        gate_up_bias: Of a stack's bias.
        down_bias: Likewise.
        is_transposed: Whether the stacks are [E, in, out].
        is_interleaved: Whether a stack's outputs are gate and up by turns, not all gates first.
        shared_gate_up: As ``Layout.gate_up``, of what serves every token.
        shared_down: Likewise.
        shared_gate: Without its ".weight".
    """

    router: str = "mlp.gate"
    correction: str = "mlp.gate.e_score_correction_bias"
    gate_up: tuple[str, ...] = (
        "mlp.experts.{e}.gate_proj.weight",
        "mlp.experts.{e}.up_proj.weight",
    )
    down: str = "mlp.experts.{e}.down_proj.weight"
    gate_up_bias: str = ""
    down_bias: str = ""
    is_transposed: bool = False
    is_interleaved: bool = False
    shared_gate_up: tuple[str, ...] = ()
    shared_down: str = ""
    shared_gate: str = ""


SEPARATE = ExpertsLayout()  # tensors of each expert's own, under the most usual names


def experts_rules(
    D: int, spec: ExpertsSpec, layout: ExpertsLayout, path: str, name: str
) -> Iterator[Rule]:
    """Rules of a mixture, but for what serves every token."""
    E, F = spec.num_experts, spec.intermediate_size
    yield same(f"{path}.router", f"{name}.{layout.router}.weight", (E, D))
    if spec.router.has_bias:
        yield same(f"{path}.router_bias", f"{name}.{layout.router}.bias", (E,))
    if spec.router.has_correction:
        yield same(f"{path}.correction", f"{name}.{layout.correction}", (E,))
    gate_up = [f"{name}.{tensor}" for tensor in layout.gate_up]
    yield _gate_up_rule(f"{path}.gate_up", gate_up, layout, (E, 2, F, D))
    yield _down_rule(f"{path}.down", f"{name}.{layout.down}", layout.is_transposed, (E, D, F))
    if spec.has_bias:
        bias = f"{name}.{layout.gate_up_bias}"
        yield _gate_up_rule(f"{path}.gate_up_bias", [bias], layout, (E, 2, F))
        yield same(f"{path}.down_bias", f"{name}.{layout.down_bias}", (E, D))
    if spec.has_shared_gate:
        yield same(f"{path}.shared_gate", f"{name}.{layout.shared_gate}.weight", (1, D))


def _gate_up_rule(path: str, names: list[str], layout: ExpertsLayout, shape: Shape) -> Rule:
    E, _, F, *inner = shape
    if len(names) == 2:
        sources = tuple(
            Source(name.format(e=e), (F, *inner), (1, 1, F, *inner), (e, half))
            for e in range(E)
            for half, name in enumerate(names)
        )
        return Rule(path, shape, sources)
    stored = (E, *inner, 2 * F) if layout.is_transposed else (E, 2 * F, *inner)
    halves = (F, 2) if layout.is_interleaved else (2, F)
    half, width = (2, 1) if layout.is_interleaved else (1, 2)
    if not inner or not layout.is_transposed:
        view, axes = (E, *halves, *inner), (0, half, width, *range(3, 3 + len(inner)))
    else:
        view, axes = (E, *inner, *halves), (0, half + 1, width + 1, 1)
    if axes == tuple(range(len(axes))):
        return Rule(path, shape, (Source(names[0], stored, shape),))
    return Rule(path, shape, (Source(names[0], stored, shape, view=view, axes=axes),))


def _down_rule(path: str, name: str, is_transposed: bool, shape: Shape) -> Rule:
    E, D, F = shape
    if "{e}" in name:
        sources = tuple(Source(name.format(e=e), (D, F), (1, D, F), (e,)) for e in range(E))
        return Rule(path, shape, sources)
    if not is_transposed:
        return same(path, name, shape)
    return Rule(path, shape, (Source(name, (E, F, D), shape, view=(E, F, D), axes=(0, 2, 1)),))

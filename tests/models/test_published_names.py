"""Every tensor of a published size has its place, and every parameter its tensor: none is left."""

from typing import Any

import pytest
from jaxengine.convert.families import family_of, model_spec
from jaxengine.convert.rules import Source, Table

from tests.helpers import model_class_of
from tests.models import numpy_cases, published
from tests.models.numpy_models import MODELS

Shapes = dict[str, tuple[int, ...]]


def table_of(config: dict[str, Any]) -> Table:
    return family_of(config).table(model_spec(config))


def assert_nothing_is_left(table: Table, checkpoint: Shapes) -> None:
    """Each tensor is read in its shape or stated to be none, and each parameter is filled."""
    sources = [source for rule in table.rules for source in rule.sources]
    assert [source.name for source in sources if not name_of(source, checkpoint)] == []
    read = {name_of(source, checkpoint): source.shape for source in sources}
    assert {name: checkpoint[name] for name in read} == read
    left = [name for name in checkpoint if name not in read and not name.endswith(table.ignored)]
    assert left == []


def name_of(source: Source, checkpoint: Shapes) -> str:
    """Its first name that the checkpoint has; "" if it has none."""
    return next((name for name in (source.name, *source.others) if name in checkpoint), "")


@pytest.mark.parametrize("size", published.PUBLISHED)
def test_the_tensors_of_transformers_class_are_those_of_the_table(size: str) -> None:
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    family, fields = published.PUBLISHED[size]
    config = getattr(transformers, f"{family}Config")(**fields)
    model_class = model_class_of(family)
    with torch.device("meta"):
        model = model_class(config)
        # Under the names of files: in memory, the experts of a mixture are one tensor.
        tensors = revert_weight_conversion(model, model.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    table = table_of({**config.to_dict(), "architectures": [model_class.__name__]})
    assert_nothing_is_left(table, shapes)


@pytest.mark.parametrize("size", numpy_cases.PUBLISHED)
def test_the_tensors_of_a_description_are_those_of_the_table(size: str) -> None:
    architecture, config = numpy_cases.PUBLISHED[size]
    shapes = MODELS[architecture].shapes(config)
    assert_nothing_is_left(table_of({**config, "architectures": [architecture]}), shapes)


def test_a_tensor_too_many_or_too_few_is_noticed() -> None:
    architecture, config = numpy_cases.PUBLISHED["chatglm2-6b"]
    table = table_of({**config, "architectures": [architecture]})
    shapes = MODELS[architecture].shapes(config)
    with pytest.raises(AssertionError, match=r"layers\.28\.x"):
        assert_nothing_is_left(table, {**shapes, "transformer.encoder.layers.28.x": (1,)})
    del shapes["transformer.output_layer.weight"]
    with pytest.raises(AssertionError, match="output_layer"):
        assert_nothing_is_left(table, shapes)

"""The table that says how Hugging Face's tensors become our parameters.

A parameter is filled from one or more tensors. Of each, a ``Source`` says which part it takes and
where that goes::

    tensor [shape] -> rows -> seen as view -> cut -> axes reordered -> seen as box -> at origin

Most sources need the first and the last step alone. Orientation is [out, in] in every parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint, and the place of its values in a parameter.

    Attributes:
        name: Hugging Face's name.
        shape: The shape it must have in the checkpoint.
        box: The shape that its values take in the parameter.
        origin: Where in the parameter the box begins; () for the start.
        rows: Which rows of the tensor's first axis; None for all.
        view: The shape in which those are cut and reordered; () for the box.
        cut: A range for each leading axis of the view; None for all of an axis.
        axes: The view's axes in their new order; () for as they are.
        others: Names that serve where ``name`` is missing.
    """

    name: str
    shape: Shape
    box: Shape
    origin: Shape = ()
    rows: tuple[int, int] | None = None
    view: Shape = ()
    cut: tuple[tuple[int, int] | None, ...] = ()
    axes: tuple[int, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the tensor, seen in the shape of the box, is the part."""
        return self.rows is None and not self.cut and not self.axes


@dataclass(frozen=True)
class Rule:
    """A parameter and what fills it; the boxes of its sources neither overlap nor leave a gap.

    Attributes:
        path: Our dotted path.
        shape: Shape of the parameter.
        sources: Tensors, or parts of them.
        is_normalised: Whether each row is divided by its length while it is loaded.
    """

    path: str
    shape: Shape
    sources: tuple[Source, ...]
    is_normalised: bool = False


@dataclass(frozen=True)
class Table:
    """What a family's checkpoint holds.

    Attributes:
        rules: One for each parameter, layers together and in order.
        ignored: Endings of tensor names that are no parameters (buffers of old checkpoints).
        prefix: Beginning of names that checkpoints of the bare model leave out ("model.").
        renamed: Beginnings of names, and what stands for them in ``rules``; the first that fits
            counts.
        unused: Beginnings of the names of what is not computed, such as an image encoder.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()


def same(path: str, name: str, shape: Shape, *others: str) -> Rule:
    """A rule for a tensor that only changes its name; ``others`` serve where it is missing."""
    return Rule(path, shape, (Source(name, shape, shape, others=others),))

"""Which replica serves which request: a count of tokens. Host only."""

import dataclasses
from collections.abc import Sequence

from jaxengine.engine.scheduling.scheduler_output import EngineCoreOutput


@dataclasses.dataclass(slots=True)
class Placement:
    """Where a request lives, and how many tokens it may still cost there."""

    replica: int
    num_unfinished_tokens: int


class ReplicaRouter:
    """Chooses a replica for each request: the one with the fewest unfinished tokens.

    A request counts with its prompt and the output tokens that it may still sample: the blocks it
    will hold and the steps it will take. The number of requests says less, since one of a hundred
    thousand tokens is no equal of one of ten. The prompt counts to the end, as each step reads it.
    """

    def __init__(self, num_replicas: int) -> None:
        self._loads = [0] * num_replicas
        self._placements: dict[str, Placement] = {}

    @property
    def loads(self) -> list[int]:
        """Unfinished tokens of each replica."""
        return list(self._loads)

    def find(self, request_id: str) -> int | None:
        """Return the replica of an unfinished request; None if there is no such request."""
        placement = self._placements.get(request_id)
        return None if placement is None else placement.replica

    def choose(self) -> int:
        """Return the replica for the next request: the lowest number of the least loaded."""
        return self._loads.index(min(self._loads))

    def place(self, request_id: str, replica: int, num_tokens: int) -> None:
        """Note that a replica has taken a request of at most ``num_tokens``, prompt and output."""
        self._placements[request_id] = Placement(replica, num_tokens)
        self._loads[replica] += num_tokens

    def remove(self, request_id: str) -> int | None:
        """Forget a request that has ended; return where it was, None if it is not known."""
        placement = self._placements.pop(request_id, None)
        if placement is None:
            return None
        self._loads[placement.replica] -= placement.num_unfinished_tokens
        return placement.replica

    def record(self, outputs: Sequence[EngineCoreOutput]) -> None:
        """Take in the news of a step."""
        for output in outputs:
            if output.finish_reason is not None:
                self.remove(output.request_id)
                continue
            placement = self._placements[output.request_id]
            placement.num_unfinished_tokens -= len(output.new_token_ids)
            self._loads[placement.replica] -= len(output.new_token_ids)

    def clear(self) -> None:
        """Forget all requests."""
        self._placements.clear()
        self._loads = [0] * len(self._loads)

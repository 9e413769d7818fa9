"""ShardWorker: a replica of the model that generates for shards, as an actor of Ray Data."""

import random
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from jaxengine.engine_thread import EngineError, EngineThread
from jaxengine.llm import LLM
from jaxengine.on_ray.json_output import as_json, message_of
from jaxengine.on_ray.output_directory import OutputDirectory
from jaxengine.on_ray.shards import Shard
from jaxengine.outputs import RequestOutput
from jaxengine.sampling_params import RequestOutputKind, SamplingParams


class ShardWorker:
    """Generates for one shard a call and stores it; calls from several threads share the batch.

    Args:
        model: As for ``LLM``.
        engine_args: The other arguments of ``LLM``.
        sampling_params: Of all rows; None takes the model's defaults.
        output: Where the shards are stored.
    """

    def __init__(
        self,
        model: str,
        engine_args: Mapping[str, Any],
        sampling_params: SamplingParams | None,
        output: OutputDirectory,
    ) -> None:
        llm = LLM(model, **engine_args)
        params = sampling_params or llm.get_default_sampling_params()
        self._params = params.clone(output_kind=RequestOutputKind.FINAL_ONLY)
        self._engine_seed = llm.engine_config.seed
        self._engine = EngineThread(llm)
        self._output = output

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[int]]:
        """Do the one shard of a batch, unless it was stored before this worker's predecessor died.

        Raises:
            EngineError: If the engine has failed. Nothing is stored then.
        """
        shard = Shard.from_json(str(batch["shard"][0]))
        if self._output.counts(shard) is None:
            self._output.write(shard.number, self._generate(shard))
        counts = self._output.counts(shard)
        assert counts is not None
        return {"num_rows": [counts.num_rows], "num_errors": [counts.num_errors]}

    def _generate(self, shard: Shard) -> Iterator[dict[str, Any]]:
        started = [(number, self._start(number, fields)) for number, fields in shard.rows()]
        for number, promised in started:
            yield {"row": number, **_result(promised)}

    def _start(
        self, number: int, fields: dict[str, Any] | ValueError
    ) -> Future[RequestOutput] | ValueError:
        if isinstance(fields, ValueError):
            return fields
        return self._engine.result(
            prompt=fields.get("prompt"),
            messages=fields.get("messages"),
            sampling_params=self._params_of(number),
        )

    def _params_of(self, number: int) -> SamplingParams:
        """Give a random row a seed of its own, which no replica and no restart changes."""
        if self._params.is_greedy or self._params.seed is not None:
            return self._params
        seed = random.Random(f"{self._engine_seed}:{number}").getrandbits(56)
        return self._params.clone(seed=seed)


def _result(promised: Future[RequestOutput] | ValueError) -> dict[str, Any]:
    """Wait for a row: its outputs, or why there are none."""
    try:
        if isinstance(promised, ValueError):
            raise promised
        return as_json(promised.result())
    except EngineError:
        raise
    except Exception as error:  # of this row alone
        return {"error": message_of(error)}

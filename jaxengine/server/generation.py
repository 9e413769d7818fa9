"""Generation: the engine's requests of one HTTP request. Queued together, aborted together."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from types import TracebackType

from jaxengine.async_llm import Subscription
from jaxengine.outputs import RequestOutput
from jaxengine.sampling_params import SamplingParams
from jaxengine.server.state import ServerState
from jaxengine.text.prompts import EncodedPrompt

logger = logging.getLogger("jaxengine.server")

Arrival = tuple[int, RequestOutput | Exception]


class Generation:
    """Outputs for the prompts of a request; leaving it aborts what still runs.

    Args:
        state: The server's.
        prompts: At least one.
        params: Of all of them.
        request_id: The answer's name; each prompt's is made of it.
        priority: Smaller first.
    """

    def __init__(
        self,
        state: ServerState,
        prompts: Sequence[EncodedPrompt],
        params: SamplingParams,
        request_id: str,
        priority: int = 0,
    ) -> None:
        self._llm = state.llm
        self._settings = state.settings
        self._state = state
        self._prompts = prompts
        self._params = params
        self._request_id = request_id
        self._priority = priority
        self._subscriptions: list[Subscription] = []
        self._arrived: asyncio.Queue[Arrival] = asyncio.Queue()

    async def __aenter__(self) -> "Generation":
        """Queue all prompts, or none.

        Raises:
            ValueError: If one is not possible.
            ApiError: With status 503 if the queue is full.
            EngineDeadError: If the engine has failed.
        """
        params = self._llm.frontend.complete(self._params)
        for prompt in self._prompts:
            self._llm.frontend.check_length(prompt)
        self._check_room()
        if self._settings.enable_log_requests:
            self._log(params)
        try:
            for index, prompt in enumerate(self._prompts):
                self._subscriptions.append(
                    self._llm.submit(
                        prompt,
                        params,
                        self._deliver_of(index),
                        f"{self._request_id}-{index}",
                        priority=self._priority,
                    )
                )
        except BaseException:
            self._llm.cancel(self._subscriptions)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Abort what still runs."""
        self._llm.cancel(self._subscriptions)

    async def final(self) -> list[RequestOutput]:
        """Wait for the last output of every prompt, in their order.

        Raises:
            ValueError: If the engine refuses one.
            EngineDeadError: If the engine has failed.
        """
        outputs: dict[int, RequestOutput] = {}
        async for batch in self.batches():
            outputs.update({index: output for index, output in batch if output.finished})
        return [outputs[index] for index in range(len(self._prompts))]

    async def batches(self) -> AsyncGenerator[list[tuple[int, RequestOutput]], None]:
        """Give outputs with the number of their prompt, all that have come in one go.

        Raises:
            ValueError: If the engine refuses one.
            EngineDeadError: If the engine has failed.
        """
        num_unfinished = len(self._prompts)
        while num_unfinished:
            arrived = [await self._arrived.get()]
            while not self._arrived.empty():
                arrived.append(self._arrived.get_nowait())
            batch: list[tuple[int, RequestOutput]] = []
            failure: Exception | None = None
            for index, news in arrived:
                if isinstance(news, Exception):
                    failure = news
                    break
                num_unfinished -= news.finished
                batch.append((index, news))
            if batch:
                yield batch
            if failure is not None:
                raise failure

    def _deliver_of(self, index: int) -> Callable[[RequestOutput | Exception], None]:
        return lambda news: self._arrived.put_nowait((index, news))

    def _check_room(self) -> None:
        try:
            self._state.check_room(sum(len(prompt.token_ids) for prompt in self._prompts))
        except Exception:
            self._state.metrics.count_rejection()
            raise

    def _log(self, params: SamplingParams) -> None:
        limit = self._settings.max_log_len
        for index, prompt in enumerate(self._prompts):
            shown = prompt.text if prompt.text is not None else prompt.token_ids.tolist()
            logger.info(
                "Received request %s-%d: prompt: %r, params: %r",
                self._request_id,
                index,
                shown if limit is None else shown[:limit],
                params,
            )

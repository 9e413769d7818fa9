"""Which requests can run at all, and how long they may become."""

from jaxengine.engine.scheduling.block_pool import BlockPool
from jaxengine.engine.scheduling.request import Request


class RequestLimits:
    """The lengths that the model and the KV cache allow.

    Args:
        max_model_len: Longest request, prompt and output.
        max_computed_tokens: Tokens whose K/V fit when a request has the pool alone.
        block_pool: The KV blocks, to say in an error how many there are.
        can_be_raised: Whether the model could read longer requests.
    """

    def __init__(
        self,
        *,
        max_model_len: int,
        max_computed_tokens: int,
        block_pool: BlockPool,
        can_be_raised: bool = True,
    ) -> None:
        self.max_model_len = max_model_len
        self.max_computed_tokens = max_computed_tokens
        self._block_pool = block_pool
        self._can_be_raised = can_be_raised

    def max_num_tokens(self, request: Request) -> int:
        """Return the length at which a new request ends with ``FinishReason.LENGTH``.

        The pool is a limit like that of the model, so that a request which outgrows it
        alone ends instead of waiting for blocks that cannot come. It counts one token
        more than fits, as the last token sampled needs no K/V.

        Raises:
            ValueError: If the request can never run.
        """
        self._check_prompt(request)
        limits = [self.max_model_len, self.max_computed_tokens + 1]
        if request.sampling_params.max_tokens is not None:
            limits.append(request.num_prompt_tokens + request.sampling_params.max_tokens)
        return min(limits)

    def _check_prompt(self, request: Request) -> None:
        name, num_tokens = f"request {request.request_id!r}", request.num_prompt_tokens
        if num_tokens == 0:
            raise ValueError(f"{name}: the prompt is empty; give at least one token")
        if num_tokens >= self.max_model_len:
            raise ValueError(
                f"{name}: the prompt has {num_tokens} tokens, which leaves no room for output "
                f"within max_model_len ({self.max_model_len}); shorten the prompt"
                f"{' or raise --max-model-len' if self._can_be_raised else ''}"
            )
        if num_tokens > self.max_computed_tokens:
            block_size = self._block_pool.block_size
            num_blocks = -(-num_tokens // block_size)
            raise ValueError(
                f"{name}: the prompt has {num_tokens} tokens and needs "
                f"{num_blocks} KV blocks of {block_size} tokens, but there are only "
                f"{self._block_pool.num_usable_blocks}; raise --gpu-memory-utilization, or "
                f"--num-gpu-blocks-override to {num_blocks + 1} at least, or "
                f"--kv-cache-memory-bytes; or lower --max-model-len to refuse such prompts"
            )

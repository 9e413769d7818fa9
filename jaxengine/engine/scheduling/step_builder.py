"""A step while the scheduler puts it together."""

from jaxengine.engine.scheduling.request import Request
from jaxengine.engine.scheduling.scheduler_output import ScheduledRow, SchedulerOutput


class StepBuilder:
    """Collects the rows of one step within a token budget.

    Args:
        token_budget: Most tokens of the step.
    """

    def __init__(self, token_budget: int) -> None:
        self.budget = token_budget  # what is left
        self.decode_rows: list[ScheduledRow] = []  # of one token
        self.is_out_of_blocks = False
        self.new_block_entries: list[tuple[int, int, list[int]]] = []
        self.admitted: list[Request] = []
        self.preempted: list[Request] = []
        self._token_budget = token_budget
        self._longer_rows: list[ScheduledRow] = []

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.decode_rows and not self._longer_rows

    @property
    def has_unfinished_prompts(self) -> bool:
        """Whether a row of several tokens ends before its request's tokens do."""
        return any(not row.samples_token for row in self._longer_rows)

    def add_row(self, request: Request, num_new_tokens: int) -> None:
        """Compute a request's next tokens in this step, and count them as computed."""
        num_computed = request.num_computed_tokens
        num_known = len(request.all_token_ids)
        request.num_computed_tokens = end = num_computed + num_new_tokens
        samples_token = end == num_known + request.num_output_placeholders
        if samples_token:
            request.num_output_placeholders += 1
        row = ScheduledRow(
            request, num_new_tokens, num_computed, samples_token, num_computed >= num_known
        )
        (self.decode_rows if num_new_tokens == 1 else self._longer_rows).append(row)
        self.budget -= num_new_tokens

    def build(self, step_id: int) -> SchedulerOutput:
        """Return the step, its rows of one token first."""
        return SchedulerOutput(
            step_id=step_id,
            rows=self.decode_rows + self._longer_rows,
            num_decode_rows=len(self.decode_rows),
            num_scheduled_tokens=self._token_budget - self.budget,
            new_block_entries=self.new_block_entries,
            admitted=self.admitted,
            preempted=self.preempted,
        )

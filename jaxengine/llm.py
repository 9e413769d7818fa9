"""LLM: prompts in, RequestOutputs out. The offline API, with vLLM's names."""

import collections
import functools
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxengine.beam_search import (
    BeamSearchOutput,
    BeamSearchParams,
    BeamSearchSequence,
    beam_search,
)
from jaxengine.compat.engine_args import resolve_engine_args
from jaxengine.compat.model_config import ServedModelConfig
from jaxengine.compile_watch import CompileWatch
from jaxengine.config import EngineConfig
from jaxengine.engine.build import load_weights
from jaxengine.engine.garbage_collection import (
    exempt_from_garbage_collection,
)
from jaxengine.engine.scheduling.scheduler_output import SchedulerStats
from jaxengine.engine.sleep import SleepingStages
from jaxengine.llm_arguments import (
    Params,
    as_priorities,
    check_token_ids,
    either,
    refuse_foreign,
)
from jaxengine.llm_engine import EngineArgs, LLMEngine
from jaxengine.loaded_engine import load_model
from jaxengine.metrics import Metric, metrics_of
from jaxengine.outputs import RequestOutput
from jaxengine.pooling.engine import PoolingEngine
from jaxengine.pooling.methods import NoGenerator, PoolingMethods
from jaxengine.request_loop import Inbox, NewRequest, RequestLoop
from jaxengine.research.functional import FunctionalModel
from jaxengine.research.points import Point, points_of
from jaxengine.research.updates import NewWeights, update_stages
from jaxengine.sampling_params import RequestOutputKind, SamplingParams
from jaxengine.structured.constraint import TokenConstraint
from jaxengine.structured.constraint_factory import ConstraintFactory
from jaxengine.text.frontend import Frontend
from jaxengine.text.messages import split_conversations
from jaxengine.text.progress import MakeBar, Progress
from jaxengine.text.prompts import (
    EncodedPrompt,
    Prompt,
    as_list,
)
from jaxengine.text.tokenizer import ChatOptions, Message
from jaxengine.weights import merge_params


class LLM(PoolingMethods):
    """A model that generates text for many prompts at once, or one that embeds or scores them.

    Its methods may be called from several threads; their requests share the batch.

    Args:
        model: Hub name, HF directory, GGUF file, or a directory that ``jaxengine-convert`` wrote.
        tokenizer: The same choice for the tokenizer; None takes the model's own.
        engine_args: Fields of ``EngineConfig``, and every argument of vLLM that changes nothing
            here or asks for nothing (docs/coming-from-vllm.md). None is the default of each.

    Raises:
        ValueError: If the model is not supported or damaged, or does not fit into memory; or if an
            argument asks for what is not there.
        TypeError: If there is no such argument.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        tokenizer: str | os.PathLike[str] | None = None,
        **engine_args: Any,
    ) -> None:
        arguments = resolve_engine_args({"tokenizer": tokenizer, **engine_args})
        config = EngineConfig(model=os.fspath(model), **arguments)
        self.engine_config = config
        loaded = load_model(config)
        if isinstance(loaded, PoolingEngine):
            self._pooling = loaded
            absent: Any = NoGenerator(loaded)
            self.engine = self._frontend = self._requests = self._loaded = absent
            return
        self.engine = loaded.engine
        self.startup = loaded.startups[0]
        self._loaded = loaded
        self._frontend = Frontend(loaded.tokenizer, loaded.info, loaded.chat_template)
        self._sleeping: SleepingStages | None = None
        self._constraints: ConstraintFactory | None = None  # until a request needs one
        self._requests = RequestLoop(self.engine, self._frontend.processor)
        self._news: Inbox = collections.deque()  # for ``step``
        self._enqueued: list[str] = []  # for ``wait_for_completion``
        self._enqueued_inbox: Inbox = collections.deque()
        if loaded.leader is not None:
            processor = self._frontend.processor
            loaded.leader.unfinished_requests = lambda: processor.unfinished_request_ids
        exempt_from_garbage_collection(owner=self)

    def get_tokenizer(self) -> Any:
        """Return the Hugging Face tokenizer.

        Raises:
            ValueError: If the model was loaded with ``skip_tokenizer_init``.
        """
        if self._pooling is not None:
            return self._pooling.require_tokenizer().hf_tokenizer
        return self._frontend.require_tokenizer().hf_tokenizer

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLM":
        """Load a model with the arguments of an ``EngineArgs``."""
        return cls(**vars(engine_args))

    @functools.cached_property
    def llm_engine(self) -> LLMEngine:
        """The engine, with vLLM's interface of single steps."""
        return LLMEngine(self)

    @property
    def model_config(self) -> ServedModelConfig:
        """The model, as clients of vLLM read it."""
        if self._pooling is not None:
            own = self._pooling
            return ServedModelConfig.of(self.engine_config, own.model_config, own.max_model_len)
        model = self.engine.model_config
        return ServedModelConfig.of(self.engine_config, model, self._frontend.info.max_model_len)

    def get_world_size(self, include_dp: bool = True) -> int:
        """Return how many devices the engine uses, of all replicas or of one."""
        config = self.engine_config
        size = config.tensor_parallel_size * config.pipeline_parallel_size
        return size * config.data_parallel_size if include_dp else size

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the model's own defaults, from its generation_config.json."""
        return self._frontend.default_params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: Params = None,
        *,
        use_tqdm: bool | MakeBar = True,
        lora_request: Any = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        prompt_token_ids: Any = None,
    ) -> list[RequestOutput]:
        """Generate for each prompt; all of them share the batch.

        Args:
            prompts: Text, token ids, or ``{"prompt": ...}`` / ``{"prompt_token_ids": ...}``; or a
                list of such.
            sampling_params: For all prompts, or one for each; None takes the model's defaults.
            use_tqdm: Draw a progress bar with the throughput; or what makes the bar.
            lora_request: Must be None.
            priority: For all prompts, or one number for each, smaller first; needs
                ``scheduling_policy="priority"``.
            tokenization_kwargs: ``add_special_tokens``, ``truncate_prompt_tokens`` (to the last so
                many; -1: to what the model can read), ``truncation_side`` ("left" or "right").
            mm_processor_kwargs: Must be None.
            prompt_token_ids: Former name of prompts that are token ids.

        Returns:
            One output a prompt, in their order.

        Raises:
            ValueError: If a prompt or a parameter is not possible. No prompt has run then.
        """
        refuse_foreign(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        prompts = either(prompts, prompt_token_ids)
        inputs = self._frontend.encode(as_list(prompts), tokenization_kwargs)
        params = self._frontend.params_for(len(inputs), sampling_params)
        return self._generate(inputs, params, priority, use_tqdm)

    def enqueue(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        lora_request: Any = None,
        priority: int | Sequence[int] | None = None,
        use_tqdm: bool | MakeBar = True,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Queue prompts for ``wait_for_completion``; arguments as for ``generate``.

        Returns:
            Their request ids.
        """
        del use_tqdm  # nothing here takes long
        refuse_foreign(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        inputs = self._frontend.encode(as_list(prompts), tokenization_kwargs)
        params = self._frontend.params_for(len(inputs), sampling_params)
        final = [each.with_output_kind(RequestOutputKind.FINAL_ONLY) for each in params]
        requests = self._new_requests(inputs, final, priority)
        with self._requests.lock:
            request_ids, _ = self._requests.add(requests, self._enqueued_inbox)
            self._enqueued += request_ids
        return request_ids

    def wait_for_completion(
        self, output_type: Any = None, *, use_tqdm: bool | MakeBar = True
    ) -> list[RequestOutput]:
        """Run everything that was enqueued to its end, and return the outputs in its order."""
        del output_type  # there is only one
        with self._requests.lock:
            request_ids, self._enqueued = self._enqueued, []
            inbox, self._enqueued_inbox = self._enqueued_inbox, collections.deque()
        return self._run_to_end(request_ids, inbox, use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: Any = None,
        use_tqdm: bool | MakeBar = False,
        concurrency_limit: int | None = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[BeamSearchOutput]:
        """Search for the most likely outputs of each prompt.

        Args:
            prompts: As for ``generate``.
            params: What is looked for.
            lora_request: Must be None.
            use_tqdm: Draw a bar of the prompts.
            concurrency_limit: Most prompts searched at the same time; None is all.
            priority: As for ``generate``, of all prompts alike.

        Returns:
            Up to ``beam_width`` sequences a prompt, best first; their tokens and texts begin with
            the prompt.

        Raises:
            ValueError: If a prompt or a parameter is not possible.
        """
        refuse_foreign(lora_request=lora_request)
        inputs = self._frontend.encode(as_list(prompts))
        priorities = as_priorities(priority, len(inputs))
        if len(set(priorities)) > 1:
            raise ValueError("the prompts of a beam search have one priority: give one number")
        check_token_ids(params, self.engine.model_config.vocab_size)
        limit = concurrency_limit or max(1, len(inputs))

        def next_tokens(
            beams: list[list[int]], sampling_params: SamplingParams
        ) -> list[RequestOutput]:
            encoded = [EncodedPrompt(None, array("i", tokens)) for tokens in beams]
            each = [sampling_params] * len(beams)
            return self._generate(encoded, each, priorities[0], use_tqdm=False)

        outputs = []
        with Progress(len(inputs), use_tqdm) as progress:
            for start in range(0, len(inputs), limit):
                found = beam_search(
                    [each.token_ids for each in inputs[start : start + limit]],
                    params,
                    next_tokens=next_tokens,
                    eos_token_ids=self.engine.eos_token_ids,
                    max_model_len=self._frontend.info.max_model_len,
                )
                outputs += [self._with_texts(sequences, params) for sequences in found]
                progress.advance(len(found))
        return outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool | MakeBar = True,
        lora_request: Any = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, with the model's chat template.

        Args:
            messages: A list of ``{"role": ..., "content": ...}``, or a list of such lists. A
                content is text, a list of text parts, or absent.
            sampling_params: As for ``generate``; so are the others without a line here.
            use_tqdm: Draw a progress bar with the throughput; or what makes the bar.
            lora_request: Must be None.
            priority: For all conversations, or one number for each.
            chat_template: Jinja template to use instead of the model's.
            chat_template_content_format: What the template takes as content: "string", "openai" (a
                list of parts), or "auto", which reads it from the template.
            add_generation_prompt: Begin the assistant's turn at the end.
            continue_final_message: Let the model go on with the last message instead.
            tools: Function descriptions for the template.
            chat_template_kwargs: Further variables of the template; they win over the arguments.
            tokenization_kwargs: As for ``generate``; special tokens are the template's affair.
            mm_processor_kwargs: Must be None.

        Raises:
            ValueError: As ``generate``; also if the template refuses a conversation.
        """
        refuse_foreign(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        arguments = {
            "chat_template": chat_template or self._frontend.chat_template,
            "content_format": chat_template_content_format,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
        }
        options = ChatOptions.merged(arguments, chat_template_kwargs)
        texts = [
            self._frontend.render(conversation, options)
            for conversation in split_conversations(messages)
        ]
        inputs = self._frontend.encode(
            texts, {"add_special_tokens": False, **(tokenization_kwargs or {})}
        )
        params = self._frontend.params_for(len(inputs), sampling_params)
        return self._generate(inputs, params, priority, use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Generate for one prompt, and give its output after every step.

        Closing the iterator early aborts the request.
        """
        (params,) = self._frontend.params_for(1, sampling_params)
        requests = self._new_requests(self._frontend.encode([prompt]), [params])
        yield from self._requests.outputs_of(*self._requests.add(requests))

    def add_request(
        self,
        prompt: Prompt | None = None,
        sampling_params: SamplingParams | None = None,
        *,
        messages: Sequence[Message] | None = None,
        request_id: str | None = None,
        lora_request: Any = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> str:
        """Queue one request beside those that run; ``step`` brings its outputs.

        Args:
            prompt: As for ``generate``.
            sampling_params: None takes the model's defaults.
            messages: A conversation for the model's chat template, in place of the prompt.
            request_id: Its name; None makes one.
            lora_request: Must be None.
            tokenization_kwargs: As for ``generate``.
            priority: Smaller first; needs ``scheduling_policy="priority"``.

        Returns:
            The request id, for ``abort_request`` and in its outputs.

        Raises:
            ValueError: If the prompt or a parameter is not possible. Nothing has changed then.
        """
        if (prompt is None) == (messages is None):
            raise ValueError("a request needs either a prompt or messages, and not both")
        refuse_foreign(lora_request=lora_request)
        if messages is not None:
            options = ChatOptions(chat_template=self._frontend.chat_template)
            prompt = self._frontend.render(messages, options)
            tokenization_kwargs = {"add_special_tokens": False, **(tokenization_kwargs or {})}
        assert prompt is not None
        (params,) = self._frontend.params_for(1, sampling_params)
        inputs = self._frontend.encode([prompt], tokenization_kwargs)
        requests = self._new_requests(inputs, [params], priority)
        names = None if request_id is None else [request_id]
        (request_id,), _ = self._requests.add(requests, self._news, names)
        return request_id

    def step(self) -> list[RequestOutput]:
        """Run one step, and return the new outputs of the requests of ``add_request``.

        If it raises, all of these are to be aborted; the model can be used again after that.
        """
        return self._requests.step(self._news)

    def abort_request(self, request_id: str) -> None:
        """End a request of ``add_request``; no output comes for it any more."""
        self._requests.abort([request_id])

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; returns False if requests still run."""
        with self._requests.lock:
            return self.engine.reset_prefix_cache()

    def stats(self) -> SchedulerStats:
        """Counters of the scheduler and the KV cache (usage, waste, hits, preemptions)."""
        with self._requests.lock:
            return self.engine.stats()

    def get_metrics(self) -> list[Metric]:
        """Return the metrics of this moment, under vLLM's names."""
        return metrics_of(
            self.stats(),
            num_prompt_tokens=self._requests.num_finished_tokens["prompt"],
            num_generation_tokens=self._requests.num_finished_tokens["generation"],
            model=self.engine_config.model,
        )

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Begin a trace of host and devices in ``profiler_dir`` (for TensorBoard or Perfetto).

        Args:
            profile_prefix: Name of a directory below it.
        """
        directory = Path(self.engine_config.profiler_dir) / (profile_prefix or "")
        jax.profiler.start_trace(str(directory))

    def stop_profile(self) -> None:
        """End the trace and write it."""
        jax.profiler.stop_trace()

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Give the devices' memory back until ``wake_up``; no request may run then.

        Args:
            level: 0 keeps everything; 1 keeps the weights in the host's memory; 2 forgets them, and
                they are loaded anew.
            mode: What becomes of running requests; only "abort".

        Raises:
            ValueError: If the level is none of these, or the engine has several hosts.
        """
        if level not in (0, 1, 2) or mode != "abort":
            raise ValueError(f"sleep has levels 0, 1 and 2 and mode 'abort', got {level}, {mode!r}")
        if self.engine_config.nnodes > 1:
            raise ValueError("an engine of several hosts cannot sleep: end it instead")
        with self._requests.lock:
            self._requests.run_empty()
            self.engine.reset_prefix_cache()
            if level and self._sleeping is None:
                stages = [stage for each in self._loaded.replicas for stage in each.runner.stages]
                self._sleeping = SleepingStages(stages, keeps_weights=level == 1)

    def wake_up(self, tags: Sequence[str] | None = None) -> bool:
        """Take the memory again; everything at once, whatever tags are given.

        Returns:
            True: the engine is awake.
        """
        del tags
        with self._requests.lock:
            if self._sleeping is not None:
                load = functools.partial(load_weights, self.engine_config, self._loaded.checkpoint)
                self._sleeping.wake_up(load)
                self._sleeping = None
        return True

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Call a method of each replica's ``ModelRunner``, or a function with it.

        Args:
            method: Name of the method, or the function.
            timeout: Without effect: the call runs here.
            args: Further arguments.
            kwargs: Likewise.

        Returns:
            One result a replica.

        Raises:
            ValueError: If there is no such method.
        """
        del timeout
        with self._requests.lock:
            runners = [replica.runner for replica in self._loaded.replicas]
            if callable(method):
                return [method(runner, *args, **(kwargs or {})) for runner in runners]
            if not callable(getattr(runners[0], method, None)):
                raise ValueError(f"ModelRunner has no method {method!r}: give a function")
            return [getattr(runner, method)(*args, **(kwargs or {})) for runner in runners]

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """Call a function with the module (``flax.nnx``) of each pipeline stage of each replica.

        What it changes in the module is lost: the engine's weights stay as they are.
        """
        with self._requests.lock:
            stages = [stage for each in self._loaded.replicas for stage in each.runner.stages]
            return [func(merge_params(stage.parts.definition, stage.params)) for stage in stages]

    def functional(self) -> FunctionalModel:
        """Return the model as a pure function over the engine's own weights (docs/research.md).

        Raises:
            ValueError: If the engine has pipeline stages or several hosts, or the architecture is
                one of another package's own.
        """
        stages = self._loaded.replicas[0].runner.stages
        if len(stages) > 1 or self.engine_config.nnodes > 1:
            raise ValueError(
                f"functional() needs all layers in one program, and there are {len(stages)} "
                f"pipeline stages on {self.engine_config.nnodes} hosts: load the model with "
                "pipeline_parallel_size=1 and nnodes=1"
            )
        max_model_len = self._frontend.info.max_model_len
        return FunctionalModel(stages[0], self.engine.model_config, max_model_len)

    def update_weights(self, new: NewWeights) -> list[str]:
        """Replace weights, all or some, while the model stays loaded; nothing is compiled again.

        Everything is checked before the first changes. The prefix cache is dropped.

        Args:
            new: A directory or file of weights of the same architecture; a mapping or an iterator
                of pairs under a checkpoint's names (arrays of numpy, jax or torch); or a tree
                shaped as ``functional().weights``, such as an optimiser's.

        Returns:
            Paths of the parameters that were replaced.

        Raises:
            ValueError: If a name is not the model's or a shape does not fit, requests run, the
                engine sleeps or has several hosts. Nothing has changed then.
        """
        if self.engine_config.nnodes > 1:
            raise ValueError("an engine of several hosts takes no new weights: start it anew")
        with self._requests.lock:
            if self._sleeping is not None:
                raise ValueError("the engine sleeps: call wake_up first")
            if running := self._requests.request_ids:
                raise ValueError(
                    f"{len(running)} requests run, whose keys and values are of the old weights: "
                    "let them finish, or abort them, before update_weights"
                )
            self._requests.run_empty()  # steps in flight that nobody waits for
            replicas = [replica.runner.stages for replica in self._loaded.replicas]
            try:
                return update_stages(replicas, self.engine.model_config.hf_config, new)
            finally:
                self.engine.reset_prefix_cache()

    def points(self) -> tuple[Point, ...]:
        """Return the points of the model that ``capture`` and ``edits`` name, in their order."""
        return points_of(self.engine.model_config.spec)

    def _with_texts(
        self, sequences: list[BeamSearchSequence], params: BeamSearchParams
    ) -> BeamSearchOutput:
        if (tokenizer := self._frontend.tokenizer) is not None:
            for beam in sequences:
                beam.text = tokenizer.decode(beam.tokens, params.skip_special_tokens)
        return BeamSearchOutput(sequences)

    def _generate(
        self,
        inputs: Sequence[EncodedPrompt],
        params: Sequence[SamplingParams],
        priority: int | Sequence[int] | None,
        use_tqdm: bool | MakeBar,
    ) -> list[RequestOutput]:
        final = [each.with_output_kind(RequestOutputKind.FINAL_ONLY) for each in params]
        requests = self._new_requests(inputs, final, priority)
        request_ids, inbox = self._requests.add(requests)
        return self._run_to_end(request_ids, inbox, use_tqdm)

    def _constraint_maker(
        self, params: SamplingParams, prompt_token_ids: Sequence[int]
    ) -> Callable[[], TokenConstraint | None]:
        """Return what makes the constraint of each output of a request.

        Raises:
            ValueError: If its grammar cannot be compiled.
        """
        if params.structured_outputs is None and params.thinking_token_budget is None:
            return lambda: None
        return self._constraint_factory().maker(params, prompt_token_ids)

    def _constraint_factory(self) -> ConstraintFactory:
        if self._constraints is None:
            self._frontend.require_tokenizer()
            self._constraints = self._loaded.new_constraint_factory()
            assert self._constraints is not None
        return self._constraints

    def _new_requests(
        self,
        inputs: Sequence[EncodedPrompt],
        params: Sequence[SamplingParams],
        priority: int | Sequence[int] | None = None,
    ) -> list[NewRequest]:
        """Put together what the engine is asked for, and compile the grammars."""
        if self._sleeping is not None:
            raise ValueError("the engine sleeps: call wake_up first")
        priorities = as_priorities(priority, len(inputs))
        for each in params:  # side by side, before the first is waited for
            if each.structured_outputs is not None:
                self._constraint_factory().prepare(each)
        return [
            NewRequest(prompt, each, number, self._constraint_maker(each, prompt.token_ids))
            for prompt, each, number in zip(inputs, params, priorities, strict=True)
        ]

    def _run_to_end(
        self, request_ids: Sequence[str], inbox: Inbox, use_tqdm: bool | MakeBar
    ) -> list[RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        with (
            Progress(len(request_ids), use_tqdm, lambda: watch.seconds) as progress,
            CompileWatch(progress.say_compiling) as watch,
        ):
            for output in self._requests.outputs_of(request_ids, inbox):
                finished[output.request_id] = output
                progress.update(output)
        return [finished[request_id] for request_id in request_ids]

"""The command line with a model that is not one."""

import argparse
import os
import signal
from typing import ClassVar

import jaxengine.convert.__main__
import pytest

from jaxengine.cli import main as cli
from jaxengine.cli.arguments import human_int, hyphenate
from jaxengine.cli.chat import Chat
from jaxengine.outputs import CompletionOutput, Logprob, RequestOutput
from jaxengine.sampling_params import RequestOutputKind, SamplingParams
from tests.text.test_tokenizer import byte_level


class FakeLLM:
    """Answers every prompt with its length; remembers what it was asked."""

    made: ClassVar[list["FakeLLM"]] = []

    def __init__(self, model, **engine_args):
        self.model, self.engine_args = model, engine_args
        self.calls = []
        FakeLLM.made.append(self)

    def get_default_sampling_params(self):
        return SamplingParams(temperature=0.6, top_p=0.9)

    def get_tokenizer(self):
        return byte_level().hf_tokenizer

    def generate(self, prompts, params, use_tqdm):
        self.calls.append((list(prompts), params, use_tqdm))
        return [self._answer(prompt, params) for prompt in prompts]

    def chat(self, conversations, params, use_tqdm):
        return self.generate([c[0]["content"].upper() for c in conversations], params, use_tqdm)

    def stream(self, prompt, params):
        self.calls.append((byte_level().decode(prompt["prompt_token_ids"], False), params))
        for index, text in enumerate(["Hel", "lo", "!"]):
            completion = CompletionOutput(0, text, [index])
            yield RequestOutput("0", None, [1], None, [completion], index == 2)

    def _answer(self, prompt, params):
        outputs = [CompletionOutput(i, f"{len(prompt)} letters", [1, 2]) for i in range(params.n)]
        return RequestOutput("0", prompt, [1, 2, 3], None, outputs, True)


def run(*arguments):
    """Exit status and the model that was made, if any."""
    FakeLLM.made.clear()
    status = cli.main(list(arguments), make_llm=FakeLLM)
    return status, FakeLLM.made[0] if FakeLLM.made else None


# generate


def test_generate_prints_the_text_of_each_prompt_and_the_throughput(capsys) -> None:
    status, _ = run("generate", "some/model", "Hi", "Hello")
    out, err = capsys.readouterr()
    assert status == 0
    assert out == "Prompt: Hi\nOutput 0: 2 letters\n\nPrompt: Hello\nOutput 0: 5 letters\n\n"
    assert "2 prompts, 6 prompt tokens, 4 generated tokens in " in err


def test_generate_with_one_prompt_prints_only_its_text(capsys) -> None:
    run("generate", "some/model", "Hi")
    assert capsys.readouterr().out == "2 letters\n"


def test_flags_given_replace_the_models_defaults_and_the_others_stay() -> None:
    _, llm = run("generate", "m", "--top-k", "5", "Hi", "--max_tokens=7", "--stop", "a", "--stop=b")
    _, params, _ = llm.calls[0]
    assert (params.top_k, params.max_tokens, params.stop) == (5, 7, ["a", "b"])
    assert (params.temperature, params.top_p) == (0.6, 0.9)


def test_engine_flags_reach_the_model_in_both_spellings_and_only_if_given() -> None:
    _, llm = run(
        *("generate", "m", "Hi", "--dtype", "float32", "--max_model_len", "2k", "-tp", "2"),
        *("--gpu-memory-utilization=0.5", "--no-enable-prefix-caching", "--enforce_eager"),
        *("--hf-overrides", '{"a": 1}', "--seed", "3"),
    )
    assert llm.engine_args == {
        "dtype": "float32",
        "max_model_len": 2000,
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.5,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "hf_overrides": {"a": 1},
        "seed": 3,
    }


def test_prompts_may_stand_behind_flags_and_come_from_a_file(tmp_path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo\n")
    _, llm = run("generate", "m", "--max-tokens", "4", "first", "--prompts-file", str(path))
    assert llm.calls[0][0] == ["first", "one", "two"]


def test_only_a_line_feed_ends_a_line_of_the_prompts_file(tmp_path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a\x0cb\u2028c\rd\x85e\r\n\ufeffnext\n".encode())
    _, llm = run("generate", "m", "--prompts-file", str(path))
    assert llm.calls[0][0] == ["a\x0cb\u2028c\rd\x85e", "\ufeffnext"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "prompts.txt' is missing"), (b"\xff\xfe", "prompts.txt' is not UTF-8")],
)
def test_a_prompts_file_that_cannot_be_read_says_why(tmp_path, capsys, content, message) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    assert run("generate", "m", "--prompts-file", str(path)) == (2, None)
    assert message in capsys.readouterr().err


def test_logprobs_are_printed_a_line_a_token(capsys, monkeypatch) -> None:
    entries = [{5: Logprob(-0.5, 2, " a"), 7: Logprob(-0.25, 1, "b")}, {6: Logprob(-1.0, 1, None)}]
    completion = CompletionOutput(0, " a?", [5, 6], logprobs=entries)
    prompt_entries = [None, {4: Logprob(-2.0, 3, "x")}]
    output = RequestOutput("0", "Hi", [3, 4], prompt_entries, [completion], True)
    monkeypatch.setattr(FakeLLM, "_answer", lambda self, prompt, params: output)
    run("generate", "m", "Hi", "--logprobs", "1")
    assert capsys.readouterr().out.splitlines() == [
        "Logprobs of the prompt:",
        "  'x' -2.0000 (rank 3)",
        " a?",
        "Logprobs:",
        "  ' a' -0.5000 (rank 2)  'b' -0.2500 (rank 1)",
        "  6 -1.0000 (rank 1)",
    ]


def test_what_compiling_took_is_no_part_of_the_throughput() -> None:
    output = RequestOutput("0", "x", [1], None, [CompletionOutput(0, "", [1] * 10)], True)
    text = cli._throughput([output], 6.0, 4.0)
    assert text.endswith("in 6.00 s, of which compiling 4.00 s: 5.0 generated tokens/s")
    assert cli._throughput([output], 2.0).endswith("in 2.00 s: 5.0 generated tokens/s")


def test_prompts_come_from_standard_input_if_there_are_no_others(monkeypatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    _, llm = run("generate", "m")
    assert llm.calls[0][0] == ["from a pipe"]


def test_underscores_are_left_alone_in_values_and_behind_a_double_dash() -> None:
    arguments = ["--max_tokens=a_b", "--load_format", "x_y", "--", "--not_a_flag"]
    assert hyphenate(arguments) == [
        "--max-tokens=a_b",
        "--load-format",
        "x_y",
        "--",
        "--not_a_flag",
    ]


def test_chat_flag_uses_the_chat_template(capsys) -> None:
    _, llm = run("generate", "m", "--chat", "hi", "--no-progress")
    assert llm.calls[0][0] == ["HI"]
    assert llm.calls[0][2] is False


@pytest.mark.parametrize(
    ("text", "value"), [("32k", 32000), ("1K", 1024), ("-1", -1), ("1.5k", 1500)]
)
def test_integers_may_have_a_suffix(text, value) -> None:
    assert human_int(text) == value


# Errors


def test_an_impossible_parameter_is_one_line_and_status_2_before_the_model_loads(capsys) -> None:
    status, llm = run("generate", "m", "Hi", "--top-p", "2")
    assert (status, llm) == (2, None)
    assert capsys.readouterr().err == "error: top_p must be in (0, 1], got 2.0; 1 means off\n"


def test_a_failing_model_is_one_line_unless_debugging(capsys) -> None:
    def fail(model, **engine_args):
        raise RuntimeError("out of\nmemory")

    assert cli.main(["generate", "m", "Hi"], make_llm=fail) == 2
    assert capsys.readouterr().err == "error: RuntimeError: out of memory\n"
    with pytest.raises(RuntimeError):
        cli.main(["generate", "m", "Hi", "--debug"], make_llm=fail)


@pytest.mark.parametrize(
    "arguments", [["generate"], ["generate", "m", "Hi", "--nonsense"], ["nonsense"]]
)
def test_a_wrong_command_line_says_so_with_status_2(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(*arguments)
    assert exit_info.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["generate", "m", "x", "--max-modle-len", "5"], "did you mean '--max-model-len'?"),
        (["generate", "m", "x", "--temprature=5"], "did you mean '--temperature'?"),
        (["chat", "m", "--swap_spaces", "5"], "did you mean '--swap-space'?"),
        (["generat", "m"], "did you mean 'generate'?"),
    ],
)
def test_a_misspelt_flag_names_the_one_that_may_have_been_meant(arguments, hint, capsys) -> None:
    with pytest.raises(SystemExit):
        run(*arguments)
    assert hint in capsys.readouterr().err


def test_flags_of_vllm_that_are_none_of_ours_reach_the_model() -> None:
    flags = ["--swap-space", "8", "--enable-lora", "-O", "3", "--compilation-config", '{"a": 1}']
    _, llm = run("generate", "m", "x", *flags, "--no-enable-expert-parallel", "-q", "awq")
    assert llm.engine_args == {
        "swap_space": 8,
        "enable_lora": True,
        "optimization_level": 3,
        "compilation_config": {"a": 1},
        "enable_expert_parallel": False,
        "quantization": "awq",
    }


@pytest.mark.parametrize("command", ["generate", "chat", "complete", "worker"])
def test_the_help_of_every_flag_says_its_default(command) -> None:
    _, make_parser = cli.COMMANDS[command]
    shown = [
        action
        for action in make_parser()._actions
        if action.option_strings and action.help != argparse.SUPPRESS
    ]
    without = [action.dest for action in shown if "(default: " not in action.help]
    assert (len(shown) > 30, without) == (True, ["help"])


def test_the_help_of_a_flag_is_the_docstring_of_its_field(capsys) -> None:
    with pytest.raises(SystemExit):
        run("generate", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--gpu-memory-utilization X Share of the device's memory" in text
    assert (
        "--max-tokens N Longest output; None means up to the model's limit. (default: 128)" in text
    )


def test_convert_is_handed_to_the_converter(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(jaxengine.convert.__main__, "main", lambda rest: seen.append(rest) or 0)
    assert run("convert", "source", "out_dir", "--dtype", "float32")[0] == 0
    assert seen == [["source", "out_dir", "--dtype", "float32"]]


# chat


def make_chat(lines, **options):
    """A chat that reads the given lines, and what it writes."""
    written = []
    llm = FakeLLM("m")
    chat = Chat(llm, llm.get_default_sampling_params(), write=written.append, **options)
    lines = iter(lines)

    def read(prompt):
        line = next(lines, EOFError)
        if isinstance(line, type):
            raise line
        return line

    chat.run(read)
    return chat, llm, "".join(written)


def test_an_answer_is_streamed_and_becomes_part_of_the_conversation() -> None:
    chat, llm, written = make_chat(["Hi", "More"])
    assert written.count("Hello!\n") == 2
    assert [m["content"] for m in chat.messages] == ["Hi", "Hello!", "More", "Hello!"]
    prompt, params = llm.calls[1]
    assert prompt.count("<|im_start|>") == 4
    assert "user\nMore" in prompt
    assert params.output_kind is RequestOutputKind.DELTA


def test_reset_keeps_only_the_system_prompt() -> None:
    chat, _, _ = make_chat(["Hi", "/reset"], system_prompt="Be kind.")
    assert chat.messages == [{"role": "system", "content": "Be kind."}]


def test_exit_leaves_and_what_follows_is_not_read() -> None:
    _, llm, _ = make_chat(["/exit", "Hi"])
    assert llm.calls == []


def test_interrupting_the_input_keeps_the_program() -> None:
    _, llm, _ = make_chat([KeyboardInterrupt, "Hi"])
    assert len(llm.calls) == 1


def test_interrupting_an_answer_stops_it_and_keeps_what_was_said(monkeypatch) -> None:
    def stream(self, prompt, params):
        for text in ["Hel", "lo", "!"]:
            yield RequestOutput("0", None, [1], None, [CompletionOutput(0, text, [1])], False)
            if text == "Hel":
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(FakeLLM, "stream", stream)
    handler = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    chat, _, _ = make_chat(["Hi"])
    assert chat.messages[-1] == {"role": "assistant", "content": "Hello"}
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_error_leaves_the_conversation_as_it_was(monkeypatch) -> None:
    def stream(self, prompt, params):
        raise ValueError("the prompt is too long")
        yield

    monkeypatch.setattr(FakeLLM, "stream", stream)
    chat, _, written = make_chat(["Hi"])
    assert chat.messages == []
    assert "error: the prompt is too long\n" in written


# collect-env


def test_collect_env_names_the_packages_and_the_devices(capsys, monkeypatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert run("collect-env")[0] == 0
    out = capsys.readouterr().out
    assert "\njax: " in out
    assert "jax devices: cpu:0" in out.lower().replace("tfrt_cpu_0", "cpu:0")
    assert "JAX_PLATFORMS=cpu" in out

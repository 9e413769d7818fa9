"""The arithmetic behind docs/scaling.md, on numbers small enough to follow."""

import argparse
import dataclasses
import json
from collections.abc import Sequence

import pytest

from benchmarks import scaling
from benchmarks.records import ChildError, read_model
from benchmarks.scaling import add_speed_up, default_layouts, parse_sizes, run_layout
from benchmarks.scaling_model import CostModel, Layout
from benchmarks.scaling_pieces import WIRES, Pieces, fit_decode_attention
from benchmarks.scaling_predict import MODELS, NO_WIRES, predict, validate

# One byte and one operation a second, and nothing else costs anything.
UNIT = Pieces(read_bytes_s=1.0, attention_s=0.0, product_flop_s=1e30, prefill_attention_flop_s=1e30)
LLAMA_8B = read_model(MODELS / "llama-3.1-8b")
LLAMA_405B = read_model(MODELS / "llama-3.1-405b")


def cost(layout: Layout, pieces: Pieces = UNIT, wires=NO_WIRES, bits: int = 16) -> CostModel:
    return CostModel(LLAMA_8B, layout, pieces, wires, bits)


def test_the_weights_of_the_8b_are_those_of_its_checkpoint() -> None:
    # 8,030,261,248 parameters less the norms' 266,240, two bytes each.
    assert cost(Layout()).weight_bytes() == 2 * (8_030_261_248 - 266_240)


def test_the_405b_has_405_billion_parameters() -> None:
    num_bytes = CostModel(LLAMA_405B, Layout(), UNIT, NO_WIRES).weight_bytes()
    assert num_bytes / 2 == pytest.approx(405.8e9, rel=1e-3)


def test_tensor_parallelism_divides_the_weights_and_pipelines_divide_the_layers() -> None:
    whole = cost(Layout()).weight_bytes()
    assert cost(Layout(8)).weight_bytes() == whole / 8
    embedding = 128256 * 4096 * 2
    assert cost(Layout(1, 2)).weight_bytes() == (whole - 2 * embedding) / 2 + embedding


def test_eight_bits_halve_the_layers_and_leave_the_vocabulary() -> None:
    embeddings = 2 * 128256 * 4096 * 2
    whole = cost(Layout()).weight_bytes()
    assert cost(Layout(), bits=8).weight_bytes() == (whole - embeddings) / 2 + embeddings


def test_the_cache_that_fits_grows_with_every_gpu() -> None:
    tokens = [cost(layout).kv_tokens() for layout in (Layout(), Layout(2), Layout(1, 1, 2))]
    assert tokens[0] < tokens[2] < tokens[1]  # replicas keep the weights twice
    assert tokens[2] == 2 * tokens[0]


def test_a_model_that_does_not_fit_has_no_room_for_tokens() -> None:
    assert CostModel(LLAMA_405B, Layout(4), UNIT, NO_WIRES).kv_tokens() == 0


def test_a_decode_step_that_only_reads_takes_its_bytes() -> None:
    layers_and_logits = cost(Layout()).weight_bytes() - 128256 * 4096 * 2
    kv = 32 * 2 * 8 * 128 * 2 * 100  # layers, K and V, heads, head size, bytes, tokens
    activations = 32 * 2 * (9 * 4096 + 3 * 4096 + 5 * 14336)
    logits = 128256 * 2
    expected = layers_and_logits + kv + activations + logits
    assert cost(Layout()).decode_s(1, 100) == pytest.approx(expected, rel=1e-9)


def test_a_pipeline_makes_one_request_no_faster_and_many_faster() -> None:
    one, pipeline = cost(Layout()), cost(Layout(1, 2))
    assert pipeline.decode_s(1, 1000) == pytest.approx(one.decode_s(1, 1000), rel=1e-9)
    speed_up = one.decode_s(4096, 1000) / pipeline.decode_s(4096, 1000)
    assert 1.8 < speed_up < 2


def test_replicas_share_the_rows() -> None:
    assert cost(Layout(1, 1, 4)).decode_tok_s(64, 500) == 4 * cost(Layout()).decode_tok_s(16, 500)


def test_a_pipeline_of_prompts_fills_and_drains_once() -> None:
    compute = dataclasses.replace(UNIT, read_bytes_s=1e30, product_flop_s=1.0)
    prompts = [16384] * 7
    one = cost(Layout(), compute).prefill_s(prompts)
    four = cost(Layout(1, 4), compute).prefill_s(prompts)
    assert one / four == pytest.approx(4 * 7 / (7 + 3), rel=0.01)


def test_each_wire_adds_to_a_tensor_parallel_step_and_none_to_a_single_gpu() -> None:
    seconds = [cost(Layout(8), wires=wires).decode_s(64, 500) for wires in ordered_wires()]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 4
    assert len({cost(Layout(), wires=wires).decode_s(64, 500) for wires in ordered_wires()}) == 1


def test_tensor_parallelism_over_hosts_pays_for_the_network() -> None:
    likely = WIRES["likely"]
    slow = dataclasses.replace(likely, network_latency_s=1.0)

    def seconds(layout: Layout, wires) -> float:
        return CostModel(LLAMA_405B, layout, UNIT, wires).decode_s(1, 1)

    # One second for each all-reduce of 126 layers, the embedding's, and half of one for the logits.
    waits = seconds(Layout(16), slow) - seconds(Layout(16), likely)
    assert waits == pytest.approx(253.5 * (1.0 - likely.network_latency_s), rel=1e-6)
    assert seconds(Layout(8), slow) == seconds(Layout(8), likely)


def ordered_wires() -> Sequence:
    return [NO_WIRES, WIRES["hopeful"], WIRES["likely"], WIRES["careful"]]


def test_the_fit_finds_latency_and_bandwidth_again() -> None:
    def record(rows: int, num_bytes: float) -> dict:
        us = 10 + num_bytes / 4e6  # 10 us and 4 TB/s
        gb_s = num_bytes / us / 1e3
        return {"case": f"decode {rows}x100", "implementation": "triton", "us": us, "gb_s": gb_s}

    other = {"case": "decode 64x2048 block 64", "implementation": "triton", "us": 1, "gb_s": 1}
    pieces = fit_decode_attention([record(1, 1e6), record(64, 5e8), record(256, 2e9), other])
    assert pieces.attention_s == pytest.approx(10e-6)
    assert pieces.read_bytes_s == pytest.approx(4e12)


def test_predictions_stay_close_to_what_was_measured() -> None:
    ratios = {row["what"]: row["ratio"] for row in validate()}
    ours = [ratio["likely"] for what, ratio in ratios.items() if what.startswith("jaxengine")]
    assert len(ours) == 12
    assert max(abs(ratio - 1) for ratio in ours) < 0.1
    assert ratios["jaxengine, single"]["likely"] == pytest.approx(1)  # what layer_s is fitted to
    steady = [ratio for what, ratio in ratios.items() if what.startswith("vLLM TP2")]
    assert all(0.8 < ratio["hopeful"] <= ratio["careful"] < 1.25 for ratio in steady)


def test_rows_that_do_not_fit_into_the_cache_are_left_out() -> None:
    (record,) = predict(LLAMA_8B, [Layout()], [1, 256], context=8192, bits=16)
    assert list(record["decode_tok_s"]) == [1]


def test_default_layouts_are_all_powers_of_two_that_divide_the_devices() -> None:
    names = [str(layout) for layout in default_layouts(4)]
    assert names == ["1", "TP2", "PP2", "DP2", "TP4", "TP2 x PP2", "TP2 x DP2", "PP4", "PP2 x DP2", "DP4"]  # fmt: skip  # noqa: E501
    assert [str(layout) for layout in default_layouts(6)] == ["1", "TP2", "PP2", "DP2"]


def test_sizes_are_read_and_refused() -> None:
    assert parse_sizes("4,2") == Layout(4, 2, 1)
    for text in ("0,1,1", "two", "1,1,1,1", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="three positive integers"):
            parse_sizes(text)


def test_speed_up_is_against_the_first_layout_that_ran() -> None:
    first = {"num_devices": 1, "output_tok_s": 10.0}
    row = {"num_devices": 4, "output_tok_s": 30.0}
    add_speed_up(row, first)
    assert (row["speed_up"], row["efficiency"]) == (3.0, 0.75)
    failed = {"num_devices": 8, "error": "not supported"}
    add_speed_up(failed, first)
    assert "speed_up" not in failed


@pytest.mark.parametrize(
    ("complaint", "shown"),
    [
        ("ValueError: tensor_parallel_size 3 does not divide", "not supported: ValueError: tensor"),
        ("XlaRuntimeError: out of memory", "failed: XlaRuntimeError: out"),
    ],
)
def test_a_layout_that_does_not_run_becomes_a_row_that_says_why(
    complaint: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise ChildError(complaint)

    monkeypatch.setattr(scaling, "run_child", refuse)
    args = argparse.Namespace(
        model=None, load_format="auto", dtype="auto", workload=None, repeats=1, output=None
    )
    row = run_layout(Layout(3), args, True, {})
    assert row["error"].startswith(shown)
    scaling.print_measurements([row])
    assert shown in capsys.readouterr().out


def test_the_prediction_of_one_model_ends_with_a_line_of_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(MODELS / "llama-3.1-405b")
    arguments = ["--predict", "--model", model, "--sizes", "4", "8", "--rows", "1", "256"]
    monkeypatch.setattr("sys.argv", ["scaling", *arguments])
    scaling.main()
    *table, last = capsys.readouterr().out.splitlines()
    too_small, fits = json.loads(last)["tables"][0]["layouts"]
    assert (too_small["kv_tokens"], too_small["layout"], fits["layout"]) == (0, "TP4", "TP8")
    assert any("does not fit" in line for line in table)
    assert fits["decode_tok_s"]["1"]["careful"] < fits["decode_tok_s"]["1"]["hopeful"]

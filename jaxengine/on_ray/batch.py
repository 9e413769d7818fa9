"""Offline batches: ``python -m jaxengine.on_ray.batch MODEL SOURCE ... --output-dir DIRECTORY``.

The rows are cut into shards. A replica does a shard and stores it as one file, which is there with
all its rows or not at all; so a run that was interrupted goes on with the shards that are missing.
"""

import argparse
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray.data
from tqdm import tqdm

from jaxengine.cli.arguments import (
    add_engine_arguments,
    add_sampling_arguments,
    engine_arguments,
    hyphenate,
    sampling_arguments,
)
from jaxengine.on_ray.json_output import SAMPLING_FIELDS, check_offered
from jaxengine.on_ray.output_directory import MAX_SHARDS, OutputDirectory, ShardCounts
from jaxengine.on_ray.resources import check_engine_arguments, replica_resources
from jaxengine.on_ray.shard_worker import ShardWorker
from jaxengine.on_ray.shards import Dataset, Shard, Source, open_dataset
from jaxengine.sampling_params import SamplingParams

# Engine arguments that say how fast the rows are done, not what is in them: they may differ when
# an interrupted run goes on.
SPEED_ARGUMENTS = (
    *("gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "enforce_eager"),
    *("enable_prefix_caching", "enable_chunked_prefill", "long_prefill_token_threshold"),
    *("scheduling_policy", "async_scheduling", "disable_log_stats", "max_logprobs"),
    *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
)


@dataclasses.dataclass(frozen=True)
class BatchReport:
    """What lies in the output directory at the end.

    Attributes:
        num_rows: Rows that are stored: those of the source, each once.
        num_errors: Those that hold an ``error`` instead of ``outputs``.
        num_shards: Files.
        num_shards_before: Those that an earlier run had stored.
    """

    num_rows: int
    num_errors: int
    num_shards: int
    num_shards_before: int

    def __str__(self) -> str:
        """Say it in a sentence."""
        return (
            f"{self.num_rows} rows in {self.num_shards} files, {self.num_errors} of them errors; "
            f"{self.num_shards_before} files were there before"
        )


def generate_dataset(
    source: Source,
    output_dir: str | os.PathLike[str],
    model: str,
    sampling_params: SamplingParams | None = None,
    num_replicas: int | tuple[int, int] = 1,
    *,
    engine_args: Mapping[str, Any] | None = None,
    rows_per_shard: int = 256,
    shards_in_flight: int = 4,
    num_cpus: float = 1,
    num_gpus: float | None = None,
    use_tqdm: bool = True,
) -> BatchReport:
    """Generate for every row of a dataset, on replicas of a model that Ray Data runs.

    A row has a ``prompt`` (text or token ids) or ``messages`` (for the chat template). Results are
    ``part-000000.jsonl``, ... in ``output_dir``, each line ``{"row": number, "num_prompt_tokens":
    ..., "outputs": [...]}``, or ``{"row": number, "error": ...}`` for a row that is not possible.

    Args:
        source: JSONL or Parquet files, a folder, a pattern, or a list of these.
        output_dir: For the results. If it holds a part of this very run, the rest is done.
        model: As for ``LLM``.
        sampling_params: For all rows; None takes the model's defaults.
        num_replicas: How many; or (fewest, most), between which Ray Data scales.
        engine_args: Further arguments of ``LLM``.
        rows_per_shard: Rows of a file: what is done again if a replica dies in it.
        shards_in_flight: Shards that a replica has in its batch at a time, so that the end of one
            leaves no gap.
        num_cpus: Cores that Ray sets aside for a replica.
        num_gpus: GPUs of a replica; None takes as many as it has devices, where there are GPUs.
        use_tqdm: Draw a progress bar of rows.

    Returns:
        Counts of rows, errors and files.

    Raises:
        ValueError: If the source or a parameter is not possible, or ``output_dir`` holds a run with
            other parameters.
    """
    arguments = dict(engine_args or {})
    check_engine_arguments({"model": model, **arguments})
    if sampling_params is not None:
        check_offered(sampling_params)
    dataset = open_dataset(source, rows_per_shard)
    if len(dataset.shards) > MAX_SHARDS:
        raise ValueError(f"{len(dataset.shards)} shards are too many: raise rows_per_shard")
    output = OutputDirectory(output_dir)
    output.prepare(_manifest(dataset, model, sampling_params, arguments, rows_per_shard))
    stored = {shard.number: output.counts(shard) for shard in dataset.shards}
    missing = [shard for shard in dataset.shards if stored[shard.number] is None]
    worker = {
        "fn_constructor_args": (model, arguments, sampling_params, output),
        "compute": _actor_pool(num_replicas, len(missing), shards_in_flight),
        **replica_resources(arguments, num_cpus, num_gpus),
    }
    num_rows = num_errors = 0
    with tqdm(total=dataset.num_rows, desc="Rows", disable=not use_tqdm) as progress:
        for counts in itertools.chain(filter(None, stored.values()), _run(missing, worker)):
            num_rows += counts.num_rows
            num_errors += counts.num_errors
            progress.update(counts.num_rows)
            progress.set_postfix_str(f"{num_errors} errors")
    output.remove_leftovers()
    num_shards = len(dataset.shards)
    return BatchReport(num_rows, num_errors, num_shards, num_shards - len(missing))


def _manifest(
    dataset: Dataset,
    model: str,
    params: SamplingParams | None,
    engine_args: Mapping[str, Any],
    rows_per_shard: int,
) -> dict[str, Any]:
    """Return all that decides what the rows will be."""
    sampling = None if params is None else {n: getattr(params, n) for n in SAMPLING_FIELDS}
    return {
        "model": os.fspath(model),
        "engine_args": {k: v for k, v in engine_args.items() if k not in SPEED_ARGUMENTS},
        "sampling_params": sampling,
        "rows_per_shard": rows_per_shard,
        "source": dataset.fingerprint,
    }


def _actor_pool(
    num_replicas: int | tuple[int, int], num_shards: int, shards_in_flight: int
) -> ray.data.ActorPoolStrategy:
    least, most = (num_replicas,) * 2 if isinstance(num_replicas, int) else num_replicas
    if not 1 <= least <= most:
        raise ValueError(
            f"num_replicas is {num_replicas!r}: a positive number or (fewest, most) is needed"
        )
    most = min(most, max(1, num_shards))  # a replica without a shard would load for nothing
    return ray.data.ActorPoolStrategy(
        min_size=min(least, most),
        max_size=most,
        max_concurrent_calls_per_actor=shards_in_flight,
        max_tasks_in_flight_per_actor=shards_in_flight,
        enable_true_multi_threading=True,
    )


def _run(shards: Sequence[Shard], worker: Mapping[str, Any]) -> Iterator[ShardCounts]:
    """Give the counts of each shard when it is stored, in any order."""
    if not shards:
        return
    items = [{"shard": shard.to_json()} for shard in shards]
    # One block a shard: a block is what Ray does again when an actor dies.
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset.context.enable_progress_bars = False  # ours counts rows
    for row in dataset.map_batches(ShardWorker, batch_size=1, **worker).iter_rows():
        yield ShardCounts(int(row["num_rows"]), int(row["num_errors"]))


def _replicas(text: str) -> int | tuple[int, int]:
    least, _, most = text.partition(":")
    return (int(least), int(most)) if most else int(least)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxengine.on_ray.batch",
        description="Generate for every row of a dataset on replicas that Ray runs.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="as for jaxengine generate")
    parser.add_argument("source", metavar="SOURCE", nargs="+", help="JSONL or Parquet, or a folder")
    parser.add_argument("--output-dir", required=True, help="for part-000000.jsonl, ...")
    parser.add_argument(
        "--num-replicas", type=_replicas, default=1, metavar="N|MIN:MAX", help="copies of the model"
    )
    parser.add_argument("--rows-per-shard", type=int, default=256, help="rows of an output file")
    parser.add_argument("--num-cpus", type=float, default=1, help="cores of a replica")
    parser.add_argument("--num-gpus", type=float, help="GPUs of a replica, if not one a device")
    add_sampling_arguments(parser)
    add_engine_arguments(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 after an error of the user's."""
    given = sys.argv[1:] if arguments is None else arguments
    options = make_parser().parse_intermixed_args(hyphenate(given))
    try:
        sampling = sampling_arguments(options)
        report = generate_dataset(
            options.source,
            options.output_dir,
            options.model,
            SamplingParams(**sampling) if sampling else None,
            options.num_replicas,
            engine_args=engine_arguments(options),
            rows_per_shard=options.rows_per_shard,
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())

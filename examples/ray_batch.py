"""A dataset on two replicas that Ray runs; start it again after an interruption, and it goes on.

pip install 'jaxengine[ray]'
python examples/ray_batch.py MODEL OUTPUT_DIRECTORY
"""

import json
import sys
from pathlib import Path

from jaxengine import SamplingParams
from jaxengine.on_ray.batch import generate_dataset

ROWS = [{"prompt": f"{number} times {number + 1} is"} for number in range(100)]


def main() -> None:
    model, output_dir = sys.argv[1], Path(sys.argv[2])
    source = output_dir.with_suffix(".jsonl")
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    params = SamplingParams(temperature=0, max_tokens=8)
    report = generate_dataset(source, output_dir, model, params, num_replicas=2, rows_per_shard=10)
    print(report)
    for line in (output_dir / "part-000000.jsonl").read_text().splitlines():
        result = json.loads(line)
        print(ROWS[result["row"]]["prompt"], "->", result["outputs"][0]["text"])


if __name__ == "__main__":
    main()

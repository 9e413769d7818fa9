"""Models that the tests of the engine run, a case a family: name -> architecture."""

from tests.helpers import TRANSFORMERS_NAMES
from tests.models import family_cases, numpy_cases

# One of each family, and the options that a cache or a cut over devices could get wrong.
_SECOND = ("opt 350m", "stablelm 12b", "cohere with head norms", "olmo3 scaled", "baichuan2 13b")


def _engine_cases() -> dict[str, str]:
    cases: dict[str, str] = {}
    for case, (family, _) in family_cases.CASES.items():
        architecture = TRANSFORMERS_NAMES.get(family, f"{family}ForCausalLM")
        if architecture not in cases.values() or case in _SECOND:
            cases[case] = architecture
    for case, (architecture, _) in numpy_cases.TINY.items():
        if architecture not in cases.values() or case in _SECOND:
            cases[case] = architecture
    return cases


ENGINE_CASES = _engine_cases()
# Without waiting for the slow ones: norms over the heads of all shards, and biases by head.
DEFAULT_CASES = ("olmo3", "baichuan2 13b")

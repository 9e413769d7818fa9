"""OpenAI's batch files: requests in, answers out, and what an unfinished run has left."""

import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

URLS = ("/v1/completions", "/v1/chat/completions")
INVALID = "invalid_request"


@dataclass(frozen=True)
class BatchRequest:
    """One line of the input.

    Attributes:
        line: Its number, from 1.
        custom_id: Its name; None if the line has none that can be read.
        url: One of ``URLS``.
        body: Of the request.
        problem: Why the line is no request; empty if it is one.
    """

    line: int
    custom_id: str | None
    url: str = ""
    body: dict[str, Any] | None = None
    problem: str = ""

    @property
    def key(self) -> str | int:
        """What its answer is known by: the name, or else the line."""
        return self.line if self.custom_id is None else self.custom_id


def read_requests(path: Path) -> Iterator[BatchRequest]:
    """Read a file line by line; empty lines are passed over.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield parse_request(number, line)
    except OSError as error:
        raise ValueError(f"--input-file {str(path)!r}: {error.strerror}") from None


def parse_request(number: int, line: bytes) -> BatchRequest:
    """Read one line; what is wrong with it is in its ``problem``."""
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return BatchRequest(number, None, problem=f"line {number} is not JSON: {error}")
    if not isinstance(values, dict):
        return BatchRequest(number, None, problem=f"line {number} is not a JSON object")
    name = values.get("custom_id")
    if not isinstance(name, str) or not name:
        return BatchRequest(
            number, None, problem=f"line {number}: custom_id is {name!r:.100}, a text is needed"
        )
    problem, method, url = "", values.get("method"), values.get("url")
    body = values.get("body")
    if method != "POST":
        problem = f"method is {method!r:.100}, it must be 'POST'"
    elif url not in URLS:
        problem = f"url is {url!r:.100}, it must be one of {', '.join(URLS)}"
    elif not isinstance(body, dict):
        problem = f"body is {body!r:.100}, a JSON object is needed"
    elif body.get("stream"):
        problem = "body.stream is true: an answer in a file is whole, leave it out"
    if problem:
        return BatchRequest(number, name, problem=f"line {number}: {problem}")
    return BatchRequest(number, name, str(url), body)


def check_names(path: Path) -> set[str | int]:
    """Read the whole input once, and return the keys of its lines.

    Raises:
        ValueError: If two lines have one name, or the file cannot be read.
    """
    lines: dict[str, int] = {}
    keys: set[str | int] = set()
    for request in read_requests(path):
        keys.add(request.key)
        if request.custom_id is not None:
            first = lines.setdefault(request.custom_id, request.line)
            if first != request.line:
                raise ValueError(
                    f"{str(path)!r}: custom_id {request.custom_id!r} is on lines {first} and "
                    f"{request.line}: give each line a name of its own"
                )
    return keys


def answer(request: BatchRequest, status: int, request_id: str, body: Any) -> dict[str, Any]:
    """Return the output's line for what a route has answered, whatever its status."""
    return {
        "id": f"batch_req_{request_id}",
        "custom_id": request.custom_id,
        "response": {"status_code": status, "request_id": request_id, "body": body},
        "error": None,
    }


def refusal(request: BatchRequest, request_id: str) -> dict[str, Any]:
    """Return the output's line for a line that is no request."""
    return {
        "id": f"batch_req_{request_id}",
        "custom_id": request.custom_id,
        "response": None,
        "error": {"code": INVALID, "message": request.problem, "line": request.line},
    }


class BatchOutput:
    """The output file, held against other writers; begins where an earlier run has ended.

    A line counts when its line feed is written. What stands behind the last one was being written
    when the earlier run was killed: it is cut off, and its request is done again.

    Args:
        path: Created if it is missing.
        keys: Of all lines of the input.

    Attributes:
        done: Keys that have their answer.
        num_errors: Answers among all that are errors.

    Raises:
        ValueError: If it holds what is no answer to this input, or another process writes it.
    """

    def __init__(self, path: Path, keys: set[str | int]) -> None:
        self.done: set[str | int] = set()
        self.num_errors = 0
        self._num_lines = len(keys)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"--output-file {str(path)!r}: {error.strerror}") from None
        self._file: BinaryIO = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            self._lock(path)
            self._recover(path, keys)
        except BaseException:
            self._file.close()
            raise

    @property
    def num_missing(self) -> int:
        """Lines that have no answer yet."""
        return self._num_lines - len(self.done)

    def write(self, request: BatchRequest, line: dict[str, Any]) -> None:
        """Append one answer."""
        text = json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\n"
        written = 0
        while written < len(text):
            written += self._file.write(text[written:])
        self.done.add(request.key)
        self.num_errors += _is_error(line)

    def close(self) -> None:
        """Bring everything to the disk, and let others write."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"--output-file {str(path)!r} is being written by another process: wait for it, or "
                "name another file"
            ) from None

    def _recover(self, path: Path, keys: set[str | int]) -> None:
        end = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                if line.strip():
                    self._take(f"{str(path)!r}, line {number}", line, keys)
        self._file.truncate(end)
        self._file.seek(end)

    def _take(self, place: str, line: bytes, keys: set[str | int]) -> None:
        remedy = "name another --output-file, or remove this one"
        try:
            values = json.loads(line)
            key = values["custom_id"]
            if key is None:
                key = values["error"]["line"]
            is_error = _is_error(values)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{place} is no answer of a batch: {remedy}") from None
        if not isinstance(key, str | int) or key not in keys:
            raise ValueError(f"{place} answers {key!r:.100}, which the input lacks: {remedy}")
        if key in self.done:
            raise ValueError(f"{place} answers {key!r:.100} a second time: {remedy}")
        self.done.add(key)
        self.num_errors += is_error


def _is_error(line: dict[str, Any]) -> bool:
    return line["error"] is not None or line["response"]["status_code"] != 200

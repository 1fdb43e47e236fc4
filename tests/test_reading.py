"""JSON of strangers: a value or one line, whatever is in the file."""

import numpy as np
import pytest

from hierens.core.fetching import LoadError
from hierens.core.json_files import is_finite, is_whole, parse_json, read_json, short


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "not valid JSON and cannot be read: it is nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"[NaN]", "it contains NaN"),
        (b"[-Infinity]", "it contains -Infinity"),
        (b"9" * 5000, "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b'{"a": ', "not valid JSON"),
        (b"[1]" + b" " * 5 * 2**20, "is 5 MB long: it is not a policy"),
    ],
)
def test_what_is_no_json_is_one_line(tmp_path, content, message):
    file = tmp_path / "policy.json"
    file.write_bytes(content)
    with pytest.raises(LoadError, match=message) as refused:
        read_json(file, "a policy")
    assert str(refused.value).startswith(str(file)) and "\n" not in str(refused.value)


def test_a_file_that_is_not_there_or_no_file_is_one_line(tmp_path):
    for file in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(LoadError, match="cannot be read: "):
            read_json(file, "a policy")


def test_nan_is_taken_where_python_writes_it():
    assert np.isnan(parse_json("[NaN]", nan=True)[0])


def test_numbers_are_neither_truth_values_nor_infinite():
    assert is_whole(3, 0, 3) and is_whole(np.int64(3), 0, 3) and is_finite(0.5) and is_finite(np.float32(1), 0, 1)
    assert not any(is_whole(value, 0, 9) for value in (True, 1.0, "1", None, -1, 10, 10**400))
    assert not any(is_finite(value) for value in (True, "1", None, float("nan"), float("inf"), 10**400))


def test_values_are_shown_short_on_one_line_that_prints():
    nested = []
    for _ in range(500):
        nested = [nested]
    for value in ("x" * 10_000, list(range(10_000)), nested, {"a": "b" * 10_000}, 10**4000):
        assert len(short(value)) <= 203
    assert short("a\nb\ud800\x1b[31m", plain=True) == r"a\nb\ud800\x1b[31m"

"""What is kept between runs is found again only for the same inputs, and is whole."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlhf.samples import TokenizedExample
from rlhf.stages.cache import digest, examples_digest, model_digest, read_ragged, write_ragged

ROWS = st.lists(arrays(np.float32, st.integers(0, 9), elements=st.floats(-50, 0, width=32)), min_size=1, max_size=8)


@given(rows=ROWS)
def test_ragged_rows_come_back_bit_equal(rows: list[np.ndarray]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made" / "rows.npz"
        write_ragged(path, rows)
        found = read_ragged(path)
        assert list(path.parent.iterdir()) == [path]
    assert [(row.dtype, row.tobytes()) for row in found] == [(np.float32, row.tobytes()) for row in rows]


@pytest.mark.parametrize("lengths", [[4], [0], [0, 0], [3, 0, 2], [0, 5], [5, 0]])
def test_one_row_and_empty_rows_come_back(tmp_path: Path, lengths: list[int]) -> None:
    write_ragged(tmp_path / "rows.npz", (np.full(n, n, np.float32) for n in lengths))
    found = read_ragged(tmp_path / "rows.npz")
    assert [row.tolist() for row in found] == [[float(n)] * n for n in lengths]


def test_an_interrupted_write_leaves_no_file_and_not_less_than_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(file, **arrays):
        file.write(b"half of it")
        raise OSError("no space left on device")

    path, kept = tmp_path / "rows.npz", tmp_path / "kept.npz"
    write_ragged(kept, [np.ones(3, np.float32)])
    monkeypatch.setattr(np, "savez", full_disk)
    for target in (path, kept):
        with pytest.raises(OSError, match="no space left"):
            write_ragged(target, [np.zeros(2, np.float32)])
    assert not path.exists()
    assert [row.tolist() for row in read_ragged(kept)] == [[1.0, 1.0, 1.0]]
    monkeypatch.undo()
    write_ragged(path, [np.zeros(2, np.float32)])
    assert [row.tolist() for row in read_ragged(path)] == [[0.0, 0.0]]


def test_a_digest_depends_on_every_part_and_on_where_one_ends() -> None:
    found = [digest(*parts) for parts in (["a", "b"], ["b", "a"], ["ab"], ["a", "b", ""], ["a", "c"], [])]
    assert len(set(found)) == len(found)
    assert {len(one) for one in found} == {32}
    assert digest("a", 1) == digest("a", "1")


# --- models -----------------------------------------------------------------------------------------------------------


def model_of(folder: Path, weights: bytes = bytes(64), config: str = "{}") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(config)
    return folder


@given(bit=st.integers(0, 64 * 8 - 1))
def test_the_digest_of_a_model_changes_with_any_bit_of_its_weights(bit: int) -> None:
    weights = bytearray(64)
    with tempfile.TemporaryDirectory() as folder:
        before = model_digest(model_of(Path(folder), bytes(weights)))
        weights[bit // 8] ^= 1 << bit % 8
        after = model_digest(model_of(Path(folder), bytes(weights)))
    assert before != after


def test_the_digest_of_a_model_is_of_its_content_not_its_place(tmp_path: Path) -> None:
    first, second = model_of(tmp_path / "a"), model_of(tmp_path / "b")
    (second / "training.log").write_text("not a part of the model")
    assert model_digest(first) == model_digest(second)
    model_of(second, config='{"layers": 2}')
    assert model_digest(first) != model_digest(second)


def test_a_hub_name_stands_for_itself() -> None:
    assert model_digest(Path("someone/a-model")) == "someone/a-model"


# --- examples ---------------------------------------------------------------------------------------------------------


def example(tokens: list[int], mask: list[bool]) -> TokenizedExample:
    return TokenizedExample(np.array(tokens, np.int32), np.array(mask))


BASE = [example([1, 2, 3], [False, True, True]), example([4, 5], [False, True])]


@pytest.mark.parametrize(
    "others",
    [
        BASE[::-1],
        BASE[:1],
        [*BASE, BASE[0]],
        [example([1, 2, 7], [False, True, True]), BASE[1]],
        [example([1, 2, 3], [False, False, True]), BASE[1]],
        [example([1, 2, 3, 0], [False, True, True, False]), BASE[1]],
        # The same tokens in all, cut elsewhere.
        [example([1, 2], [False, True]), example([3, 4, 5], [False, True, True])],
        [],
    ],
    ids=["order", "fewer", "more", "token", "mask", "padded", "cut", "none"],
)
def test_the_digest_of_examples_changes_with_any_token_mask_length_and_order(others: list[TokenizedExample]) -> None:
    assert examples_digest(others) != examples_digest(BASE)


@given(place=st.integers(1, 39), bit=st.integers(0, 14))
def test_the_digest_of_examples_changes_with_any_bit(place: int, bit: int) -> None:
    tokens, mask = list(range(40)), [n >= 10 for n in range(40)]
    before = examples_digest([example(tokens, mask)])
    flipped = [token ^ (1 << bit) if n == place else token for n, token in enumerate(tokens)]
    unmasked = [not value if n == place else value for n, value in enumerate(mask)]
    assert before != examples_digest([example(flipped, mask)])
    assert before != examples_digest([example(tokens, unmasked)])
    assert before == examples_digest(iter([example(tokens, mask)]))


WRITER = """
import sys
from pathlib import Path
import numpy as np
from rlhf.stages.cache import read_ragged, write_ragged
path, value = Path(sys.argv[1]), float(sys.argv[2])
for _ in range(60):
    write_ragged(path, [np.full(20_000, value, np.float32)])
    [row] = read_ragged(path)
    assert set(row.tolist()) <= {1.0} or set(row.tolist()) <= {2.0}, "a mixture of both"
"""


def test_two_runs_that_write_the_same_file_never_meet(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), value]) for value in ("1", "2")]
    assert [writer.wait(timeout=100) for writer in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [path]

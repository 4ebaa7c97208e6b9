from __future__ import annotations

import errno
import json
import os
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.config import Exaone4TinyModel
from rlhf.errors import ConfigError, StorageError
from rlhf.models import load_policy, prepare_model
from rlhf.training.model_files import INDEX_FILE, SINGLE_FILE, ModelFiles, plan_shards, write_model
from rlhf.weight_sync.source import ParameterMeta, layer_groups


def tensors() -> dict[str, Tensor]:
    """Of all widths, in an order that would leave some unaligned if they were written one after the other."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed.weight": torch.randn(7, 3, generator=generator).bfloat16(),
        "model.layers.0.flag": torch.tensor([True, False, True]),
        "model.layers.0.weight": torch.randn(5, 4, generator=generator),
        "model.layers.0.scalar": torch.tensor(2.5, dtype=torch.float64),
        "model.layers.1.empty": torch.zeros(0, 4),
        "model.layers.1.half": torch.randn(9, generator=generator).half(),
        "model.layers.1.count": torch.arange(5),
        "lm_head.weight": torch.randn(3, 7, generator=generator).t().bfloat16(),  # not contiguous
    }


def grouped(values: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: values[name] for name in names} for names in layer_groups(list(values))]


def metadata(values: Mapping[str, Tensor]) -> list[ParameterMeta]:
    return [ParameterMeta(name, value.dtype, tuple(value.shape)) for name, value in values.items()]


def write(
    directory: Path, values: Mapping[str, Tensor], groups: Iterable[Mapping[str, Tensor]] | None = None, **options
) -> None:
    options = {"save_rest": lambda folder: (folder / "config.json").write_text("{}\n")} | options
    write_model(directory, grouped(values) if groups is None else groups, metadata(values), **options)


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


# --- writing ------------------------------------------------------------------------------------------


def test_one_shard_is_one_plain_file_that_safetensors_reads_bit_for_bit(tmp_path):
    write(tmp_path / "model", tensors())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", SINGLE_FILE]
    assert_equal(load_file(tmp_path / "model" / SINGLE_FILE), tensors())
    with safe_open(tmp_path / "model" / SINGLE_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("shard_bytes", [1, 50, 90, 150])
def test_shards_are_filled_in_order_up_to_their_size(tmp_path, shard_bytes):
    write(tmp_path / "model", tensors(), shard_bytes=shard_bytes)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "model" / INDEX_FILE).read_text())
    held = {file: load_file(tmp_path / "model" / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in tensors() if name in held[file]}
    assert list(index["weight_map"].values()) == sorted(index["weight_map"].values())
    assert_equal({name: value for file in files for name, value in held[file].items()}, tensors())
    sizes = [sum(value.nbytes for value in values.values()) for values in held.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= shard_bytes or len(held[file]) == 1 for size, file in zip(sizes, files, strict=True))
    assert all(held.values())


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_a_model_of_several_shards_with_both_keys_of_a_tied_head(tmp_path, tied):
    config = Exaone4TinyModel(kind="exaone4_tiny", tie_word_embeddings=tied)
    model = load_policy(prepare_model(config, 0, tmp_path / "first"), "bfloat16")
    state = model.state_dict()
    assert "lm_head.weight" in state
    write(tmp_path / "second", state, shard_bytes=200_000, save_rest=model.config.save_pretrained)
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 3
    again = load_policy(tmp_path / "second", "bfloat16")
    assert_equal(again.state_dict(), state)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_one_group_at_a_time_is_alive(tmp_path):
    values = tensors()
    alive: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[dict[str, Tensor]]:
        for names in layer_groups(list(values)):
            assert not any(reference() is not None for reference in alive), "an earlier group is held"
            group = {name: values[name].clone() for name in names}
            alive[:] = [weakref.ref(tensor) for tensor in group.values()]
            yield group
            del group

    write(tmp_path / "model", values, stream(), shard_bytes=60)
    assert_equal({name: ModelFiles(tmp_path / "model").read(name) for name in values}, values)


def test_an_existing_model_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    write(tmp_path / "model", tensors(), shard_bytes=60)
    other = {"weight": torch.ones(3)}
    write(tmp_path / "model", other)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", SINGLE_FILE]
    assert_equal(load_file(tmp_path / "model" / SINGLE_FILE), other)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


def renamed(group: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"other.{name}": value for name, value in group.items()}


def shortened(group: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:-1] for name, value in group.items()}


def widened(group: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in group.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda groups: [renamed(groups[0]), *groups[1:]], "model.embed.weight: expected next, got other.model"),
        (lambda groups: [shortened(groups[0]), *groups[1:]], r"bfloat16 \(6, 3\), but its metadata says"),
        (lambda groups: [widened(groups[0]), *groups[1:]], r"float64 \(7, 3\), but its metadata says"),
        (lambda groups: groups[:-1], "lm_head.weight: expected next, got the end of the stream"),
        (lambda groups: [*groups, {"more": torch.ones(1)}], "more: not in the metadata"),
        (lambda groups: groups[::-1], "model.embed.weight: expected next, got lm_head.weight"),
    ],
)
def test_a_stream_that_differs_from_the_metadata_is_refused_and_the_old_model_stays(tmp_path, change, message):
    old = {"weight": torch.ones(3)}
    write(tmp_path / "model", old)
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "model", tensors(), change(grouped(tensors())))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert_equal(load_file(tmp_path / "model" / SINGLE_FILE), old)


def test_after_an_error_the_remaining_groups_are_drawn_for_the_other_ranks(tmp_path):
    drawn = []

    def stream() -> Iterator[dict[str, Tensor]]:
        for number, group in enumerate(grouped(tensors())):
            drawn.append(number)
            yield renamed(group) if number == 1 else group

    with pytest.raises(ValueError, match="expected next"):
        write(tmp_path / "model", tensors(), stream())
    assert drawn == list(range(len(grouped(tensors()))))
    assert list(tmp_path.iterdir()) == []


# --- places that cannot be written ---------------------------------------------------------------------


def test_a_model_that_does_not_fit_on_the_disk_is_refused_before_anything_is_written(tmp_path):
    huge = ParameterMeta("weight", torch.float32, (2**30, 2**20))
    drawn = []
    groups = (drawn.append(None) or {} for _ in range(3))
    with pytest.raises(StorageError) as caught:
        write_model(tmp_path / "new" / "model", groups, [huge], save_rest=lambda folder: None)
    assert "4,194,304.00 GiB are needed and " in str(caught.value)
    assert str(tmp_path / "new" / "model") in str(caught.value)
    assert len(drawn) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "Permission")]
)
def test_an_error_of_the_disk_in_the_middle_is_explained(tmp_path, code, reason):
    def fails(folder: Path) -> None:
        raise OSError(code, os.strerror(code), str(folder / "config.json"))

    with pytest.raises(StorageError, match=reason) as caught:
        write(tmp_path / "model", tensors(), save_rest=fails)
    assert "GiB are free" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_is_not_the_disks_fault_passes_unchanged(tmp_path):
    def fails(folder: Path) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "lost")

    with pytest.raises(ConnectionResetError):
        write(tmp_path / "model", tensors(), save_rest=fails)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/model"])
def test_a_file_in_the_way_is_named(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"a model must be written here\. A part of the path is a file"):
        write(tmp_path / place, tensors())
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="Permission is denied"):
        write(tmp_path / "locked" / "model", tensors())


# --- reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [50, 10**6])
def test_tensors_are_read_by_name_with_shape_and_dtype_known_before(tmp_path, shard_bytes):
    write(tmp_path / "model", tensors(), shard_bytes=shard_bytes)
    files = ModelFiles(tmp_path / "model")
    assert sorted(files.names) == sorted(tensors())
    for name, value in tensors().items():
        assert (files.shape(name), files.dtype(name)) == (tuple(value.shape), value.dtype)
        assert torch.equal(files.read(name), value)


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_a_slice_costs_the_memory_of_the_slice(tmp_path):
    save_file({"weight": torch.ones(32 * 2**20)}, tmp_path / SINGLE_FILE)  # 128 MiB
    before = anonymous_mib()
    part = ModelFiles(tmp_path).read("weight").view(-1)[2**20 : 3 * 2**20].clone()
    grown = anonymous_mib() - before
    assert part.sum() == 2 * 2**20
    assert grown < 24, f"8 MiB were copied and {grown:.0f} MiB taken"


def model_of_three_shards(directory: Path) -> Path:
    write(directory, tensors(), shard_bytes=100)
    assert len(list(directory.glob("*.safetensors"))) == 3
    return directory


def without_weights(directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()


def pickled(directory: Path) -> None:
    without_weights(directory)
    (directory / "pytorch_model.bin").touch()


def without_a_shard(directory: Path) -> None:
    (directory / "model-00002-of-00003.safetensors").unlink()


def truncated(directory: Path) -> None:
    path = directory / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damaged(directory: Path) -> None:
    (directory / "model-00001-of-00003.safetensors").write_bytes(b"\xff" * 200)


def of_another_model(directory: Path) -> None:
    index = json.loads((directory / INDEX_FILE).read_text())
    index["weight_map"]["model.layers.7.weight"] = "model-00001-of-00003.safetensors"
    (directory / INDEX_FILE).write_text(json.dumps(index))


def unreadable(directory: Path) -> None:
    (directory / INDEX_FILE).write_text("{")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_weights, f"must hold {SINGLE_FILE} or {INDEX_FILE}. It has neither"),
        (pickled, "has only pickled weights (pytorch_model.bin), which cannot be mapped. Convert it once: "),
        (without_a_shard, f"{INDEX_FILE} names model-00002-of-00003.safetensors, which does not exist"),
        (truncated, "model-00003-of-00003.safetensors ("),
        (damaged, "model-00001-of-00003.safetensors (200 bytes) cannot be read: "),
        (of_another_model, "what is not there: model.layers.7.weight in model-00001-of-00003.safetensors"),
        (unreadable, f"{INDEX_FILE} is not JSON with a weight_map"),
    ],
)
def test_a_damaged_model_is_refused_with_the_file_and_the_fix(tmp_path, damage, expected):
    directory = model_of_three_shards(tmp_path / "model")
    damage(directory)
    with pytest.raises(ConfigError) as caught:
        ModelFiles(directory)
    (problem,) = caught.value.problems
    assert problem.startswith(f"model.path = {directory}: must h")
    assert expected in problem
    assert problem.endswith(".")


def test_every_damaged_file_is_named_at_once(tmp_path):
    directory = model_of_three_shards(tmp_path / "model")
    without_a_shard(directory)
    truncated(directory)
    damaged(directory)
    with pytest.raises(ConfigError) as caught:
        ModelFiles(directory)
    assert len(caught.value.problems) == 3


def test_a_dtype_that_is_not_a_plain_number_is_refused_by_name(tmp_path):
    header = json.dumps({"weight": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ConfigError, match="weight is stored as F8_E8M0"):
        ModelFiles(tmp_path).dtype("weight")


def test_the_single_file_comes_before_the_index_as_in_transformers(tmp_path):
    directory = model_of_three_shards(tmp_path / "model")
    save_file({"alone": torch.ones(2)}, directory / SINGLE_FILE)
    assert ModelFiles(directory).names == ("alone",)
    shutil.rmtree(directory)


def test_a_tensor_larger_than_a_shard_has_a_file_of_its_own():
    sizes = [10, 200, 20, 20]
    metas = [ParameterMeta(str(n), torch.uint8, (size,)) for n, size in enumerate(sizes)]
    dealt = [[meta.name for meta in shard.tensors] for shard in plan_shards(metas, 50)]
    assert dealt == [["0"], ["1"], ["2", "3"]]

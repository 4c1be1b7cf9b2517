# SPDX-License-Identifier: Apache-2.0
"""The other verbs of neox-shard, as a user runs them and as functions."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from libneox.data.check import check_pair
from libneox.data.manifest import read_manifest, tokenizer_of
from libneox.data.mmap import MMapDataset
from libneox.data.writer import DatasetWriter
from libneox.errors import DataError, InputMissing, IntegrityError, OutputExists, UsageError
from libneox.run_directory import Manifest, add_file, begin_step, commit_step
from libneox.stream import StreamReader
from neox_shard.cat import cat_datasets, parse_range
from neox_shard.merge import merge_datasets
from neox_shard.mix import Recipe, mix_datasets, parse_source
from neox_shard.numbers import parse_count
from neox_shard.pieces import join_pieces, split_dataset
from neox_shard.shuffle import shuffle_dataset

NOWHERE = io.BytesIO()
QUIET = {"force": False, "quiet": True}


def _random(count: int, first: int, seed: int = 0) -> list[list[int]]:
    """Documents of 0 to 19 tokens, all of value `first` or more."""
    rng = np.random.RandomState(seed)
    return [rng.randint(first, first + 50, rng.randint(0, 20)).tolist() for _ in range(count)]


def _stream(data: bytes) -> list[list[int]]:
    batches = list(StreamReader(io.BytesIO(data)))
    return [part.tolist() for batch in batches for part in np.split(batch.values, np.cumsum(batch.lengths)[:-1])]


# cat


def test_cat_and_pack_are_inverse(run_command, make_dataset, read, tmp_path: Path) -> None:
    one, two = make_dataset("a", _random(30, 2)), make_dataset("b", _random(20, 100))
    stream = run_command(["neox-shard", "cat", str(one), str(two)])
    assert stream.returncode == 0, stream.stderr
    assert _stream(stream.stdout) == read(one) + read(two)
    packed = run_command(["neox-shard", "-o", "out"], input=stream.stdout, cwd=tmp_path)
    assert packed.returncode == 0
    assert (tmp_path / "out.tokenizer.json").read_bytes() == (tmp_path / "a.tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"), [("5:40", (5, 40)), (":3", (0, 3)), ("45:", (45, 50)), ("48:99", (48, 50))]
)
def test_cat_of_a_range(make_dataset, read, text: str, expected: tuple[int, int]) -> None:
    one, two = make_dataset("a", _random(30, 2)), make_dataset("b", _random(20, 100))
    sink = io.BytesIO()
    cat_datasets([one, two], sink, documents=text, tokenizer=None, quiet=True)
    assert _stream(sink.getvalue()) == (read(one) + read(two))[slice(*expected)]


def test_ids_are_never_wrapped(make_dataset) -> None:
    """A stream holds int32 at most; what does not fit is an error, not another id."""
    wide = make_dataset("w", [[1, 2**32 + 5]], "int64")
    with pytest.raises(DataError, match="do not fit int32"):
        cat_datasets([wide], io.BytesIO(), documents=None, tokenizer=None, quiet=True)
    with pytest.raises(DataError, match="do not fit int32"):
        merge_datasets([wide], None, io.BytesIO(), **QUIET)
    sink = io.BytesIO()
    cat_datasets([make_dataset("v", [[1, 257]], "int64")], sink, documents=None, tokenizer=None, quiet=True)
    assert _stream(sink.getvalue()) == [[1, 257]]


@pytest.mark.parametrize("text", ["5", "a:b", "-1:2", "3:2", "51:52"])
def test_senseless_ranges_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--documents"):
        parse_range(text, 50, "documents")


def test_cat_needs_a_tokenizer_and_tokens(make_dataset) -> None:
    plain, floats = make_dataset("a", [[1]], plain=True), make_dataset("f", [[0.5]], "float32")
    with pytest.raises(UsageError, match="--tokenizer"):
        cat_datasets([plain], NOWHERE, documents=None, tokenizer=None, quiet=True)
    with pytest.raises(DataError, match="floating"):
        cat_datasets([floats], NOWHERE, documents=None, tokenizer="bytes", quiet=True)


def test_a_reader_that_goes_away_ends_cat_silently(make_dataset) -> None:
    import subprocess
    import sys

    prefix = make_dataset("a", [[5] * 5000] * 400)
    command = f"{sys.executable} -m neox_shard cat {prefix} | head -c 100 >/dev/null; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60, check=False)
    assert run.returncode == 141
    assert run.stderr == b""


# info and verify


def test_info_counts(run_command, make_dataset, golden: Path) -> None:
    prefix = make_dataset("a", [[1, 2, 3], [], [4]])
    run = run_command(["neox-shard", "info", str(prefix), "--json"])
    (found,) = json.loads(run.stdout)
    assert (found["documents"], found["tokens"], found["shortest"], found["longest"]) == (3, 4, 0, 3)
    assert found["tokenizer"]["vocab_size"] == 258
    text = run_command(["neox-shard", "info", str(prefix), str(golden / "data/d_mcore/mc_i32_multiseq")])
    assert text.returncode == 0
    assert b"sequences" in text.stdout


def test_verify_accepts_what_was_written_and_what_others_wrote(run_command, make_dataset, golden: Path) -> None:
    pairs = [make_dataset("a", _random(50, 2)), make_dataset("e", [])]
    pairs += [golden / "data/a_preprocess/sample_eod_text_document", golden / "data/d_mcore/mc_u16"]
    run = run_command(["neox-shard", "verify", *map(str, pairs)])
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(b": ok: ") == 4
    run = run_command(["neox-shard", "verify", str(pairs[2]), "--vocab-size", "50277", "--json"])
    assert json.loads(run.stdout)["largest"] < 50277


def test_verify_names_a_token_outside_the_vocabulary(run_command, make_dataset) -> None:  # B-05
    prefix = make_dataset("a", [[1, 2], [], [3, 4, 258, 5]])
    run = run_command(["neox-shard", "verify", str(prefix)])
    assert run.returncode == 65
    assert b"document 2, token 2: id 258" in run.stderr


def test_verify_finds_every_kind_of_damage(make_dataset, tmp_path: Path) -> None:
    def damaged(at: int, value: bytes, suffix: str = ".idx") -> Path:
        prefix = make_dataset("x", [[1, 2, 3], [4, 5], [6]], plain=True)
        path = Path(f"{prefix}{suffix}")
        data = bytearray(path.read_bytes())
        data[at : at + len(value)] = value
        path.write_bytes(data)
        return prefix

    n = 3
    offset, documents = 34 + 4 * n, 34 + 12 * n
    cases = [
        (damaged, 34 + 8, (2).to_bytes(4, "little"), DataError),  # the last length: at open
        (damaged, offset + 8, (4).to_bytes(8, "little"), DataError),  # an offset
        (damaged, documents + 8, (9).to_bytes(8, "little"), DataError),  # the document index
        (damaged, documents, (1).to_bytes(8, "little"), DataError),
        (damaged, documents + 24, (2).to_bytes(8, "little"), DataError),
    ]
    for make, at, value, error in cases:
        prefix = make(at, value)
        with pytest.raises(error):
            check_pair(prefix)
        _remove(tmp_path, "x")
    prefix = damaged(2, b"\x07", ".bin")  # one byte, and everything still fits together
    with pytest.raises(IntegrityError, match=r"x\.bin"):
        check_pair(prefix)
    _remove(tmp_path, "x")


def test_verify_finds_files_of_different_runs(make_dataset) -> None:  # B-04
    one, two = make_dataset("a", [[1, 2], [3]]), make_dataset("b", [[1], [2, 4]])
    Path(f"{one}.bin").write_bytes(Path(f"{two}.bin").read_bytes())
    with pytest.raises(IntegrityError, match=r"a\.bin"):
        check_pair(one)


def _remove(folder: Path, name: str) -> None:
    for path in folder.glob(f"{name}.*"):
        path.unlink()


# merge


def test_merge_keeps_documents_of_several_sequences(golden: Path, read, tmp_path: Path) -> None:
    one = golden / "data/d_mcore/mc_i32_multiseq"
    merge_datasets([one, one], tmp_path / "m", NOWHERE, **QUIET)
    data, source = MMapDataset(tmp_path / "m"), MMapDataset(one)
    assert read(tmp_path / "m") == read(one) * 2
    assert data.doc_idx.tolist() == source.doc_idx.tolist() + (source.doc_idx[1:] + len(source)).tolist()
    again = golden / "data/d_mcore/mc_u16"
    merge_datasets([again, again], tmp_path / "n", NOWHERE, **QUIET)
    merged = golden / "data/d_mcore/mc_u16_merged"
    assert read(tmp_path / "n") == read(merged)
    assert MMapDataset(tmp_path / "n").doc_idx.tolist() == MMapDataset(merged).doc_idx.tolist()


def test_merge_refuses_what_does_not_belong_together(golden: Path, make_dataset, tmp_path: Path) -> None:  # B-08
    short, long = make_dataset("a", [[1]]), make_dataset("b", [[1]], "int32")
    with pytest.raises(DataError, match=r"int32.*uint16"):
        merge_datasets([short, long], tmp_path / "m", NOWHERE, **QUIET)
    other = make_dataset("c", [[1]])
    changed = Path(f"{other}.tokenizer.json").read_bytes() + b"\n"
    Path(f"{other}.tokenizer.json").write_bytes(changed)
    manifest = json.loads(Path(f"{other}.json").read_text())
    manifest["tokenizer"]["sha256"] = hashlib.sha256(changed).hexdigest()
    Path(f"{other}.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="another tokenizer"):
        merge_datasets([short, other], tmp_path / "m", NOWHERE, **QUIET)
    with pytest.raises(DataError, match="multimodal"):
        merge_datasets([golden / "data/d_mcore/mc_multimodal"], tmp_path / "m", NOWHERE, **QUIET)
    assert not list(tmp_path.glob("m*"))


def test_merge_loses_no_sequence_behind_the_last_document(make_dataset, tmp_path: Path) -> None:
    """A writer that did not end its last document left an index that stops before the end."""
    prefix = make_dataset("a", [[1], [2], [3]], plain=True)
    index = bytearray(Path(f"{prefix}.idx").read_bytes()[:-8])
    index[26:34] = (3).to_bytes(8, "little")
    Path(f"{prefix}.idx").write_bytes(index)
    _remove_manifest(prefix)
    with pytest.raises(DataError, match="documents end at sequence 2, but there are 3"):
        merge_datasets([prefix], tmp_path / "m", NOWHERE, **QUIET)
    assert not list(tmp_path.glob("m*"))


@pytest.mark.slow
def test_merge_beyond_two_to_the_31(tmp_path: Path) -> None:  # B-07
    """Three sets of 0.8 G tokens: more tokens and bytes than 32 bits count."""
    for k in range(3):
        sizes = np.full(8, 100_000_000, np.int64)
        with DatasetWriter(tmp_path / f"s{k}", "uint8") as writer:
            writer.add(np.array([], np.uint8), np.array([], np.int64))
            writer.commit()
        header = bytearray((tmp_path / f"s{k}.idx").read_bytes()[:34])
        header[18:26], header[26:34] = (8).to_bytes(8, "little"), (9).to_bytes(8, "little")
        body = sizes.astype("<i4").tobytes() + (np.arange(8) * 100_000_000).astype("<i8").tobytes()
        (tmp_path / f"s{k}.idx").write_bytes(bytes(header) + body + np.arange(9).astype("<i8").tobytes())
        with open(tmp_path / f"s{k}.bin", "r+b") as file:
            file.truncate(800_000_000)
            file.seek(799_999_999)
            file.write(bytes([k + 1]))
        _remove_manifest(tmp_path / f"s{k}")
    merge_datasets([tmp_path / f"s{k}" for k in range(3)], tmp_path / "m", NOWHERE, **QUIET)
    data = MMapDataset(tmp_path / "m")
    assert data.num_tokens == 2_400_000_000 > 2**31
    assert data.pointers.tolist() == [100_000_000 * k for k in range(24)]
    assert [int(data.get(8 * k + 7)[-1]) for k in range(3)] == [1, 2, 3]
    (tmp_path / "m.bin").unlink()


def _remove_manifest(prefix: Path) -> None:
    Path(f"{prefix}.json").unlink()


# shuffle


def test_shuffle_depends_on_the_seed_and_not_on_memory(make_dataset, read, tmp_path: Path) -> None:
    documents = _random(500, 2)
    prefix = make_dataset("a", documents)
    for name, seed, memory in (("m", 1, 10**9), ("d", 1, 3000), ("o", 2, 10**9)):
        shuffle_dataset(prefix, tmp_path / name, NOWHERE, seed=seed, memory=memory, **QUIET)
    found = {name: read(tmp_path / name) for name in ("m", "d", "o")}
    assert found["m"] == found["d"]
    assert (tmp_path / "m.idx").read_bytes() == (tmp_path / "d.idx").read_bytes()
    assert found["m"] != found["o"]
    for result in found.values():
        assert sorted(result) == sorted(documents)
        assert result != documents
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]
    assert tokenizer_of(tmp_path / "d") is not None


def test_labels_are_shuffled_like_their_text(make_dataset, read, tmp_path: Path) -> None:
    documents = _random(200, 2)
    text = make_dataset("a", documents, "int32")
    labels = make_dataset("l", [[-100 if k % 3 else k for k in d] for d in documents], "int32", plain=True)
    shuffle_dataset(text, tmp_path / "ts", NOWHERE, seed=5, memory=10**9, **QUIET)
    shuffle_dataset(labels, tmp_path / "ls", NOWHERE, seed=5, memory=900, **QUIET)
    for document, label in zip(read(tmp_path / "ts"), read(tmp_path / "ls"), strict=True):
        assert label == [-100 if k % 3 else k for k in document]


def test_shuffle_tears_no_document_apart(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="several sequences"):
        shuffle_dataset(golden / "data/d_mcore/mc_i32_multiseq", tmp_path / "o", NOWHERE, seed=1, memory=9, **QUIET)


# mix


def test_mix_without_weights_uses_everything_once(make_dataset, read, tmp_path: Path) -> None:
    sets = {"a": _random(300, 2), "b": [*_random(100, 100, 1), []], "c": _random(1, 200, 2)}
    names = [str(make_dataset(name, documents)) for name, documents in sets.items()]
    mix_datasets(names, tmp_path / "m", NOWHERE, Recipe(), **QUIET)
    found = read(tmp_path / "m")
    assert Counter(map(tuple, found)) == Counter(tuple(d) for documents in sets.values() for d in documents)
    order = [d for d in found if d and 100 <= d[0] < 200]
    assert order == [d for d in sets["b"] if d]  # documents of a source keep their order
    halves = [sum(len(d) for d in found[: len(found) // 2] if d and d[0] >= 100), sum(map(len, sets["b"])) / 2]
    assert abs(halves[0] - halves[1]) < 60  # spread over the whole, not one behind the other


@pytest.mark.parametrize("by", ["tokens", "documents"])
def test_mix_has_the_shares_at_every_length(make_dataset, read, tmp_path: Path, by: str) -> None:
    names = [str(make_dataset(n, _random(3000, first, first))) for n, first in (("a", 2), ("b", 100), ("c", 180))]
    shares = {"a": 0.6, "b": 0.3, "c": 0.1}
    sources = [f"{name}={share}" for name, share in zip(names, shares.values(), strict=True)]
    mix_datasets(sources, tmp_path / "m", NOWHERE, Recipe(by=by, tokens=20_000), **QUIET)
    found = read(tmp_path / "m")
    assert sum(map(len, found)) == 20_000
    for part in (len(found), len(found) // 3):
        spent = Counter[str]()
        for document in found[:part]:
            if document:
                spent["a" if document[0] < 100 else "b" if document[0] < 180 else "c"] += (
                    len(document) if by == "tokens" else 1
                )
        for name, share in shares.items():
            assert spent[name] / spent.total() == pytest.approx(share, abs=0.02)


def test_mix_to_an_exact_number_of_documents_and_over_again(make_dataset, read, tmp_path: Path) -> None:
    names = [str(make_dataset("a", [[1]] * 10)), str(make_dataset("b", [[2]] * 10))]
    mix_datasets(names, tmp_path / "m", NOWHERE, Recipe(by="documents", documents=57, repeat=True), **QUIET)
    assert Counter(d[0] for d in read(tmp_path / "m")) == {1: 29, 2: 28}
    with pytest.raises(DataError, match=r"runs out.*--repeat"):
        mix_datasets(names, tmp_path / "n", NOWHERE, Recipe(documents=57), **QUIET)
    assert not list(tmp_path.glob("n.*"))


def test_mix_by_alpha(make_dataset, read, tmp_path: Path) -> None:
    names = [str(make_dataset("a", [[1] * 5] * 1600)), str(make_dataset("b", [[2] * 5] * 100))]
    mix_datasets(names, tmp_path / "m", NOWHERE, Recipe(alpha=0.5, tokens=500), **QUIET)
    counts = Counter(token for d in read(tmp_path / "m") for token in d)
    assert counts[1] == pytest.approx(400, abs=5)


def test_mix_over_many_windows(make_dataset, read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [str(make_dataset("a", _random(400, 2))), str(make_dataset("b", _random(90, 100)))]
    mix_datasets(names, tmp_path / "one", NOWHERE, Recipe(), **QUIET)
    monkeypatch.setattr("neox_shard.mix._WINDOW", {"tokens": 50, "documents": 3})
    mix_datasets(names, tmp_path / "many", NOWHERE, Recipe(), **QUIET)
    assert read(tmp_path / "one") == read(tmp_path / "many")


def test_mix_to_a_stream(run_command, make_dataset, tmp_path: Path) -> None:
    a, b = make_dataset("a", [[1]] * 30), make_dataset("b", [[2]] * 30)
    run = run_command(["neox-shard", "mix", f"{a}=1", f"{b}=1"])
    assert run.returncode == 0, run.stderr
    assert _stream(run.stdout) == [[1], [2]] * 30


def test_mix_refuses_senseless_recipes(make_dataset, tmp_path: Path) -> None:
    a, b = str(make_dataset("a", [[1]])), str(make_dataset("b", [[2]]))
    for sources in ([f"{a}=1", b], [f"{a}=-1", f"{b}=1"], [f"{a}=nan", f"{b}=1"], [f"{a}=0", f"{b}=0"]):
        with pytest.raises(UsageError):
            mix_datasets(sources, tmp_path / "m", NOWHERE, Recipe(), **QUIET)
    for wrong in ({"by": "bytes"}, {"tokens": 1, "documents": 1}, {"repeat": True}, {"alpha": -1.0}):
        with pytest.raises(UsageError):
            Recipe(**wrong)
    with pytest.raises(UsageError, match="--alpha"):
        mix_datasets([f"{a}=1"], tmp_path / "m", NOWHERE, Recipe(alpha=1.0), **QUIET)
    with pytest.raises(DataError, match="no tokens"):
        mix_datasets([f"{a}=1", f"{make_dataset('z', [])}=1"], tmp_path / "m", NOWHERE, Recipe(), **QUIET)


def test_a_name_may_look_like_a_weight(make_dataset, tmp_path: Path) -> None:
    prefix = make_dataset("lr=0.1", [[1]])
    assert parse_source(str(prefix)) == (prefix, None)
    assert parse_source(f"{prefix}=2") == (prefix, 2.0)
    assert parse_source("x=y") == (Path("x=y"), None)


@pytest.mark.parametrize(("text", "expected"), [("300M", 300_000_000), ("1.5k", 1500), ("7", 7), ("2B", 2 * 10**9)])
def test_counts(text: str, expected: int) -> None:
    assert parse_count(text, "--tokens") == expected


@pytest.mark.parametrize("text", ["", "x", "-3", "0", "1.5", "3X"])
def test_senseless_counts(text: str) -> None:
    with pytest.raises(UsageError, match="--tokens"):
        parse_count(text, "--tokens")


# split and join


def test_split_and_join_are_inverse(run_command, make_dataset, tmp_path: Path) -> None:
    prefix = make_dataset("a", _random(200, 2))
    before = Path(f"{prefix}.bin").read_bytes()
    run = run_command(["neox-shard", "split", str(prefix), "--bytes", "1k", "--json"])
    assert run.returncode == 0, run.stderr
    pieces = [Path(path) for path in json.loads(run.stdout)["pieces"]]
    last = -(-len(before) // 1000) - 1
    assert [path.name for path in pieces] == [f"a-{k:05d}-of-{last:05d}.bin" for k in range(last + 1)]
    assert b"".join(path.read_bytes() for path in pieces) == before
    Path(f"{prefix}.bin").unlink()
    assert run_command(["neox-shard", "join", str(prefix)]).returncode == 0
    assert check_pair(prefix).hashed
    assert run_command(["neox-shard", "join", str(prefix), "-o", str(tmp_path / "b")]).returncode == 0
    assert check_pair(tmp_path / "b").hashed
    assert read_manifest(tmp_path / "b") == read_manifest(prefix)


@pytest.mark.parametrize("name", [b"new\nline", b"raw\xff", b"back\\slash"])
def test_pieces_may_have_unusual_names(make_dataset, name: bytes) -> None:
    prefix = make_dataset(os.fsdecode(name), _random(50, 2))
    split_dataset(prefix, None, piece_bytes=100, **QUIET)
    Path(f"{prefix}.bin").unlink()
    join_pieces(prefix, None, **QUIET)
    assert check_pair(prefix).hashed


def test_what_split_cannot_write_is_said_before_any_work(make_dataset, tmp_path: Path) -> None:
    prefix = make_dataset("a", _random(200, 2))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a.idx").write_bytes(b"")
    with pytest.raises(OutputExists, match="a.idx"):
        split_dataset(prefix, folder, piece_bytes=100, **QUIET)
    assert [path.name for path in folder.iterdir()] == ["a.idx"]
    with MMapDataset(make_dataset("b", [[1] * 60_000])) as large, pytest.raises(UsageError, match="120000 pieces"):
        split_dataset(large.prefix, folder, piece_bytes=1, **QUIET)


def test_join_takes_the_name_of_a_file_for_its_prefix(make_dataset, tmp_path: Path) -> None:
    prefix = make_dataset("a", _random(50, 2))
    split_dataset(prefix, None, piece_bytes=100, **QUIET)
    join_pieces(prefix, tmp_path / "b.bin", **QUIET)
    assert check_pair(tmp_path / "b").hashed


def test_split_to_another_folder_takes_everything_along(make_dataset, tmp_path: Path) -> None:
    prefix = make_dataset("a", _random(50, 2))
    (tmp_path / "out").mkdir()
    split_dataset(prefix, tmp_path / "out", piece_bytes=100, **QUIET)
    join_pieces(tmp_path / "out/a", None, **QUIET)
    assert check_pair(tmp_path / "out/a").hashed
    with pytest.raises(OutputExists):
        split_dataset(prefix, tmp_path / "out", piece_bytes=100, **QUIET)
    empty = make_dataset("e", [])
    split_dataset(empty, tmp_path / "out", piece_bytes=100, **QUIET)
    join_pieces(tmp_path / "out/e", None, **QUIET)
    assert check_pair(tmp_path / "out/e").tokens == 0


def test_join_notices_missing_and_changed_pieces(make_dataset, tmp_path: Path) -> None:
    prefix = make_dataset("a", _random(200, 2))
    pieces = split_dataset(prefix, None, piece_bytes=1000, **QUIET)
    Path(f"{prefix}.bin").unlink()
    good = pieces[1].read_bytes()
    pieces[1].unlink()
    with pytest.raises(InputMissing, match="00001-of"):
        join_pieces(prefix, None, **QUIET)
    pieces[1].write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(IntegrityError, match="00001-of"):
        join_pieces(prefix, None, **QUIET)
    assert not Path(f"{prefix}.bin").exists()
    Path(f"{prefix}.sha256").unlink()  # as the published Pythia pieces have none
    pieces[1].write_bytes(good[:-2])
    with pytest.raises(DataError, match="describes"):
        join_pieces(prefix, None, **QUIET)
    pieces[1].write_bytes(good)
    join_pieces(prefix, None, **QUIET)
    assert check_pair(prefix).hashed
    with pytest.raises(InputMissing, match="no such pieces"):
        join_pieces(tmp_path / "nothing", None, **QUIET)


# view

CONFIG = """\
data_path: {prefix}
split: "90,10,0"
seed: 7
seq_length: 16
max_position_embeddings: 16
num_layers: 1
hidden_size: 8
num_attention_heads: 1
train_micro_batch_size_per_gpu: 4
train_iters: 10
eval_iters: 2
eval_interval: 5
"""


@pytest.fixture
def config(make_dataset, tmp_path: Path) -> Path:
    prefix = make_dataset("a", _random(300, 40))
    (tmp_path / "c.yml").write_text(CONFIG.format(prefix=prefix))
    return tmp_path / "c.yml"


def test_view_shows_what_training_reads(run_command, config: Path, tmp_path: Path) -> None:
    from libneox.config import load_config
    from libneox.data.splits import build_splits, samples_wanted

    train, valid, test = samples_wanted(10, 4, 5, 2)
    cfg = load_config([config])
    splits = build_splits(cfg, train_samples=train, valid_samples=valid, test_samples=test)
    run = run_command(["neox-shard", "view", str(config), "--steps", "2:5", "-o", str(tmp_path / "x.npy")])
    assert run.returncode == 0, run.stderr
    array = np.load(tmp_path / "x.npy", allow_pickle=False)
    assert array.dtype == np.int64
    np.testing.assert_array_equal(array, splits.train.batch(range(8, 20)))
    piped = run_command(["neox-shard", "view", str(config), "--split", "valid", "--samples", "0:7", "-o", "-"])
    np.testing.assert_array_equal(np.load(io.BytesIO(piped.stdout)), splits.valid.batch(range(7)))
    again = run_command(["neox-shard", "view", str(config), "--steps", "2:5", "-o", str(tmp_path / "x.npy")])
    assert again.returncode == 73


def test_view_decodes(run_command, config: Path, tokenizer) -> None:
    run = run_command(["neox-shard", "view", str(config), "--samples", "0:3", "--json"])
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["sample"] for line in lines] == [0, 1, 2]
    assert all(line["text"] == tokenizer.decode(line["tokens"]) for line in lines)
    text = run_command(["neox-shard", "view", str(config), "--samples", "0:3"])
    assert text.stdout.count(b"--- sample") == 3
    assert lines[0]["text"].encode() in text.stdout


@pytest.mark.parametrize("key", ["tokenizer=bytes", "tokenizer_type=CharLevelTokenizer"])
def test_view_decodes_with_the_tokenizer_of_the_configuration(run_command, config: Path, key: str) -> None:
    """Of data that have none beside them."""
    for name in ("a.json", "a.tokenizer.json"):
        (config.parent / name).unlink()
    command = ["neox-shard", "view", str(config), "--samples", "0:1", "--json"]
    assert run_command(command).returncode == 2
    run = run_command([*command, "--set", key])
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    shift = 2 if key == "tokenizer=bytes" else 0
    assert found["text"] == bytes(token - shift for token in found["tokens"]).decode()


def test_view_follows_a_run_that_was_made_longer(run_command, config: Path, tmp_path: Path) -> None:
    from libneox.config import load_config
    from libneox.data.splits import build_splits

    cfg = load_config([config])
    first = build_splits(cfg, train_samples=40)
    longer = build_splits(cfg, train_samples=4000, epochs=first.epochs)
    assert longer.notes
    step = begin_step(tmp_path / "run/step_10")
    files = dict([add_file(step, "trainer.json", json.dumps({"epochs": longer.epochs}).encode())])
    commit_step(step, tmp_path / "run/step_10", Manifest(step=10, files=files))
    command = ["neox-shard", "view", str(config), "--set", "train_iters=1000", "--samples", "3980:4000", "-o", "-"]
    run = run_command([*command, "--checkpoint", str(tmp_path / "run/latest")])
    assert run.returncode == 0, run.stderr
    np.testing.assert_array_equal(np.load(io.BytesIO(run.stdout)), longer.train.batch(range(3980, 4000)))
    plain = run_command(command)
    assert plain.stdout != run.stdout
    assert run_command([*command, "--checkpoint", str(tmp_path / "none")]).returncode == 66


SENSELESS = [
    "--samples 0:1 --json -o -",
    "--samples 0:1 --tokenizer bytes -o -",
    "",
    "--samples 1:2 --steps 1:2",
    "--samples x",
    "--split dev --samples 0:1",
    "--split test --samples 0:1",
]


@pytest.mark.parametrize("arguments", SENSELESS)
def test_view_refuses_senseless_requests(run_command, config: Path, arguments: str) -> None:
    run = run_command(["neox-shard", "view", str(config), *arguments.split()])
    assert run.returncode == 2, run.stderr
    assert run.stderr.count(b"\n") == 1

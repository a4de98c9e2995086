"""Data made elsewhere: the way out and back, every form it may come in, what is quarantined, any number of workers."""

from __future__ import annotations

import filecmp
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_npd.cli import preprocess as tool
from megatron_npd.cli import show as inspect_tool
from megatron_npd.config.settings import PackConfig, SelectConfig
from megatron_npd.data.packed_dataset import PackedDataset, Streams
from megatron_npd.data.packing import pack_selection
from megatron_npd.errors import UserError
from megatron_npd.log import get_logger
from megatron_npd.manifest import MANIFEST, is_sealed, read_manifest
from megatron_npd.quarantine import QUARANTINE_FILE
from megatron_npd.records import SAMPLES_FILE, BadRecord
from megatron_npd.selection.select import select_round
from megatron_npd.store import preprocess as preprocess_module
from megatron_npd.store.annotation_store import AnnotationStore
from megatron_npd.store.export import export_store
from megatron_npd.store.external import parse_sample
from megatron_npd.store.preprocess import preprocess
from tests.store.make_store import VOCAB_SIZE, make_store

LENGTHS = [(5, 9), (3, 40), (10, 22), (2, 2), (4, 12), (1, 1), (30, 2)]
K = 4


def assert_same_files(one: Path, other: Path, names: tuple[str, ...]) -> None:
    for name in names:
        assert filecmp.cmp(one / name, other / name, shallow=False), name


@pytest.mark.parametrize("top_k", [0, 1, 3, K, VOCAB_SIZE])
def test_a_store_exported_and_read_back_has_the_same_bytes(tmp_path: Path, top_k: int) -> None:
    store = make_store(tmp_path / "store", LENGTHS, top_k=top_k, shards=1)
    assert export_store(store, tmp_path / "out.parquet") == len(LENGTHS)
    preprocess(
        [tmp_path / "out.parquet"],
        tmp_path / "back",
        top_k=top_k,
        vocab_size=VOCAB_SIZE,
        policy_version="v0000",
        max_quarantined=0.0,
    )
    names = ("tokens.bin", "tokens.idx", SAMPLES_FILE, *(("teacher.bin", "teacher.idx") if top_k else ()))
    assert_same_files(store / "shard-00000", tmp_path / "back/shard-00000", names)


def test_chosen_samples_are_exported_as_numbers_that_any_tool_reads(tmp_path: Path) -> None:
    on_distribution = [index != 2 for index in range(len(LENGTHS))]
    store_dir = make_store(tmp_path / "store", LENGTHS, top_k=K, columns={"on_distribution": on_distribution})
    store = AnnotationStore(store_dir)
    assert export_store(store_dir, tmp_path / "out.parquet", samples=[3, 1]) == 2
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["sample_id"] for row in rows] == ["s000003", "s000001"]
    for row, index in zip(rows, (3, 1), strict=True):
        records = store.teacher(index)
        assert row["prompt_ids"] + row["response_ids"] == store.tokens(index).tolist()
        assert len(row["prompt_ids"]) == LENGTHS[index][0]
        assert row["top_ids"] == records["ids"].tolist()
        assert row["top_logprobs"] == records["logprobs"].astype(np.float32).tolist()
        assert row["log_tail"] == records["log_tail"].astype(np.float32).tolist()
        assert row["generator_logprobs"] == store.generator(index).tolist() and row["source"] == "student"
        assert row["teacher_loss"] == 0.5
    with pytest.raises(UserError, match="parquet"):
        export_store(store_dir, tmp_path / "out.csv")


def test_the_tool_exports_a_round_of_a_run_or_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(2):
        make_store(tmp_path / f"run/rounds/{index:04d}/annotations", LENGTHS[: 3 + index], top_k=K, seed=index)
    (tmp_path / "run/rounds/0002/annotations").mkdir(parents=True)  # not annotated yet
    for source, options, number in (
        ("run", [], 4),
        ("run", ["--round", "0"], 3),
        ("run/rounds/0000/annotations", [], 3),
    ):
        inspect_tool.main([str(tmp_path / source), "--export", str(tmp_path / "out.parquet"), *options])
        assert pq.read_metadata(tmp_path / "out.parquet").num_rows == number
    exported = capsys.readouterr().out.splitlines()
    rounds = [f"{number} samples of round" for number in (4, 3, 3)]
    assert len(exported) == 3 and all(map(str.startswith, exported, rounds))
    assert f"({tmp_path / 'run/rounds/0001/annotations'})" in exported[0]
    with pytest.raises(UserError, match="annotations of round 2"):
        inspect_tool.main([str(tmp_path / "run"), "--export", str(tmp_path / "out.parquet"), "--round", "2"])
    with pytest.raises(UserError, match="one of --sample and --export"):
        inspect_tool.main([str(tmp_path / "run")])


def full_logits(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=2.0, size=(n, VOCAB_SIZE))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def record(n: int = 6, columns: int = K, seed: int = 0, **fields: Any) -> dict[str, Any]:
    """A record with log-probs, most probable first; its response is of tokens that the teacher ranks 1st, 2nd, ..."""
    logprobs = log_softmax(full_logits(n, seed))
    order = np.argsort(-logprobs, axis=1)
    response = [int(order[i, i % (columns + 1)]) for i in range(n)]
    values = {
        "id": f"r{seed}",
        "prompt_ids": [1, 2, 3],
        "response_ids": response,
        "top_ids": order[:, :columns].tolist(),
        "top_logprobs": np.take_along_axis(logprobs, order[:, :columns], axis=1).tolist(),
    }
    return {name: value for name, value in (values | fields).items() if value is not None}


def parsed(value: Any, top_k: int = K):
    return parse_sample(value, top_k=top_k, vocab_size=VOCAB_SIZE, policy_version="data")


@pytest.mark.parametrize("top_k", [0, K])
def test_a_record_keeps_its_generators_log_probs_and_its_source(top_k: int) -> None:
    logprobs = [-0.1, -1e-9, -20.0, 0.0, -3.3, -7.0]
    sample = parsed(record(generator_logprobs=logprobs), top_k=top_k)
    assert sample.streams["generator"].tolist() == np.array(logprobs, np.float32).tolist()
    assert sample.row["source"] == "student" and sample.row["on_distribution"]
    others: list[dict[str, Any]] = [{"source": "teacher"}, {"on_distribution": False}]  # no policy lag is defined
    for fields in others:
        sample = parsed(record(generator_logprobs=logprobs, **fields), top_k=top_k)
        assert np.isnan(sample.streams["generator"]).all() and not sample.row["on_distribution"]
        assert sample.row["source"] == fields.get("source", "student")
    assert parsed(record(source="teacher"), top_k=top_k).row["source"] == "teacher"


def teacher_bytes(value: Any) -> bytes:
    return parsed(value).streams["teacher"].tobytes()


def test_a_record_becomes_the_records_of_the_store() -> None:
    logprobs = log_softmax(full_logits(6))
    sample = parsed(record())
    teacher = sample.streams["teacher"]
    for i in range(6):
        ranked = sorted(range(VOCAB_SIZE), key=lambda token: -logprobs[i, token])
        assert teacher["ids"][i].tolist() == ranked[:K]
        np.testing.assert_array_equal(teacher["logprobs"][i], logprobs[i, ranked[:K]].astype(np.float16))
        tail = math.log(sum(math.exp(logprobs[i, token]) for token in ranked[K:]))
        assert teacher["log_tail"][i] == pytest.approx(tail, abs=2e-3)
    assert np.isnan(sample.streams["generator"]).all() and not sample.row["on_distribution"]
    assert sample.row["source"] == "dataset" and not teacher["reserved"].any()
    assert sample.tokens.tolist() == [1, 2, 3, *record()["response_ids"]] and sample.row["prompt_len"] == 3
    own = sample.row["teacher_logprobs"]  # the fifth token is none of the four
    assert np.flatnonzero(np.isnan(own)).tolist() == [4] and math.isnan(sample.row["teacher_loss"])
    assert own[1] == np.float32(logprobs[1, record()["response_ids"][1]])


def test_logits_unsorted_columns_and_a_wider_top_k_give_the_same_records() -> None:
    expected = teacher_bytes(record())
    logits = full_logits(6)
    wide = record(columns=9)
    shuffled = np.random.default_rng(1).permutation(9)
    ids = np.array(wide["top_ids"])[:, shuffled]
    forms = {
        "more columns, in any order": {"top_logprobs": np.array(wide["top_logprobs"])[:, shuffled].tolist()},
        "logits": {
            "top_logits": np.take_along_axis(logits, ids, axis=1).tolist(),
            "logsumexp": np.log(np.exp(logits).sum(axis=1)).tolist(),
        },
    }
    response = record()["response_ids"]
    for name, fields in forms.items():
        plain = {"prompt_ids": [1, 2, 3], "response_ids": response, "top_ids": ids.tolist()}
        assert teacher_bytes(plain | fields) == expected, name
    everything = {"top_ids": [list(range(VOCAB_SIZE))] * 6, "top_logits": logits.tolist()}
    joined = {"token_ids": [1, 2, 3, *response], "prompt_len": 3}
    assert teacher_bytes(joined | everything) == expected
    assert np.all(parsed(joined | everything, top_k=VOCAB_SIZE).streams["teacher"]["log_tail"] == -30)
    given = record(
        columns=9, log_tail=np.log1p(-np.exp(wide["top_logprobs"]).sum(axis=1)).tolist(), response_ids=response
    )
    assert teacher_bytes(given) == expected


def answer(kind: str, source: dict[str, Any]) -> dict[str, Any]:
    """A server's reply to a request for the log-probs of a whole text, as vLLM and as OpenAI's echo write it."""
    logprobs = log_softmax(full_logits(len(source["response_ids"])))
    tokens = source["prompt_ids"] + source["response_ids"]
    tables: list[dict[str, float] | None] = [None, {"5": -1.0}, {"6": -1.0}]
    for token, row in zip(source["response_ids"], logprobs, strict=True):
        top = [token, *np.argsort(-row)[:K].tolist()]  # the token itself first, as vLLM does
        tables.append({str(other): float(row[other]) for other in top})
    if kind == "vllm":
        positions = [t and {name: {"logprob": value, "rank": 1} for name, value in t.items()} for t in tables]
        choice = {"index": 0, "text": "x", "prompt_logprobs": positions, "prompt_token_ids": tokens}
        return {"id": "r0", "object": "text_completion", "prompt_len": 3, "choices": [choice]}
    if kind == "chat":
        positions = [t and {name: {"logprob": value} for name, value in t.items()} for t in tables]
        reply = {"choices": [{"message": {}}], "prompt_logprobs": positions, "prompt_token_ids": tokens}
        return {"id": "r0", "prompt_len": 3, "response": reply}
    named = [t and {f"token_id:{name}": value for name, value in t.items()} for t in tables]
    generated = {"token_id:9": -0.5}  # by a server that insists on a token of its own
    names = [f"token_id:{token}" for token in [*tokens, 9]]
    echo = {"tokens": names, "token_logprobs": [], "top_logprobs": [*named, generated]}
    usage = {"prompt_tokens": len(tokens), "completion_tokens": 1}
    return {"id": "r0", "prompt_len": 3, "response": {"choices": [{"text": "x", "logprobs": echo}], "usage": usage}}


@pytest.mark.parametrize("kind", ["vllm", "chat", "echo"])
def test_saved_answers_of_servers_become_the_same_records(kind: str) -> None:
    source = record()
    logprobs = log_softmax(full_logits(6))
    sample = parsed(answer(kind, source))
    assert sample.streams["teacher"].tobytes() == teacher_bytes(source)
    own = [logprobs[i, token] for i, token in enumerate(source["response_ids"])]  # known for every token here
    np.testing.assert_allclose(sample.row["teacher_logprobs"], own, rtol=1e-6)
    assert sample.row["teacher_loss"] == pytest.approx(-np.mean(own)) and sample.row["prompt_id"] == "r0"
    assert parsed(answer(kind, source), top_k=0).tokens.tolist() == sample.tokens.tolist()


def changed(change: Callable[[dict[str, Any]], Any], value: dict[str, Any]) -> dict[str, Any]:
    change(value)
    return value


def set_at(name: str, *places: int | str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        target = value[name]
        for place in places[:-1]:
            target = target[place]
        target[places[-1]] = to

    return change


def unlikely_token(value: dict[str, Any]) -> None:
    """The response's second token, none of the teacher's most likely, has no probability."""
    position, own = value["choices"][0]["prompt_logprobs"][4], str(value["choices"][0]["prompt_token_ids"][4])
    if len(position) == K:  # it was among them
        position[next(name for name in map(str, range(VOCAB_SIZE)) if name not in position)] = {"logprob": -20.0}
    position[own]["logprob"] = -9999.0


BAD: list[tuple[str, Any]] = [
    ("wrong_type", [1, 2]),
    ("missing_field", {"prompt_ids": [1]}),
    ("no_prompt", record(prompt_ids=[])),
    ("empty_response", record(response_ids=[], top_ids=[], top_logprobs=[])),
    ("wrong_type", record(prompt_ids=[1.5])),
    ("wrong_type", record(prompt_ids="123")),
    ("wrong_type", record(prompt_ids=[[1], [2, 3]])),
    ("wrong_type", record(prompt_ids=[True, False])),
    ("token_outside_vocabulary", record(prompt_ids=[VOCAB_SIZE])),
    ("token_outside_vocabulary", record(response_ids=[-1] * 6)),
    ("token_outside_vocabulary", record(prompt_ids=[2**40])),
    ("no_prompt_len", {"token_ids": [1, 2]}),
    ("length_mismatch", record(response_ids=[1] * 5)),
    ("length_mismatch", changed(lambda value: value["top_logprobs"].pop(), record())),
    ("wrong_type", changed(lambda value: value["top_ids"][2].pop(), record())),
    ("too_few_ids", record(columns=K - 1)),
    ("no_logsumexp", record(top_logprobs=None, top_logits=record()["top_logprobs"])),
    ("teacher_id_outside_vocabulary", changed(set_at("top_ids", 2, 1, to=VOCAB_SIZE), record())),
    ("teacher_id_outside_vocabulary", changed(set_at("top_ids", 2, 1, to=2**32 + 1), record())),
    ("teacher_id_twice", changed(set_at("top_ids", 2, 1, to=record()["top_ids"][2][0]), record())),
    ("teacher_logprob_undefined", changed(set_at("top_logprobs", 2, 1, to=math.nan), record())),
    ("teacher_logprob_undefined", changed(set_at("top_logprobs", 2, 3, to=-math.inf), record())),
    ("teacher_logprob_undefined", changed(set_at("top_logprobs", 2, 0, to=0.5), record())),
    ("teacher_logprob_undefined", changed(set_at("top_logprobs", 2, 3, to=-9999.0), record())),  # what vLLM writes
    ("sampled_logprob_undefined", record(teacher_logprobs=[-1.0] * 5 + [-9999.0])),
    ("sampled_logprob_undefined", record(teacher_logprobs=[-1.0] * 5 + [-math.inf])),
    ("sampled_logprob_undefined", record(teacher_logprobs=[-1.0] * 5 + [0.5])),
    ("sampled_logprob_undefined", changed(unlikely_token, answer("vllm", record()))),
    ("teacher_mass", changed(set_at("top_logprobs", 2, 0, to=0.0), record())),
    ("teacher_mass", record(log_tail=[-9.0] * 6)),
    ("length_mismatch", record(log_tail=[-1.0] * 5)),
    ("generator_logprob_undefined", record(generator_logprobs=[0.5] * 6)),
    ("generator_logprob_undefined", record(generator_logprobs=[-1.0] * 5 + [-9999.0])),
    ("generator_logprob_undefined", record(generator_logprobs=[-1.0] * 5 + [-math.inf], on_distribution=False)),
    ("wrong_type", record(generator_logprobs=["a"] * 6)),
    ("wrong_type", record(on_distribution="yes")),
    ("wrong_type", record(source="somebody")),
    ("wrong_type", record(path=-1)),
    ("wrong_type", record(finish_reason="tired")),
    ("wrong_type", record(id={})),
    ("wrong_type", record(teacher_loss="low")),
    ("policy_version", record(policy_version="v0007")),
    ("no_choice", {"choices": []}),
    ("no_token_ids", {"choices": [{"text": "x"}], "prompt_len": 1}),
    ("no_prompt_len", {"choices": [{"prompt_token_ids": [1, 2]}]}),
    ("no_prompt_logprobs", {"choices": [{"prompt_token_ids": [1, 2]}], "prompt_len": 1}),
    ("no_prompt_logprobs", changed(set_at("choices", 0, "prompt_logprobs", 4, to=None), answer("vllm", record()))),
    ("no_token_ids", changed(set_at("choices", 0, "prompt_logprobs", 4, to={"the": -1}), answer("vllm", record()))),
    ("no_prompt_tokens", changed(set_at("response", "usage", to=None), answer("echo", record()))),
    ("no_prompt_logprobs", changed(set_at("choices", 0, "prompt_logprobs", 4, to={"5": -1}), answer("vllm", record()))),
    ("wrong_type", changed(set_at("choices", 0, "prompt_logprobs", 4, to={"5": "x"}), answer("vllm", record()))),
]


@pytest.mark.parametrize(("reason", "value"), BAD, ids=[f"{index}-{reason}" for index, (reason, _) in enumerate(BAD)])
def test_what_no_teacher_can_have_left_is_refused(reason: str, value: Any) -> None:
    with pytest.raises(BadRecord) as error:
        parsed(json.loads(json.dumps(value)))
    assert error.value.reason == reason, str(error.value)


@pytest.mark.parametrize("wide", [False, True], ids=["lists", "fixed lists"])
def test_parquet_rows_of_any_list_type_are_read_as_jsonl_lines_are(tmp_path: Path, wide: bool) -> None:
    good = [record(seed=seed) for seed in range(3)]
    ragged = changed(lambda value: value["top_ids"][2].pop(), record(seed=3))
    nulls = changed(set_at("top_logprobs", 2, 1, to=None), record(seed=4))
    values = good if wide else [*good, ragged, nulls]
    kinds = {"top_ids": pa.list_(pa.list_(pa.int64(), K)), "top_logprobs": pa.list_(pa.list_(pa.float64(), K))}
    table = pa.Table.from_pylist(values)
    for name, kind in kinds.items() if wide else ():
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=2)
    options: dict[str, Any] = {"top_k": K, "vocab_size": VOCAB_SIZE, "max_quarantined": 0.5, "shard_size": 2}
    rows = preprocess([tmp_path / "in.parquet"], tmp_path / "rows", **options)
    lines = preprocess([write_jsonl(tmp_path / "in.jsonl", values)], tmp_path / "lines", **options)
    assert rows.counts == lines.counts and rows.counts["kept"] == 3
    for shard in sorted((tmp_path / "rows").glob("shard-*")):
        assert_same_files(shard, tmp_path / "lines" / shard.name, ("tokens.bin", "teacher.bin", SAMPLES_FILE))


def write_jsonl(path: Path, values: list[Any]) -> Path:
    lines = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in values]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_records_shifted_by_a_token_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a tool leaves that writes the distribution *after* a token in place of the one that predicts it."""
    caplog.set_level("INFO")
    get_logger().addHandler(caplog.handler)
    try:
        for name in ("right", "shifted"):
            values = [record(seed=seed) for seed in range(8)]
            for value in values if name == "shifted" else ():
                for field in ("top_ids", "top_logprobs"):
                    value[field] = [*value[field][1:], value[field][0]]
            source = write_jsonl(tmp_path / f"{name}.jsonl", [*values, values[0]])
            manifest = preprocess([source], tmp_path / name, top_k=K, vocab_size=VOCAB_SIZE)
            assert manifest.counts["response_tokens"] == 48
    finally:
        get_logger().removeHandler(caplog.handler)
    (warning,) = [line.getMessage() for line in caplog.records if line.levelname == "WARNING"]
    assert f"{tmp_path / 'shifted'}: only" in warning and "shifted by a token" in warning
    logged = [line.getMessage() for line in caplog.records if line.levelname == "INFO"]
    assert all("8 of 9 records in" in line and "; duplicates merged: 1 (see" in line for line in logged)


def test_bad_lines_are_set_aside_by_number_and_repeated_ones_merged(tmp_path: Path) -> None:
    good = [record(seed=seed) for seed in range(8)]
    lines = [good[0], b"{bad", good[1], b"", b"\xff{}", good[0], good[2], {"id": 1}, *good[3:], good[4]]
    source = write_jsonl(tmp_path / "in.jsonl", lines)
    options: dict[str, Any] = {"top_k": K, "vocab_size": VOCAB_SIZE, "shard_size": 5}
    manifest = preprocess([source], tmp_path / "out", **options, max_quarantined=0.3)

    counts = manifest.counts
    assert (counts["in"], counts["kept"], counts["pending"], counts["response_tokens"]) == (13, 8, 0, 48)
    assert counts["quarantined"] == {"bad_json": 1, "duplicate": 2, "missing_field": 1, "not_utf8": 1}
    entries = [
        json.loads(line)
        for file in sorted((tmp_path / "out").glob(f"shard-*/{QUARANTINE_FILE}"))
        for line in file.read_text().splitlines()
    ]
    assert [(entry["line"], entry["reason"]) for entry in entries] == [
        (2, "bad_json"),
        (5, "not_utf8"),
        (6, "duplicate"),
        (8, "missing_field"),
        (14, "duplicate"),
    ]
    store = AnnotationStore(tmp_path / "out")
    assert store.metadata("prompt_id")["prompt_id"].to_pylist() == [f"r{seed}" for seed in range(8)]
    assert all(store.teacher(seed).tobytes() == teacher_bytes(good[seed]) for seed in range(8))

    lines = [b'{"id": NaN}', b'{"id": 1e999}', b"[" * 100_000, b"\x00", b'"' + b"x" * 1_000_000 + b'"', *lines]
    many = preprocess([write_jsonl(tmp_path / "many.jsonl", lines)], tmp_path / "many", **options, max_quarantined=0.7)
    assert many.counts["kept"] == 8 and many.counts["in"] == 18

    with pytest.raises(UserError, match="max_quarantined"):
        preprocess([source], tmp_path / "strict", **options, max_quarantined=0.1)
    assert not is_sealed(tmp_path / "strict")
    write_jsonl(source, [good[0], record(seed=1, id="r0")])
    with pytest.raises(UserError, match=r"got id 'r0' with path 0 on line 1 of \S+ and, .* on line 2 of"):
        preprocess([source], tmp_path / "ids", **options)
    with pytest.raises(UserError, match="usable record"):
        preprocess([write_jsonl(source, [])], tmp_path / "none", **options)


def test_several_responses_under_one_id_are_named_as_the_user_knows_them(tmp_path: Path) -> None:
    """Over shards and files, behind bad lines and repetitions: the user's id, both lines and what to do."""
    one = [record(seed=0, id="a"), b"{", record(seed=1, id="b"), record(seed=0, id="a"), record(seed=2, id="c")]
    first = write_jsonl(tmp_path / "one.jsonl", one)
    second = write_jsonl(tmp_path / "two.jsonl", [record(seed=3, id="d"), b"{", record(seed=4, id="b")])
    options: dict[str, Any] = {"top_k": K, "vocab_size": VOCAB_SIZE, "shard_size": 2, "max_quarantined": 1.0}
    for _ in range(2):  # again: from the shards that were sealed
        with pytest.raises(UserError) as error:
            preprocess([first, second], tmp_path / "out", **options)
        words = f"got id 'b' with path 0 on line 3 of {first} and, with other content, on line 3 of {second}; give "
        assert words in str(error.value)
    write_jsonl(second, [record(seed=3, id="d"), b"{", record(seed=4, id="b", path=1)])
    assert preprocess([first, second], tmp_path / "paths", **options).counts["kept"] == 5


def tree(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


def test_bytes_are_the_same_for_any_number_of_workers_and_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [
        write_jsonl(tmp_path / "a.jsonl", [record(seed=seed) for seed in range(7)] + [b"{"]),
        tmp_path / "b.parquet",
    ]
    store = make_store(tmp_path / "store", LENGTHS, top_k=K)
    export_store(store, sources[1])
    options: dict[str, Any] = {"top_k": K, "vocab_size": VOCAB_SIZE, "shard_size": 3, "max_quarantined": 0.6}
    preprocess(sources, tmp_path / "one", **options)
    assert read_manifest(tmp_path / "one").counts["quarantined"] == {"bad_json": 1, "policy_version": len(LENGTHS)}

    preprocess(sources, tmp_path / "two", **options, workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")

    real, done = preprocess_module._write_shard, []

    def killed(*arguments: Any) -> dict[str, Any]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments)

    monkeypatch.setattr(preprocess_module, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        preprocess(sources, tmp_path / "three", **options)
    monkeypatch.setattr(preprocess_module, "_write_shard", real)
    stamp = (tmp_path / "three/shard-00001" / MANIFEST).stat().st_mtime_ns
    preprocess(sources, tmp_path / "three", **options)
    assert (tmp_path / "three/shard-00001" / MANIFEST).stat().st_mtime_ns == stamp
    assert tree(tmp_path / "one") == tree(tmp_path / "three")


def test_the_store_is_selected_packed_and_trained_on(tmp_path: Path) -> None:
    losses: dict[str, Any] = {
        "teacher_loss": 0.9,
        "teacher_loss_unconditional": 1.0,
        "student_loss": 0.4,
        "student_loss_unconditional": 1.0,
    }
    source = write_jsonl(tmp_path / "in.jsonl", [record(seed=seed, **losses) for seed in range(6)])
    arguments = ["--input", str(source), "--out", str(tmp_path / "annotations"), "--top-k", str(K)]
    tool.main([*arguments, "--vocab-size", str(VOCAB_SIZE)])
    select_round(tmp_path / "annotations", tmp_path / "selection", SelectConfig(tau=1.0))
    cfg = PackConfig(seq_length=64, segment_align=8)
    pack_selection(tmp_path / "annotations", tmp_path / "selection", tmp_path / "packs", cfg)
    batch = PackedDataset(tmp_path / "packs", seed=0, streams=Streams()).batch([0, 1]).to("cpu")
    assert batch.teacher_ids is not None and batch.loss_mask is not None and int(batch.loss_mask.sum()) == 36
    with pytest.raises(UserError, match="one of vocab_size and hf_model"):
        tool.main(arguments)
    with pytest.raises(UserError, match=r"\.jsonl or \.parquet"):
        tool.main([*arguments[2:], "--input", str(tmp_path / "in.csv"), "--vocab-size", "9"])


def test_texts_become_a_store_of_tokens(tmp_path: Path, tiny_model_dir: Path) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", [{"prompt": "How many?", "response": "#### 3"}])
    out = tmp_path / "annotations"
    tool.main(["--input", str(source), "--out", str(out), "--text", "--hf-model", str(tiny_model_dir)])
    store = AnnotationStore(out)
    assert (len(store), store.top_k, store.policy_version) == (1, 0, "data")
    with pytest.raises(UserError, match="hf_model"):
        tool.main(["--input", str(source), "--out", str(out), "--text", "--vocab-size", "9"])

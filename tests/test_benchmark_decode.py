"""benchmarks.decode: what needs no GPU: the count of bytes, the check, loops, the record, tiles."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import pallas_kernels
from benchmarks import decode, record, steps
from benchmarks.problems import Shape
from nsa_jax import NSAConfig, ops
from nsa_jax.testing import SMALL
from pallas_kernels.flash import Tile
from pallas_kernels.tiles import Tiles, rule
from train.config import PRESETS

pytestmark = pytest.mark.usefixtures("quick_compilation")

ONE_LAYER = dataclasses.replace(PRESETS["tiny"][1].model, num_layers=1, nsa=NSAConfig())
SHAPE = Shape(batch=2, heads=4, kv_heads=2, head_dim=8, value_head_dim=8, dtype="float32")


def test_tokens_read_by_hand():
    assert steps.tokens_read(NSAConfig(), 65536) == 4095 + 1024 + 512
    assert steps.tokens_read(NSAConfig(), 100) == 5 + 100 + 100
    # Compressed tokens 0 .. 23; of blocks of 16 the first, two local ones, of which the last has 5 tokens, and another.
    assert steps.tokens_read(SMALL, 101) == 24 + 3 * 16 + 5 + 20
    assert steps.bytes_read(100, SHAPE) == 100 * 2 * 2 * 16 * 4


def test_small_problems_are_read_in_turn():
    assert steps.copies_for(11_500_000) == 14 and steps.copies_for(280_000_000) == 1 and steps.copies_for(1) == 16


def test_a_loop_goes_through_its_problems():
    problems = tuple(steps.draw(seed, shape=SHAPE, length=40, config=SMALL) for seed in range(2))

    def attend(step):
        return steps.attend(step, config=SMALL, implementation="xla")

    loop = steps.compile_loop(attend, problems[0], 2)
    assert loop.steps == 20
    for got, problem in zip(loop.compiled(*problems), problems, strict=True):
        np.testing.assert_allclose(got, attend(problem), rtol=1e-5, atol=1e-6)
    entry = loop.time(problems)
    assert entry["ms"] > 0 and entry["calls"] == 20 and entry["in_loop"] and entry["temporary_bytes"] >= 0


def test_the_model_decodes_in_place():
    """The caches are among what is aliased, and of what there is besides not one of their large arrays could be a copy."""
    compiled = steps.compile_model(ONE_LAYER, 257, batch=2, length=16384)
    entry = compiled.time()
    assert entry["ms"] > 0 and entry["tokens_per_second"] == pytest.approx(2e3 / entry["ms"])
    one_array = 16384 * 2 * 2 * 32 * 4
    assert entry["aliased_bytes"] >= entry["cache_bytes"] > 2 * one_array
    assert entry["temporary_bytes"] < one_array / 2


def test_a_model_decodes_more_tokens_than_none():
    with pytest.raises(
        ValueError, match="length=19 must be at least 20: so many tokens are decoded before a cache is full"
    ):
        steps.compile_model(ONE_LAYER, 257, batch=1, length=19)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The CPU stands for a GPU, and something that is no attention, but compiles at once, for kernels and reference."""

    def cheap(query, compressed, selected, *rest, config, scale):
        return query[..., : selected.value.shape[-1]]

    for name in ("xla", "pallas"):
        monkeypatch.setitem(ops.IMPLEMENTATIONS, name, ops.IMPLEMENTATIONS[name]._replace(decode_step=cheap))
    monkeypatch.setattr(record, "gpu", lambda program: jax.devices()[0])
    monkeypatch.setattr(pallas_kernels, "why_not_here", lambda: None)
    monkeypatch.setattr(steps, "CHECKED", (80, 31, 1))
    monkeypatch.setattr(steps, "MOST_COPIES", 1)


SIZES = [
    "--lengths",
    "96",
    "--batches",
    "1",
    "--heads",
    "2",
    "--kv-heads",
    "1",
    "--head-dim",
    "8",
    "--value-head-dim",
    "8",
]


def test_a_run_writes_its_record(as_on_a_gpu, tmp_path: Path, capsys):
    pytest.importorskip("matplotlib", reason="figures are part of nsa-jax[train]")
    path, picture = tmp_path / "out" / "record.json", tmp_path / "figure.png"
    assert decode.main([*SIZES, "--no-model", "--json", str(path), "--plot", str(picture)]) == 0
    written = json.loads(path.read_text())
    assert written.keys() >= {*record.FIELDS, "options", "config", "check", "results"}
    [row] = written["results"]
    assert row["batch"] == 1 and row["length"] == 96 and row["copies"] == 1
    assert row["bytes"] == steps.tokens_read(NSAConfig(), 96) * 16 * 2 and row["full_bytes"] == 96 * 16 * 2
    assert row["nsa"]["ms"] > 0 and row["terabytes_per_second"] == pytest.approx(row["bytes"] / row["nsa"]["ms"] / 1e9)
    # There is no cuDNN here: its entry is an error, and the run goes on.
    assert "error" in row["full"] and "ratio" not in row
    assert picture.stat().st_size > 1000
    said = capsys.readouterr().out
    assert "correct at [80, 31, 1] tokens" in said and "failed: B=1 96 tokens, full" in said


def test_wrong_kernels_have_no_time(as_on_a_gpu, monkeypatch, tmp_path: Path, capsys):
    right = ops.IMPLEMENTATIONS["xla"]
    wrong = right._replace(decode_step=lambda *arguments, **more: 1.1 * right.decode_step(*arguments, **more))
    monkeypatch.setitem(ops.IMPLEMENTATIONS, "pallas", wrong)
    path = tmp_path / "record.json"
    files = ["--json", str(path), "--plot", str(tmp_path / "figure.png")]
    assert decode.main([*SIZES, "--no-model", *files]) == 1
    assert "so they have no time" in capsys.readouterr().err
    assert json.loads(path.read_text())["results"] == []


@pytest.mark.parametrize("sequence", [0, 2])
def test_kernels_that_are_wrong_at_a_length_that_is_timed(as_on_a_gpu, monkeypatch, tmp_path: Path, capsys, sequence):
    """Right for the sequences of the first check, up to 80 tokens, and, at 96, for all but the first or the last of three."""
    right = ops.IMPLEMENTATIONS["xla"]

    def partly(query, compressed, selected, *rest, **more):
        out = right.decode_step(query, compressed, selected, *rest, **more)
        return out.at[sequence].multiply(1.1) if selected.key.shape[1] > 80 else out

    monkeypatch.setitem(ops.IMPLEMENTATIONS, "pallas", right._replace(decode_step=partly))
    path = tmp_path / "record.json"
    files = ["--json", str(path), "--plot", str(tmp_path / "figure.png")]
    assert decode.main([*SIZES, "--batches", "3", "--no-model", *files]) == 1
    written, said = json.loads(path.read_text()), capsys.readouterr()
    assert "correct at [80, 31, 1] tokens" in said.out and "so they have no time" in said.err
    assert written["results"] == [] and written["wrong"].startswith("decode step: error ")


def test_a_model_is_timed_beside(as_on_a_gpu, monkeypatch, tmp_path: Path, capsys):
    """And of a cache too short for its steps the reason stands there."""
    of_base = dataclasses.replace(PRESETS["base"][1], model=ONE_LAYER)
    monkeypatch.setitem(PRESETS, "base", (PRESETS["base"][0], of_base))
    path = tmp_path / "record.json"
    arguments, picture = [*SIZES, "--lengths", "16", "96", "--batches", "2"], tmp_path / "figure.svg"
    assert decode.main([*arguments, "--json", str(path), "--plot", str(picture)]) == 0
    assert "whole model with NSA, 2 sequences" in picture.read_text()
    short, row = json.loads(path.read_text())["results"]
    assert row["errors_of_sequences"] == [0.0, 0.0]
    model = row["model"]
    assert model["ms"] > 0 and model["tokens_per_second"] == pytest.approx(2e3 / model["ms"])
    # Keys and values of 96 tokens, of 5 compressed ones, of the window and of what is not compressed yet; lengths.
    assert model["cache_bytes"] == 2 * (96 + 5 + 512 + 32) * 2 * 2 * 32 * 4 + 2 * 4 <= model["aliased_bytes"]
    said = capsys.readouterr().out
    assert f", model {model['ms'] * 1e3:.1f}\n" in said and f"{model['tokens_per_second']:.0f}\n" in said
    assert "failed: B=2 16 tokens, model: ValueError: length=16 must be at least 20" in said
    assert "tokens_per_second" not in short["model"] and short["nsa"]["ms"] > 0


def test_tuning_writes_the_fastest(as_on_a_gpu, monkeypatch, tmp_path: Path):
    """A candidate that gives another result is left out, and so is one that fails; what is written is what was best."""
    candidates = {"decode_programs": (8, 16), "decode_choice": ((0, 16, 1, 1), (0, 32, 1, 1))}
    monkeypatch.setattr(decode, "CANDIDATES", candidates)

    def with_tiles(tiles, *, config, scale):
        if tiles.decode_programs == 8:
            return lambda step: 2 * steps.attend(step, config=config)
        if tiles.decode_choice.keys == 16:
            raise ValueError("does not compile")
        return lambda step: steps.attend(step, config=config)

    monkeypatch.setattr(steps, "with_tiles", lambda *a, **k: lambda step: with_tiles(*a, **k)(step))
    path = tmp_path / "tiles.json"
    assert decode.main([*SIZES, "--dtype", "bfloat16", "--tune", "--json", str(path)]) == 0
    [entry] = json.loads(path.read_text())
    assert entry["group"] == 2 and entry["dtype"] == "bfloat16" and entry["length"] == 96
    assert entry["tiles"].keys() == candidates.keys()
    safe = rule("bfloat16", 8, 8, 2)
    assert entry["tiles"]["decode_programs"] in (16, safe.decode_programs)
    assert entry["tiles"]["decode_choice"] in ([0, 32, 1, 1], list(safe.decode_choice))


def test_every_knob_of_decoding_has_candidates():
    knobs = {field.name for field in dataclasses.fields(Tiles) if field.name.startswith("decode")}
    assert knobs == decode.CANDIDATES.keys()
    for knob, candidates in decode.CANDIDATES.items():
        assert len(set(candidates)) == len(candidates) > 3
        assert all(isinstance(x, int) if knob.endswith("programs") else Tile(*x) for x in candidates)


def test_no_gpu_and_no_problem_are_said(capsys):
    assert decode.main(["--lengths", "64"]) == 2
    assert "benchmarks.decode needs a GPU" in capsys.readouterr().err
    assert decode.main(["--batches", "0"]) == 2
    assert "must each hold positive numbers" in capsys.readouterr().err


def test_heads_of_two_sizes_are_not_cudnns():
    shape = dataclasses.replace(SHAPE, value_head_dim=4)
    problem = jax.eval_shape(lambda: steps.draw(0, shape=shape, length=40, config=SMALL))
    with pytest.raises(ValueError, match="cuDNN reads heads of one size, not 8 and 4"):
        steps.full_attention(problem, scale=1.0)

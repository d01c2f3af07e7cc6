"""benchmarks/: what needs no GPU: the rule of measurement, inputs, checks, ratios, records and the table of tiles."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import pallas_kernels
from benchmarks import attention, checks, kernels, one_length, problems, record, report, timing, tune
from nsa_jax import NSAConfig, ops, overlap
from nsa_jax.testing import assert_best_blocks
from pallas_kernels import tiles
from pallas_kernels.flash import Tile
from pallas_kernels.tiles import TABLE, Tiles
from tests.programs import QUICK, equations

pytestmark = pytest.mark.usefixtures("quick_compilation", "quick_reference")


@pytest.fixture(scope="module")
def quick_reference():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "REFERENCE", checks.REFERENCE | QUICK)
        yield


SHAPE = problems.Shape(batch=1, heads=4, kv_heads=2, head_dim=8, value_head_dim=8, dtype="float32")
SMALL = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=20)


# ---------------------------------------------------------------------------------------------------------------- timing


class Clock:
    """Time that passes only where a call spends it; counts calls."""

    def __init__(self, seconds: float):
        self.seconds, self.now, self.calls = seconds, 0.0, 0

    def __call__(self) -> float:
        return self.now

    def call(self) -> int:
        self.now, self.calls = self.now + self.seconds, self.calls + 1
        return self.calls


@pytest.mark.parametrize(
    ("seconds", "calls", "rounds"),
    [(0.010, 5, 5), (0.04, 1, 5), (0.001, 50, 5), (0.0005, 50, 5), (2.0, 1, 3)],
)
def test_measure_queues_as_many_calls_as_fill_a_round(seconds, calls, rounds):
    clock = Clock(seconds)
    found = timing.measure(clock.call, clock=clock)
    assert (found.calls, len(found.rounds_ms), found.in_loop) == (calls, rounds, False)
    assert found.ms == pytest.approx(seconds * 1e3)
    # One call to warm up and one to see how long it is.
    assert clock.calls == 2 + calls * rounds


def test_measure_is_the_median_of_the_rounds():
    clock = Clock(0.05)
    spent = iter([0.05, 0.05, 0.05, 0.09, 0.05, 0.07, 0.06])

    def call() -> None:
        clock.now += next(spent)

    assert timing.measure(call, clock=clock).ms == pytest.approx(60)


def test_short_calls_are_measured_in_a_loop():
    clock, asked = Clock(50e-6), []

    def loop(calls):
        asked.append(calls)

        def looped() -> None:
            clock.now += calls * 30e-6

        return looped

    found = timing.measure(clock.call, loop=loop, clock=clock)
    assert asked == [timing.CALLS_IN_LOOP] and timing.CALLS_IN_LOOP >= 20
    assert found.in_loop and found.ms == pytest.approx(0.03)
    asked.clear()
    clock = Clock(200e-6)
    assert not timing.measure(clock.call, loop=loop, clock=clock).in_loop and not asked


@pytest.mark.parametrize("calls", [2, 7])
def test_repeated_calls_every_time(calls):
    seen = []

    def function(x):
        io_callback(lambda y: seen.append(float(y)), None, x[0])
        return jnp.sin(x)

    out = jax.block_until_ready(jax.jit(timing.repeated(function, calls))(jnp.ones(3)))
    jax.effects_barrier()
    assert seen == [1.0] * calls
    np.testing.assert_allclose(out, np.sin(np.ones(3)), rtol=1e-6)
    with pytest.raises(ValueError, match="calls=1 must be at least 2"):
        timing.repeated(function, 1)


def test_passes_are_compiled_timed_and_named():
    def function(x, y):
        return jnp.tanh(x @ y)

    shapes = (jax.ShapeDtypeStruct((8, 8), jnp.float32),) * 2
    compiled = timing.compile_all(timing.passes_jobs("dense", function, shapes, shapes[0]))
    passes = timing.passes_from("dense", compiled)
    x, y, cotangent = jax.random.normal(jax.random.key(0), (3, 8, 8))
    out, vjp = jax.vjp(function, x, y)
    first, second = passes.backward
    for got in (passes.both.compiled(cotangent, x, y)[1], second.compiled(first.compiled(x, y)[1], cotangent)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, vjp(cotangent))
    np.testing.assert_allclose(passes.forward.compiled(x, y), out, rtol=1e-5)
    entries = timing.time_passes(passes, (x, y), cotangent)
    assert list(entries) == ["forward", "backward", "both"]
    assert all(entry["ms"] > 0 for entry in entries.values()) and entries["both"]["temporary_bytes"] >= 0
    json.dumps(entries)


def test_a_failure_is_recorded_in_the_place_of_its_time():
    def broken(x):
        raise ValueError("does not fit")

    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    compiled = timing.compile_all(timing.passes_jobs("broken", broken, (shape,), shape))
    entries = timing.time_passes(timing.passes_from("broken", compiled), (jnp.ones(2),), jnp.ones(2))
    assert entries == {which: {"error": "ValueError: does not fit"} for which in report.PASSES}
    row = {"kv_heads": 4, "length": 8, "full": entries}
    assert report.errors(row)[0] == "  K=4 length=8 full forward: ValueError: does not fit"


# ---------------------------------------------------------------------------------------------------------------- inputs


def test_alike_queries_share_a_part_within_a_run():
    queries = np.asarray(problems.alike_queries(jax.random.key(0), (1, 200, 8, 64), 0.9)).reshape(200, -1)

    def correlation(i, j):
        return np.corrcoef(queries[i], queries[j])[0, 1]

    assert queries.std() == pytest.approx(1.0, abs=0.05)
    assert correlation(0, 1) == pytest.approx(0.9, abs=0.05) and correlation(64, 127) == pytest.approx(0.9, abs=0.05)
    assert abs(correlation(63, 64)) < 0.2 and abs(correlation(0, 199)) < 0.2
    with pytest.raises(ValueError, match=r"alike=1.5 must be in \[0, 1\]"):
        problems.alike_queries(jax.random.key(0), (1, 2, 1, 1), 1.5)


def test_alike_inputs_choose_alike_blocks():
    sizes = {}
    for kind in ("random", "alike"):
        operands, cotangent = problems.draw(0, shape=SHAPE, length=256, config=SMALL, kind=kind)
        assert operands.compressed.key.shape[1] == SMALL.num_compressed(256) and cotangent.shape == (1, 256, 4, 8)
        blocks = ops.select_blocks(operands.query, operands.compressed.key, config=SMALL, num_keys=256)
        sizes[kind] = overlap.mean_union(blocks, 8)
    assert SMALL.num_selected <= sizes["alike"] < sizes["random"]


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="heads=4 must be a multiple of kv_heads=3"):
        problems.Shape(1, 4, 3, 8, 8, "float32")


# ---------------------------------------------------------------------------------------------------------------- checks


def test_a_right_implementation_passes_the_check():
    [found] = checks.check_kernels(SHAPE, length=32, config=SMALL, kinds=("random",), alike=0.9, name="xla")
    assert found["length"] == 32 and found["tied_rows_that_differ"] == 0
    names = {"out", "dquery", "dgates"} | {
        f"d{branch}.{x}" for branch in ("compressed", "selected", "window") for x in ("key", "value")
    }
    assert found["errors"].keys() == names and max(found["errors"].values()) < 1e-4


def test_a_wrong_gradient_is_found():
    right = {"query": jnp.ones((2, 3)), "gates": jnp.ones(2)}
    wrong = right | {"query": right["query"].at[1, 2].add(0.01)}
    checks.judge_all((jnp.ones(3), right), (jnp.ones(3), right), (jnp.ones(3), right))
    with pytest.raises(AssertionError, match=r"dquery: error 0\.01 at \(1, 2\)"):
        checks.judge_all((jnp.ones(3), wrong), (jnp.ones(3), right), (jnp.ones(3), right))


def test_a_wrong_tail_is_found(monkeypatch):
    """In the output, in what all queries' gradients are judged by, in a key's gradient, or in the choice."""
    monkeypatch.setattr(checks, "TAIL", 16)
    operands, cotangent = problems.draw(0, shape=SHAPE, length=96, config=SMALL)
    compiled = timing.compile_all(checks.tail_jobs(operands, cotangent, config=SMALL))
    none = jnp.zeros((1, 96, 2, 4), jnp.int32)
    _, best, scores = compiled["tail.exact"](*checks._tail(operands, none, cotangent, wide=True))

    def whole(x):
        return jnp.pad(x, ((0, 0), (80, 0), (0, 0), (0, 0)))

    blocks = whole(best)
    out, gradient = compiled["tail.rounded"](*checks._tail(operands, blocks, cotangent, wide=False))
    out, right = whole(out), problems.Operands(**gradient)
    right = right._replace(query=whole(right.query), gates=whole(right.gates))
    tail = (compiled, operands, cotangent)
    found = checks.check_tail(*tail, blocks, out, right)
    assert found["queries"] == 16 and found["tied_rows_that_differ"] == 0 and len(found["errors"]) == 9
    with pytest.raises(AssertionError, match="out: error"):
        checks.check_tail(*tail, blocks, out.at[0, -1].add(0.1), right)
    key = right.selected.key.at[0, 3, 1].add(0.1)
    with pytest.raises(AssertionError, match=r"dselected\.key: error"):
        checks.check_tail(*tail, blocks, out, right._replace(selected=right.selected._replace(key=key)))
    # Of blocks 0 to 5 it has 0, 4, 5 and the better of 1 to 3.
    worst = int(jnp.argmin(scores[0, -1, 0, 1:4])) + 1
    assert worst not in best[0, -1, 0].tolist()
    with pytest.raises(AssertionError, match=r"blocks at \(0, 15, 0\): .* score"):
        checks.check_tail(*tail, blocks.at[0, -1, 0, 1].set(worst), out, right)
    assert np.argwhere(np.any(checks.of_tail(cotangent) != 0, axis=(0, 2, 3))).ravel().tolist() == list(range(80, 96))


def test_choices_may_differ_only_where_scores_tie():
    wanted, other = (np.asarray(blocks, np.int32).reshape(1, 1, 1, 2) for blocks in ([0, 1], [0, 3]))
    for gap, tied in ((0.0, True), (1.5e-6, True), (2.5e-6, False)):
        scores = np.asarray([0.5, 0.2, 0.1, 0.2 - gap]).reshape(1, 1, 1, 4)
        assert assert_best_blocks(wanted, wanted, scores) == 0
        if tied:
            assert assert_best_blocks(other, wanted, scores) == 1
        else:
            with pytest.raises(AssertionError, match=r"blocks at \(0, 0, 0\): \[0, 3\], not \[0, 1\]; score 0.19"):
                assert_best_blocks(other, wanted, scores)


# --------------------------------------------------------------------------------------------------------------- kernels


def calls(function, *shapes) -> set[str]:
    """The kernels that a function launches: names, grids, and what they read and write."""
    program = equations(jax.make_jaxpr(function)(*shapes).jaxpr)
    return {
        f"{x.params['name']} {x.params['grid_mapping'].grid} {[v.aval for v in (*x.invars, *x.outvars)]}"
        for x in program
        if x.primitive.name == "pallas_call"
    }


@pytest.mark.parametrize("group", [2, 16])
def test_the_parts_are_the_kernels_of_forward_and_backward(group, monkeypatch):
    """With the tiles of values that are wider than queries, which would be others for queries alone."""
    monkeypatch.setattr(pallas_kernels, "why_not_here", lambda: None)
    config, shape = NSAConfig(), problems.Shape(1, 2 * group, 2, 128, 256, "bfloat16")
    operands, cotangent = jax.eval_shape(lambda: problems.draw(0, shape=shape, length=1024, config=config))
    found = tiles.tiles_for(operands.query, 2, 256)

    def both(operands, cotangent):
        return jax.vjp(lambda operands: problems.attend(operands, config=config), operands)[1](cotangent)

    def prepare(operands, cotangent):
        return kernels.prepare(operands, cotangent, config=config, tiles=found)

    def chosen(operands):
        return kernels.chosen(operands, config=config, tiles=found)

    wanted, prepared = calls(both, operands, cotangent), jax.eval_shape(prepare, operands, cotangent)
    parts = kernels.parts(config=config, scale=128**-0.5, tiles=found)
    assert set().union(*(calls(part, prepared) for part in parts.values())) == wanted
    assert calls(prepare, operands, cotangent) < wanted and calls(chosen, operands) < wanted
    assert {name.split()[0] for name in wanted} >= {"nsa_choice", "nsa_selected_forced", "nsa_selected_dkv"}


# --------------------------------------------------------------------------------------------------------------- reports


@pytest.mark.parametrize(
    ("measured", "tokens"),
    [
        ([(4096, 0.5), (16384, 2.0)], 8192),
        ([(16384, 2.0), (4096, 0.5)], 8192),
        ([(4096, 0.5), (8192, 1.0)], 8192),
        ([(4096, 1.2), (8192, 0.5), (32768, 2.0)], 16384),
        ([(4096, 1.5), (8192, 3.0)], 4096),
        ([(4096, 0.5), (8192, 0.9)], None),
        ([], None),
    ],
)
def test_break_even_is_interpolated_in_logarithms(measured, tokens):
    found = report.break_even(measured)
    assert found.tokens == (None if tokens is None else pytest.approx(tokens))


def test_ratios_of_what_was_measured():
    full = {"forward": {"ms": 10.0}, "backward": {"error": "no memory"}, "both": {"ms": 30.0}}
    nsa = {"forward": {"ms": 4.0}, "backward": {"ms": 8.0}, "both": {"error": "no memory"}}
    assert report.ratios(full, nsa) == {"forward": 2.5}
    assert report.ratios({"skipped": "float32"}, nsa) == {}


# --------------------------------------------------------------------------------------------------------------- records


def test_no_gpu_is_said(capsys):
    assert attention.main(["--lengths", "64"]) == 2
    assert "benchmarks.attention needs a GPU" in (said := capsys.readouterr().err) and "this device is cpu" in said
    assert tune.main([]) == 2
    assert "benchmarks.tune needs a GPU" in capsys.readouterr().err
    assert tune.main(["--kernels", "nothing"]) == 2
    assert "there are no kernels ['nothing']" in capsys.readouterr().err


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The CPU stands for a GPU, and the reference for the kernels."""
    monkeypatch.setattr(record, "gpu", lambda program: jax.devices()[0])
    monkeypatch.setattr(pallas_kernels, "why_not_here", lambda: None)
    monkeypatch.setitem(ops.IMPLEMENTATIONS, "pallas", ops.IMPLEMENTATIONS["xla"])

    def chosen(operands, *, config, tiles):
        num_keys = operands.selected.key.shape[1]
        return ops.select_blocks(operands.query, operands.compressed.key, config=config, num_keys=num_keys)

    monkeypatch.setattr(kernels, "chosen", chosen)


SIZES = ["--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--value-head-dim", "8", "--batch", "1", "--no-parts"]


def test_a_run_writes_its_record(as_on_a_gpu, monkeypatch, tmp_path: Path, capsys):
    right = {"length": 40, "inputs": "random", "errors": {"out": 0.0}, "tied_rows_that_differ": 0}
    monkeypatch.setattr(checks, "check_kernels", lambda shape, **more: [right])
    pytest.importorskip("matplotlib", reason="figures are part of nsa-jax[train]")
    path, picture = tmp_path / "out" / "record.json", tmp_path / "figure.png"
    arguments = ["--lengths", "40", *SIZES, "--inputs", "random", "--json", str(path), "--plot", str(picture)]
    assert attention.main(arguments) == 0
    written = json.loads(path.read_text())
    assert written.keys() >= {*record.FIELDS, "options", "config", "checks", "results", "break_even"}
    assert written["command"] == " ".join(["python -m benchmarks.attention", *arguments])
    assert written["device"]["kind"] == jax.devices()[0].device_kind and written["packages"]["jax"] == jax.__version__
    assert written["checks"] == [{"kv_heads": 1} | right]
    [row] = written["results"]
    assert row.keys() >= {
        "kv_heads",
        "length",
        "nsa",
        "full",
        "window",
        "shipped",
        "peer",
        "ratios",
        "unions",
        "checks",
    }
    entry = row["nsa"]["random"]["both"]
    assert entry["ms"] > 0 and entry["calls"] >= 1 and entry["temporary_bytes"] >= 0
    # There is no cuDNN here: its entries are errors, and the run goes on.
    assert "error" in row["full"]["forward"] and "skipped" in row["shipped"] and "skipped" in row["peer"]
    assert picture.stat().st_size > 1000
    said = capsys.readouterr().out
    assert "correct at 40 tokens, random inputs" in said and "shipped is skipped" in said and "Failed:" in said


def test_wrong_kernels_have_no_time(as_on_a_gpu, monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setattr(one_length, "jobs", lambda *arguments, **more: {})  # compiled meanwhile, and not wanted
    right = ops.IMPLEMENTATIONS["xla"]
    wrong = right._replace(attend=lambda *arguments, **more: 1.1 * right.attend(*arguments, **more))
    monkeypatch.setitem(ops.IMPLEMENTATIONS, "pallas", wrong)
    path = tmp_path / "record.json"
    assert attention.main(["--lengths", "40", *SIZES, "--inputs", "random", "--json", str(path)]) == 1
    assert "so they have no time" in capsys.readouterr().err
    assert json.loads(path.read_text())["results"] == []


def test_the_peer_is_timed_where_it_is_asked_for(capsys):
    def at(**options):
        found = attention.Options(lengths=(4096, 8192), **options)
        return [length for length in found.lengths if found.with_peer(length)]

    assert at() == [] and at(peer=True) == [4096, 8192]
    assert at(peer_lengths=(8192,)) == at(peer=True, peer_lengths=(8192,)) == [8192]
    assert attention.main(["--lengths", "64", "--peer", "--peer-lengths", "65"]) == 2
    assert "peer_lengths=[65] must be among lengths=(64,)" in capsys.readouterr().err


def test_file_names_of_devices():
    assert record.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# ----------------------------------------------------------------------------------------------------------------- tiles


def entry(group: int = 16, **found: list[int]) -> dict:
    place = {"device": "NVIDIA H200", "compute_capability": "9.0", "dtype": "bfloat16"}
    return place | {"head_dim": 128, "value_head_dim": 128, "group": group, "jax": "0.11.2", "tiles": found}


def test_the_table_is_written_as_it_is_kept():
    kept = TABLE.read_text()
    assert tune.format_table(json.loads(kept)) == kept
    made = tune.merged(json.loads(kept), entry(2, choice=[1, 0, 1, 1]) | {"length": 32768, "commit": None})
    assert json.loads(tune.format_table(made)) == made
    assert tune.format_table(json.loads(tune.format_table(made))) == tune.format_table(made)


def test_entries_are_merged_by_key_and_sorted():
    before = [entry(16, scores=[64, 32, 4, 2], choice=[1, 0, 1, 1])]
    after = tune.merged(before, entry(4, scores=[32, 32, 4, 2]))
    assert [each["group"] for each in after] == [4, 16]
    # A new entry replaces the one of its key, but for kernels that were not tuned.
    after = tune.merged(after, entry(16, scores=[128, 32, 8, 2]) | {"jax": "0.12.0"})
    assert [each["group"] for each in after] == [4, 16] and after[1]["jax"] == "0.12.0"
    assert after[1]["tiles"] == {"scores": [128, 32, 8, 2], "choice": [1, 0, 1, 1]}
    assert before[0]["tiles"]["scores"] == [64, 32, 4, 2]


def test_every_kernel_with_a_tile_has_candidates():
    # Those of decoding are in benchmarks/decode.py.
    tiled = {field.name for field in dataclasses.fields(Tiles) if not field.name.startswith("decode")} - {"by_block"}
    assert tiled == tune.CANDIDATES.keys()
    for kernel, candidates in tune.CANDIDATES.items():
        assert len(set(candidates)) == len(candidates)
        fitting = [tile for tile in candidates if tune.fits(kernel, Tile(*tile), of_group(16), capability="9.0")]
        assert len(fitting) >= 3, kernel


def of_group(group: int, size: int = 128, value_size: int = 128, dtype: str = "bfloat16") -> problems.Shape:
    return problems.Shape(1, 64 * group, 64, size, value_size, dtype)


@pytest.mark.parametrize(
    ("group", "sizes", "dtype"),
    [
        (1, (128, 128), "bfloat16"),
        (5, (256, 256), "bfloat16"),
        (4, (192, 128), "float32"),  # whose rule holds no block, where candidates do
        (1, (256, 256), "float32"),  # and here neither
        (16, (128, 128), "bfloat16"),
        (20, (192, 128), "bfloat16"),
        (64, (128, 128), "bfloat16"),
        (64, (256, 256), "float32"),
    ],
)
def test_what_is_timed_is_what_will_run(group, sizes, dtype, monkeypatch, tmp_path: Path):
    """Any tile that is timed, once it is written, is found again as it is, and the selected branch goes the same way."""
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "tiles.json")
    shape, config = of_group(group, *sizes, dtype), NSAConfig()

    def found(**timed: Tile) -> Tiles:
        written = entry(group, **{kernel: list(tile) for kernel, tile in timed.items()})
        written |= {"dtype": dtype, "head_dim": sizes[0], "value_head_dim": sizes[1]}
        tiles.TABLE.write_text(json.dumps([written] if timed else []))
        return tiles._lookup.__wrapped__("NVIDIA H200", "9.0", dtype, *sizes, group)

    safe, timed = tune.to_time(shape, config=config, current=found(), capability="9.0")
    used = kernels.names_in_use(safe, config)
    for kernel in used:
        assert len(set(timed[kernel])) == len(timed[kernel])
        for tile in timed[kernel]:
            assert getattr(found(**{kernel: tile}), kernel) == tile
    by_block = timed["selected_by_block"] if "selected_by_block" in used else [safe.selected_by_block]
    for dkv, forward in itertools.product(timed["selected_dkv"], by_block):
        written = found(selected_dkv=dkv, selected_by_block=forward)
        assert set(kernels.names_in_use(written, config)) == set(used)
    assert ("selected_by_block" in used) == (group < 8 and not (dtype == "float32" and sizes == (256, 256)))


def test_a_different_result_is_no_tile():
    right = (jnp.ones((8, 4), jnp.bfloat16), jnp.zeros((2000, 3), jnp.int32))
    assert tune.disagreement(right, right) is None
    assert tune.disagreement((right[0].at[0, 0].set(1.01), right[1]), right) is None
    assert "an error of" in (tune.disagreement((right[0].at[0, 0].set(1.1), right[1]), right) or "")
    assert "an error of nan" in (tune.disagreement((right[0].at[0, 0].set(jnp.nan), right[1]), right) or "")
    assert tune.disagreement((right[0], right[1].at[0, 0].set(1)), right) is None
    assert "rows of indices" in (tune.disagreement((right[0], right[1].at[:9].set(1)), right) or "")

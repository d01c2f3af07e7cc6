"""The command line: help at once; for every bad input the exit code, what was wrong, what to do, and nothing lost."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import make_config, replace_model, write_text
from train.__main__ import COMMANDS, main
from train.config import PRESETS
from train.generate import Continuation, Generated, Sampling, Speed, generate
from train.loop import default_folder

pytest_plugins = ["tests.tiny_fixtures"]
pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[1]

# ----------------------------------------------------------------------------------------------------------------- help

HELP = [["--help"], ["run", "--help"], ["run", "tiny", "--help"], ["eval", "--help"]]
HELP += [[*name.split(), "--help"] for name in COMMANDS if name != "run"]


@pytest.mark.parametrize("args", HELP, ids=" ".join)
def test_help_comes_at_once_and_without_jax(args):
    program = (
        "import sys; from train.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "loaded = {'jax', 'flax', 'optax', 'orbax', 'matplotlib'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    seconds = []
    while len(seconds) < 5 and not (seconds and min(seconds) < 1):
        start = time.perf_counter()
        finished = subprocess.run(
            [sys.executable, "-W", "error", "-c", program, *args], cwd=ROOT, capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - start)
        assert (finished.returncode, finished.stderr) == (0, "")
        assert finished.stdout.startswith("usage: python -m train")
    assert min(seconds) < 1


def words(text: str) -> str:
    """Without the boxes that tyro draws, and in one line."""
    return " ".join(re.sub(r"[\u2500-\u257f]", " ", text).split())


def help_of(*args: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*args, "--help"])
    assert ended.value.code == 0
    return words(capsys.readouterr().out)


def test_help_says_units_and_defaults(capsys):
    text = help_of("run", "tiny", capsys=capsys)
    for part in (
        "--context INT Tokens per sequence. (default: 256)",
        "--attention {nsa,full,window}",
        "--learning-rate FLOAT Peak learning rate. (default: 0.004)",
        "--warmup-steps INT Steps from zero to the peak. (default: 60)",
        "Sizes of Native Sparse Attention, in tokens unless said",
        "--num-selected INT blocks that a query reads, the forced ones included (n). (default: 6)",
        "--remat {none,attention,full}",
    ):
        assert part in text
    assert "--learning-rate FLOAT Peak learning rate. (default: 0.001)" in help_of("run", "small", capsys=capsys)
    text = help_of("generate", capsys=capsys)
    for part in (
        "--temperature FLOAT",
        "(default: 0.8)",
        "--top-k",
        "--max-tokens",
        "--seed INT",
        "--prompt STR",
        "(repeatable)",
        "--prompt-file",
        "--top-p",
        "--stream",
        "--json",
        "(required)",
    ):
        assert part in text
    text = help_of("eval", "loss", capsys=capsys)
    for part in (
        "nats per token and bits per byte",
        "--split {validation,test,train}",
        "--run [PATH [PATH ...]]",
        "--step",
    ):
        assert part in text
    assert "--text" in help_of("inspect", capsys=capsys)
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*COMMANDS, *PRESETS))


def test_each_field_of_a_preset_has_its_help():
    """The docstrings of the fields are the help: a field without one would show nothing."""
    from tyro._docstrings import get_field_docstring

    def check(kind: type) -> None:
        for field in dataclasses.fields(kind):
            if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
                check(field.type)
            else:
                assert get_field_docstring(kind, field.name, ()), (kind, field.name)

    check(type(PRESETS["tiny"][1]))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Runs a command line that is to fail: its exit code, and its message in one line."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")  # where a default folder would be made

    def run(*args: object) -> tuple[int, str]:
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as end:  # tyro's own
            code = end.code
        text = capsys.readouterr()
        assert "Traceback" not in text.err
        assert not list((tmp_path / "work").iterdir())
        return code, words(text.err)

    return run


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt", num_words=300)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ONE_STEP = ["--steps", "1", "--warmup-steps", "0", "--num-layers", "1"]  # to fail soon where it does not

# Flags of `run tiny` that are wrong, and what the message must say: the thing, and what to do about it.
WRONG_FLAGS = {
    "unknown flag": (
        ["--attenton", "full"],
        "Unrecognized options: --attenton",
        "Perhaps you meant: --attention {nsa,full,window}",
    ),
    "unknown choice": (["--attention", "ful"], "invalid choice 'ful'", "Expected one of ('nsa', 'full', 'window')"),
    "no number": (["--context", "8k"], "Error parsing --context", "python -m train run tiny --help"),
    "no steps": (["--steps", "0"], "steps=0 must be at least 1", ""),
    "warm-up": (["--steps", "50"], "warmup_steps=60", "below steps=50"),
    "heads": (["--num-heads", "3"], "num_heads=3 must be a multiple of num_kv_heads=2", ""),
    "odd heads": (["--head-dim", "7"], "head_dim=7 must be even", "rotary"),
    "parts": (["--accumulate", "3"], "batch_size=4 must be a multiple of accumulate=3", ""),
    "rate": (["--learning-rate", "0"], "learning_rate=0.0 must be positive", ""),
    "blocks": (
        ["--compress-block", "7"],
        "compress_block=7 must be a multiple of compress_stride=4",
        "try compress_block=8",
    ),
    "select": (
        ["--select-block", "10"],
        "select_block=10 must be a multiple of compress_stride=4",
        "try select_block=12",
    ),
    "selected": (
        ["--num-selected", "2"],
        "num_selected=2 must be at least num_initial + num_local = 3",
        "counted inside it",
    ),
    "window": (["--window", "0"], "window=0 must be an integer of at least 1", ""),
    "dense packing": (
        ["--attention", "full", "--packing", "documents", "--context", "8193"],
        "context=8193 must be at most 8192",
        "or packing be 'running', or attention 'nsa'",
    ),
    "kernels": (
        ["--implementation", "pallas"],
        "implementation='pallas': the kernels run on NVIDIA GPUs",
        "use 'xla' or None",
    ),
    "seed": (["--seed", "-1"], "seed=-1 must be at least 0", ""),
    "tokenizer": (["--tokenizer", "bpe"], 'tokenizer=\'bpe\' must be "bytes", "bpe:N"', "there is no such file"),
    "vocabulary": (["--tokenizer", "bpe:9999"], "bpe:9999 asks for 9999 tokens", "ask for at most bpe:"),
    "prompt": (
        ["--context", "16", "--prompt", "x" * 16, *ONE_STEP],
        "the prompt has 16 tokens",
        "shorten it to at most 15",
    ),
    "short corpus": (
        ["--context", "9000"],
        "context=9000 needs at least 9001 tokens",
        "give more text, or a context of at most",
    ),
}


@pytest.mark.parametrize("flags, problem, remedy", WRONG_FLAGS.values(), ids=WRONG_FLAGS)
def test_wrong_flags(call, text, tmp_path, flags, problem, remedy):
    code, message = call("run", "tiny", "--text", text, "--run", tmp_path / "run", *flags)
    assert code == 2
    assert problem in message and remedy in message
    assert not (tmp_path / "run").exists()


def test_ctrl_c_ends_any_command_in_a_line(tiny_run, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.runs.open_run", interrupted)
    for command in (["generate", "--prompt", "a"], ["inspect"], ["eval", "niah"]):
        assert main([*command, "--run", str(tiny_run.folder)]) == 130
        assert capsys.readouterr().err == "stopped by SIGINT\n"


def test_unknown_command_preset_and_task(call):
    for args, parts in {
        (): ("usage: python -m train COMMAND", "run PRESET"),
        ("trian",): ("there is no command 'trian'", "eval loss"),
        ("run",): ("usage: python -m train run PRESET", "tiny", "small", "base"),
        ("run", "tinny"): ("there is no preset 'tinny', choose from", "tiny", "small", "base"),
        ("eval",): ("usage: python -m train eval TASK", "loss", "niah", "mqar"),
        ("eval", "los"): ("there is no task 'los'", "loss", "niah", "mqar"),
        ("eval", "loss"): ("--run", "(required)"),
        ("eval", "loss", "--run"): ("--run names no folder",),
        ("generate", "--prompt", "a"): ("--run PATH", "(required)"),
    }.items():
        if args:
            code, message = call(*args)
            assert code == 2
            assert all(part in message for part in parts), (args, message)


def test_text_that_is_none(call, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"abc\0def" * 99)
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1") * 99)
    (tmp_path / "folder").mkdir()
    for name, problem, remedy in (
        ("missing.txt", "matches no file", 'give "austen", "stdlib", or a file, folder or pattern'),
        ("*.md", "matches no file", "relative paths start at"),
        ("folder", "matches no file", "UTF-8 text"),
        ("empty.txt", "is empty", "give a file that has text"),
        ("binary.txt", "is not text: byte 3 is NUL", "give UTF-8 text"),
        ("latin1.txt", "is not UTF-8: byte 0 is 0xe9", "iconv"),
    ):
        code, message = call("run", "tiny", "--text", tmp_path / name, "--run", tmp_path / "run")
        assert code == 2
        assert name in message and problem in message and remedy in message
    assert not (tmp_path / "run").exists()


def run_flags(trained, folder: Path) -> list[object]:
    """The command line of the tiny run, `--flag value` for each field that its preset has otherwise."""

    def differing(config, preset) -> list[object]:
        flags: list[object] = []
        for field in dataclasses.fields(config):
            new, old = getattr(config, field.name), getattr(preset, field.name)
            if dataclasses.is_dataclass(new):
                flags += differing(new, old)
            elif new != old:
                flags += [f"--{field.name.replace('_', '-')}", new]
        return flags

    return ["run", "tiny", "--run", folder, *differing(trained.config, PRESETS["tiny"][1])]


@pytest.fixture
def copied(tiny_run, tmp_path):
    """A copy of the trained run, that may be harmed."""
    return shutil.copytree(tiny_run.folder, tmp_path / "run")


def test_the_folder_of_another_configuration(call, tiny_run, copied):
    before = files(copied)
    code, message = call(*run_flags(tiny_run, copied), "--mlp-dim", 48, "--learning-rate", 0.5, "--window", 7)
    assert code == 2
    assert f"{copied} holds a run of another configuration" in message
    for line in (
        "model.mlp_dim: 24 there, 48 here",
        "optimizer.learning_rate: 0.01 there, 0.5 here",
        "model.nsa.window: 6 there, 7",
    ):
        assert line in message
    assert message.count("there,") == 3
    assert "give another folder with --run, or move" in message
    assert files(copied) == before


def test_a_folder_that_is_no_run(call, text, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"miaow")
    for folder in (tmp_path / "photos", text):
        code, message = call("run", "tiny", "--text", text, "--run", folder)
        assert (code, message) == (2, f"error: {folder} is no run folder: give another with --run")
    assert files(tmp_path / "photos") == {"cat.jpg": b"miaow"}
    (tmp_path / "photos" / "config.json").write_text("{")
    code, message = call("run", "tiny", "--text", text, "--run", tmp_path / "photos")
    assert code == 2 and "config.json can't be read" in message and "give another with --run" in message


def test_a_text_that_has_changed(call, tiny_run, copied, tmp_path):
    """The same path, and one more word in it."""
    changed = tmp_path / "text.txt"
    changed.write_text(tiny_run.text.read_text() + " and")
    config = json.loads((copied / "config.json").read_text())
    config["data"]["text"] = str(changed)
    (copied / "config.json").write_text(json.dumps(config))
    before = files(copied)
    code, message = call(*run_flags(tiny_run, copied), "--text", changed)
    assert code == 2
    assert f"the text has changed since {copied} was begun" in message
    assert "bring the old text back, or begin anew with another --run" in message
    assert files(copied) == before


def test_a_checkpoint_of_other_shapes(call, tiny_run, copied):
    """As when config.json was brought from another run: the checkpoint holds what it holds."""
    config = json.loads((copied / "config.json").read_text())
    config["model"]["mlp_dim"] = 48
    (copied / "config.json").write_text(json.dumps(config))
    before = files(copied)
    code, message = call(*run_flags(tiny_run, copied), "--mlp-dim", 48)
    assert code == 1
    assert f"{copied}/checkpoints/40 does not fit this model" in message
    assert "['mlp']['gate']['kernel']: saved float32[2,16,24], wanted float32[2,16,48]" in message
    assert "use that one, or another run folder" in message
    assert files(copied) == before


@pytest.mark.usefixtures("compiled")
def test_a_damaged_checkpoint_and_the_way_out_that_is_named(call, tiny_run, copied, tmp_path, capsys, monkeypatch):
    last = copied / "checkpoints" / "40"
    data = max((path for path in last.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    before = files(copied)
    commands = {
        "eval": ("eval", "loss", "--run", copied, "--output", tmp_path / "out"),
        "generate": ("generate", "--run", copied, "--prompt", "the ", "--max-tokens", 2),
        "inspect": ("inspect", "--run", copied, "--output", tmp_path / "out"),
        "run": run_flags(tiny_run, copied),
    }
    for name, command in commands.items():
        code, message = call(*command)
        assert code == 1, name
        assert (
            f"checkpoint 40 is damaged: in {last}, {data.relative_to(last)} has changed since it was saved" in message
        )
        assert (
            f"The checkpoint before it, step 30, is whole: use --step 30 or move {last} away (`run` has no --step"
            in message
        )
    assert files(copied) == before and not (tmp_path / "out").exists()

    # Both ways work: a flag of all that read, and for `run` moving the folder away.
    made = Generated((Continuation("from step 30", 1, "length", 4, 0),), Speed(4, 1.0, 1, 1.0, 1))
    monkeypatch.setattr("train.generate.generate_batch", lambda run, *_, **__: {30: made}[run.step])
    assert main([str(arg) for arg in (*commands["generate"], "--step", 30)]) == 0
    assert capsys.readouterr().out == "the from step 30\n"
    shutil.move(last, tmp_path / "moved away")
    monkeypatch.setattr("train.loop._finish", lambda *_: iter(()))
    assert main([str(arg) for arg in commands["run"]]) == 0
    assert "going on from step 30 of 40\n" in capsys.readouterr().out
    assert (copied / "metrics.jsonl").read_text().count('"step": 40,') == 2  # a row of training, one of validation


def test_a_run_folder_that_is_missing_or_has_no_checkpoint(call, tiny_run, tmp_path):
    for folder, parts in (
        (
            tmp_path / "nowhere",
            ("there is no run folder", f"python -m train run PRESET --run {tmp_path / 'nowhere'}` makes one"),
        ),
        (tmp_path, ("no checkpoint in", "check the path, or train first")),
    ):
        for command in (["eval", "loss"], ["generate", "--prompt", "a"], ["inspect"]):
            code, message = call(*command, "--run", folder)
            assert code == 1
            assert str(folder) in message and all(part in message for part in parts)
    assert not (tmp_path / "nowhere").exists()
    code, message = call("generate", "--prompt", "a", "--run", tiny_run.folder, "--step", 25)
    assert code == 1
    assert f"no checkpoint of step=25 in {tiny_run.folder}/checkpoints: there are 10, 20, 30, 40" in message


def test_generate_refuses_what_does_not_fit(call, tiny_run):
    for flags, problem in (
        (["--prompt", "x" * 32], "the prompt has 32 tokens, but the model's context is 32: shorten it to at most 31"),
        (
            ["--prompt", "the ", "--max-tokens", 29],
            "max_tokens=29 must lie between 1 and 28: the prompt has 4 of the context's 32",
        ),
        (["--prompt", "the ", "--max-tokens", 0], "max_tokens=0 must lie between 1 and 28"),
        (
            ["--prompt", "the ", "--temperature", -0.1],
            "temperature=-0.1 must be 0, which takes the most likely token, or",
        ),
        (["--prompt", "the ", "--top-k", 0], "top_k=0 must be at least 1"),
        (["--prompt", "the ", "--top-p", 1.5], "top_p=1.5 must be above 0 and at most 1"),
        (["--prompt", "the ", "--stop", "ab"], "stop='ab' must be one token of the run's tokenizer"),
        ([], 'there is no prompt: give --prompt "TEXT"'),
        (["--prompt-file", "missing.txt"], "missing.txt"),
        (["--prompt", "the ", "--prompt", "x" * 40], "prompt 2 of 2 has 40 tokens"),
    ):
        code, message = call("generate", "--run", tiny_run.folder, *flags)
        assert code == 2
        assert problem in message


def test_eval_refuses_text_that_is_none(call, tiny_run, tmp_path):
    (tmp_path / "binary").write_bytes(b"\0" * 99)
    for text, problem in (("missing", "matches no file"), ("binary", "is not text")):
        code, message = call(
            "eval", "loss", "--run", tiny_run.folder, "--text", tmp_path / text, "--output", tmp_path / "out"
        )
        assert code == 2 and problem in message
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_version(call, tiny_run, copied, monkeypatch):
    monkeypatch.setattr("train.runs.FORMAT", 2)
    code, message = call("generate", "--prompt", "a", "--run", copied)
    assert code == 1
    assert "was written in format 1 of nsa-jax" in message and "this is format 2: open it with that version" in message


def test_generate_prints_the_prompt_and_what_comes_after(tiny_run, capsys):
    flags = ["--prompt", "the quick ", "--temperature", "0.7", "--seed", "3"]
    assert main(["generate", "--run", str(tiny_run.folder), *flags]) == 0
    expected = generate(tiny_run.run, "the quick ", sampling=Sampling(0.7), max_tokens=None, seed=3)
    output = capsys.readouterr()
    assert output.out == f"the quick {expected}\n"
    assert re.fullmatch(
        r"prefill: 10 tokens in [\d.]+ s, [\d.]+ tokens/s; decode: 22 tokens in [\d.]+ s, [\d.]+ tokens/s, [\d.]+ ms a step\n",
        output.err,
    )


def test_generate_prints_a_batch_whole_streamed_and_as_json(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.runs.open_run", lambda *_, **__: tiny_run.run)  # so that its programs compile once
    (tmp_path / "more.txt").write_text("fox\n")
    flags = ["--prompt", "the quick ", "--prompt-file", str(tmp_path / "more.txt"), "--seed", "3", "--top-p", "0.9"]

    def printed(*more: str) -> str:
        assert main(["generate", "--run", str(tiny_run.folder), *flags, *more]) == 0
        return capsys.readouterr().out

    whole = printed()
    assert whole.startswith("--- 1 of 2\nthe quick ") and "\n--- 2 of 2\nfox" in whole
    assert printed("--stream") == whole
    result = json.loads(printed("--json"))
    assert whole == "".join(
        f"--- {row} of 2\n{each['prompt']}{each['text']}\n" for row, each in enumerate(result["continuations"], start=1)
    )
    assert result["step"] == 40 and result["sampling"] == {"temperature": 0.8, "top_k": None, "top_p": 0.9}
    assert [each["seed"] for each in result["continuations"]] == [3, 4]
    assert result["speed"]["prefill_tokens"] == 13
    *pieces, last = map(json.loads, printed("--json", "--stream").splitlines())
    assert last["continuations"] == result["continuations"]
    for row, each in enumerate(result["continuations"]):
        assert "".join(piece["text"] for piece in pieces if piece["prompt"] == row) == each["text"]


def test_default_folders(tmp_path):
    config = make_config(tmp_path / "text.txt")
    assert default_folder(config) == Path("runs/tiny")
    for attention in ("full", "window"):
        assert default_folder(replace_model(config, attention=attention)) == Path(f"runs/tiny-{attention}")

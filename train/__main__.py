"""`python -m train run PRESET`, `eval TASK`, `generate`, `inspect`. jax is imported once the command line is understood."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from train.checkpoint import CheckpointError
from train.config import PRESETS, NeedleTask, TrainConfig
from train.errors import Diverged, Interrupted

PROG = "python -m train"


@dataclasses.dataclass(frozen=True)
class RunArguments:
    """Train a language model; the same command goes on with a run that was interrupted."""

    run: Path | None = None
    """Run folder; runs/NAME if not given, with -full or -window behind it for these attentions."""
    config: TrainConfig = PRESETS["tiny"][1]


def run_command(args: Sequence[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print("\n".join([f"usage: {PROG} run PRESET ...", "", *_preset_lines()]), file=None if args else sys.stderr)
        raise SystemExit(0 if args else 2)
    name, flags = args[0], args[1:]
    if name not in PRESETS:
        raise ValueError("\n".join([f"there is no preset {name!r}, choose from", "", *_preset_lines()]))
    description, config = PRESETS[name]
    parsed = tyro.cli(
        RunArguments,
        default=RunArguments(config=config),
        prog=f"{PROG} run {name}",
        description=description,
        args=flags,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    from train.loop import default_folder, train

    train(parsed.config, parsed.run or default_folder(parsed.config))


def _preset_lines() -> list[str]:
    return [
        *(f"  {name:<6} {description}" for name, (description, _) in PRESETS.items()),
        "",
        f"`{PROG} run PRESET --help` lists what can be changed, with units and defaults.",
    ]


def eval_loss(
    run: tuple[Path, ...],
    split: Literal["validation", "test", "train"] = "validation",
    text: str | None = None,
    step: int | None = None,
    output: Path | None = None,
) -> None:
    """Measure the loss of trained runs on held-out text, in nats per token and bits per byte.

    Prints it overall and by position in the context; writes loss_SPLIT.json and, with all the runs in one figure,
    loss_by_position.png. What is done is kept in loss_SPLIT.parts.jsonl: the same command goes on after an interruption.

    Args:
        run: Run folders, one or more.
        split: Part of the run's own text to read.
        text: Another text, read whole: "austen", "stdlib", a file, a folder or a glob.
        step: Checkpoint to read; the last one if not given.
        output: Folder for the results; the first run folder if not given.
    """
    if not run:
        raise ValueError("--run names no folder: give one or more")
    from train import plots
    from train.evaluate import evaluate_losses
    from train.evaluation import write_json
    from train.runs import open_run

    table, output = {}, output or run[0]
    opened = [open_run(folder, step=step) for folder in run]
    for one, result in zip(opened, evaluate_losses(opened, output, split=split, text=text), strict=True):
        table[str(one.folder)] = dataclasses.asdict(result)
        print(
            f"{one.folder}, step {one.step}, {f'{one.config.data.text} ({split})' if text is None else text}: {result}"
        )
        for bucket in result.by_position:
            print(f"  positions {bucket.start:>6} to {bucket.end - 1:<6}  loss {bucket.loss:.4f}")
    comparable = len({one.tokenizer.to_json() for one in opened}) == 1
    if not comparable:
        print(
            "These runs have different tokenizers: compare bits per byte, which the figure shows; nats and positions are of "
            "each one's own tokens."
        )
    written = write_json(output / f"loss_{split if text is None else 'text'}.json", table)
    positions = {folder: result["by_position"] for folder, result in table.items()}
    field: Literal["loss", "bits_per_byte"] = "loss" if comparable else "bits_per_byte"
    print(f"written: {written}, {plots.loss_by_position(positions, output / 'loss_by_position.png', field=field)}")


def eval_niah(
    run: Path,
    tasks: tuple[NeedleTask, ...] = (),
    lengths: tuple[int, ...] = (),
    depths: int = 11,
    examples: int = 8,
    generate: int = 4,
    batch_size: int = 4,
    split: Literal["validation", "test", "train"] = "validation",
    text: str | None = None,
    seed: int = 0,
    beyond_context: bool = False,
    step: int | None = None,
    output: Path | None = None,
) -> None:
    """Hide needles in a held-out text and ask a trained run for them, by depth and length.

    The tasks are RULER's and the passkey, scored teacher-forced; a part is decoded through the cache as well. With attention
    nsa, the selection hit rate too: how often the blocks that a query selects hold the token that it has to repeat. Writes
    niah.json, niah.png and niah_selection.png. What is done is kept in niah.parts.jsonl: the same command goes on after an
    interruption. A model finds needles only where it was trained to, as `run niah` does.

    Args:
        run: Run folder.
        tasks: What to hide; all that fit if not given.
        lengths: Of prompt and answer, in tokens of the run's tokenizer; 1/8, 1/4, 1/2 and all of the context if not given.
        depths: Number of depths, evenly from 0 to 100 percent of the haystack's sentences.
        examples: Of a task, length and depth.
        generate: Examples of a task and length that are decoded too; 0 for none.
        batch_size: Examples at a time.
        split: Part of the run's own text that is the haystack.
        text: Another text for it: "austen", "stdlib", a file, a folder or a glob.
        seed: Of the examples.
        beyond_context: Allow lengths beyond the context that the run was trained with.
        step: Checkpoint to read; the last one if not given.
        output: Folder for the results; the run folder if not given.
    """
    from train import plots
    from train.evaluate_niah import describe, evaluate_niah, mean_hit_rates
    from train.evaluation import write_json
    from train.runs import open_run

    output = output or run
    result = evaluate_niah(
        open_run(run, step=step),
        output,
        tasks=tasks,
        lengths=lengths,
        depths=depths,
        examples=examples,
        generate=generate,
        batch_size=batch_size,
        split=split,
        text=text,
        seed=seed,
        beyond_context=beyond_context,
    )
    for line in describe(result):
        print(line)
    written = [
        write_json(output / "niah.json", result),
        plots.needle_map({task: found["cells"] for task, found in result["tasks"].items()}, output / "niah.png"),
    ]
    if hit_rates := mean_hit_rates(result):
        written.append(plots.hit_rates(hit_rates, output / "niah_selection.png"))
    print("written: " + ", ".join(map(str, written)))


def eval_mqar(
    run: tuple[Path, ...],
    lengths: tuple[int, ...] = (),
    pairs: tuple[int, ...] = (),
    examples: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    beyond_context: bool = False,
    step: int | None = None,
    output: Path | None = None,
) -> None:
    """Multi-query associative recall of trained runs, to zoology's definition: key-value pairs, then the keys.

    Writes mqar.json and mqar.png: the share of queries answered right by length and number of pairs. What is done is kept in
    mqar.parts.jsonl: the same command goes on after an interruption. A model recalls only where it was trained to, as
    `run mqar` does.

    Args:
        run: Run folders, one or more.
        lengths: Tokens of an example, even, below the size of the vocabulary; 64 to 512 if not given.
        pairs: Key-value pairs, at most a quarter of the length; 4 to 64 if not given.
        examples: Of a length and number of pairs.
        batch_size: Examples at a time.
        seed: Of the examples.
        beyond_context: Allow lengths beyond the context that a run was trained with.
        step: Checkpoint to read; the last one if not given.
        output: Folder for the results; the first run folder if not given.
    """
    if not run:
        raise ValueError("--run names no folder: give one or more")
    from train import plots
    from train.evaluate_mqar import evaluate_mqar
    from train.evaluation import write_json
    from train.runs import open_run

    output = output or run[0]
    results = evaluate_mqar(
        [open_run(folder, step=step) for folder in run],
        output,
        lengths=lengths,
        pairs=pairs,
        examples=examples,
        batch_size=batch_size,
        seed=seed,
        beyond_context=beyond_context,
    )
    for folder, result in results.items():
        print(f"{folder}, step {result['step']}")
        for cell in result["cells"]:
            accuracy, chance = cell["accuracy"], cell["accuracy_of_any_of_the_values"]
            print(
                f"  length {cell['length']:>5}  pairs {cell['pairs']:>3}  accuracy {accuracy:6.1%}"
                f"  (one of the values at random {chance:.1%})"
            )
    written = write_json(output / "mqar.json", results)
    figure = plots.recall({folder: result["cells"] for folder, result in results.items()}, output / "mqar.png")
    print(f"written: {written}, {figure}")


def generate(
    run: Path,
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    prompt_file: Path | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    max_tokens: int | None = None,
    stop: str | None = None,
    seed: int = 0,
    stream: bool = False,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
    prefill_chunk: int = 4096,
    step: int | None = None,
) -> None:
    """Continue prompts with a trained run, all in one batch.

    Prints each prompt with its continuation, and to the standard error the tokens per second, compilation left out.

    Args:
        run: Run folder.
        prompt: Text to continue; repeat the flag for several.
        prompt_file: File with a prompt in each line; a .jsonl file has a JSON string in each, which may hold line ends.
        temperature: 0 takes the most likely token each time; higher is more varied.
        top_k: Draw from this many of the most likely tokens; from all if not given.
        top_p: Draw from the fewest most likely tokens that have this probability together; from all if not given.
        max_tokens: Tokens to draw for each; 200, or what is left of the context, if not given.
        stop: Text of one token that ends a continuation; the end of a document always does.
        seed: Of the draws; the prompts of a batch have seed, seed + 1, ... and get what they get alone with that seed.
        stream: Show the text as it is drawn; of several, one after the other, or with --json a line for each piece.
        json_output: Print one line of JSON with the texts, why they ended, and the times.
        prefill_chunk: Tokens of each prompt that are read at once: fewer take less memory.
        step: Checkpoint to read; the last one if not given.
    """
    from train.generate import InOrder, Sampling, generate_batch, heading, read_prompts
    from train.runs import open_run

    sampling = Sampling(temperature, top_k, top_p)
    sampling.check()
    prompts = [*prompt, *(read_prompts(prompt_file) if prompt_file else ())]
    if not prompts:
        raise ValueError('there is no prompt: give --prompt "TEXT", as often as you like, or --prompt-file FILE')
    opened = open_run(run, step=step)

    def json_piece(row: int, text: str, ended: bool) -> None:
        print(json.dumps(dict(prompt=row, text=text, ended=ended)), flush=True)

    on_text: Callable[[int, str, bool], None] | None = None
    if stream and json_output:
        on_text = json_piece
    elif stream:
        # Only once it is known that the prompts fit: nothing is printed above an error.
        shown: list[InOrder] = []

        def on_text(row: int, text: str, ended: bool) -> None:
            if not shown:
                shown.append(InOrder(prompts, lambda text: print(text, end="", flush=True)))
            shown[0](row, text, ended)

    made = generate_batch(
        opened,
        prompts,
        sampling=sampling,
        max_tokens=max_tokens,
        seed=seed,
        stop=stop,
        prefill_chunk=prefill_chunk,
        on_text=on_text,
    )
    if json_output:
        texts = [dict(prompt=text, **each._asdict()) for text, each in zip(prompts, made.continuations, strict=True)]
        settings = dict(run=str(run), step=opened.step, sampling=sampling._asdict(), stop=stop)
        print(json.dumps(settings | dict(continuations=texts, speed=made.speed._asdict())))
    elif not stream:
        for row, (text, each) in enumerate(zip(prompts, made.continuations, strict=True)):
            print(heading(row, len(prompts)) + text + each.text)
    print(made.speed, file=sys.stderr)


def inspect(
    run: Path,
    text: str | None = None,
    length: int | None = None,
    beyond_context: bool = False,
    step: int | None = None,
    output: Path | None = None,
) -> None:
    """Show what a trained run's attention reads in the beginning of a text.

    Draws the blocks that each layer and head selects, its gates, how much neighbours' choices overlap, and how much of
    full attention's mass the selected blocks hold. Writes inspect.html, a page with all of it that opens offline,
    inspect.json, the numbers, and the figures. What is done is kept in inspect.parts.jsonl: the same command goes on after
    an interruption.

    Args:
        run: Run folder of a model with attention nsa.
        text: Another text than the run's validation text: "austen", "stdlib", a file, a folder or a glob, and the first
            document of several.
        length: Tokens to read; the run's context, or as many as there are, if not given.
        beyond_context: Allow a length above the context that the run was trained with.
        step: Checkpoint to read; the last one if not given.
        output: Folder for the results; RUN/inspect if not given.
    """
    from train.data import load_documents
    from train.inspection import inspect_text
    from train.runs import load_own_corpus, open_run

    opened = open_run(run, step=step)
    documents = load_own_corpus(opened).validation if text is None else load_documents(text)
    name = documents[0].name
    if text is None:
        source = f"{opened.config.data.text} (validation: {name})"
    else:
        source = text if len(documents) == 1 else f"{text} ({name})"
    written = inspect_text(
        opened,
        documents[0].text,
        output or run / "inspect",
        source=source,
        length=length,
        beyond_context=beyond_context,
    )
    print("written: " + ", ".join(map(str, written)))


def _cli(function: Callable[..., None], name: str) -> Callable[[Sequence[str]], None]:
    return lambda args: tyro.cli(function, prog=f"{PROG} {name}", args=args)


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "run": ("train a language model: run PRESET", run_command),
    "eval loss": ("loss of trained runs on held-out text, overall and by position", _cli(eval_loss, "eval loss")),
    "eval niah": ("needles in a haystack, by depth and length", _cli(eval_niah, "eval niah")),
    "eval mqar": ("multi-query associative recall", _cli(eval_mqar, "eval mqar")),
    "eval inspect": ("the same as inspect", _cli(inspect, "eval inspect")),
    "generate": ("continue prompts with a trained run", _cli(generate, "generate")),
    "inspect": ("show what a trained run reads: selected blocks, gates, overlap, coverage", _cli(inspect, "inspect")),
}


def _usage() -> str:
    lines = [f"usage: {PROG} COMMAND ...", ""]
    lines += [f"  {name:<12} {description}" for name, (description, _) in COMMANDS.items()]
    lines += [
        "",
        f"presets of run: {', '.join(PRESETS)}",
        f"`{PROG} COMMAND --help` lists its flags, with units and defaults.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if argv else 2
    name, args = argv[0], argv[1:]
    if name == "eval":
        tasks = [command.split()[1] for command in COMMANDS if command.startswith("eval ")]
        if not args or args[0] not in tasks:
            asked = bool(args) and args[0] in ("-h", "--help")
            lines = [f"usage: {PROG} eval TASK ...", ""]
            lines += [f"  {task:<10} {COMMANDS[f'eval {task}'][0]}" for task in tasks]
            if args and not asked:
                lines = [f"error: there is no task {args[0]!r}", "", *lines]
            print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
            return 0 if asked else 2
        name, args = f"eval {args[0]}", args[1:]
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        COMMANDS[name][1](args)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, Diverged) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

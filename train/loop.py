"""Training: from a configuration to a run folder with a trained model, whatever interrupts it on the way."""

import contextlib
import dataclasses
import itertools
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from train import plots
from train.checkpoint import CheckpointError, Checkpoints
from train.config import TrainConfig
from train.data import Batch, Batches, evaluation_batches, load_corpus, prefetch, tokenize
from train.errors import Diverged, Interrupted
from train.evaluate import Loss, LossMeter
from train.generate import Sampling, generate, prompt_tokens
from train.inspection import draw_choices
from train.mixture import Mixture
from train.model import Network
from train.report import Reporter, peak_flops, read_metrics
from train.runs import Run, check_same_data, checkpoints_in, claim_folder, make_metadata, read_metadata, versions
from train.step import Metrics, TrainState, abstract_state, init_state, make_train_step
from train.tokenizer import make_tokenizer, tokenizer_from_json


def default_folder(config: TrainConfig) -> Path:
    """runs/NAME, and runs/NAME-ATTENTION for the models that NSA is compared with."""
    attention = config.model.attention
    return Path("runs") / (config.name if attention == "nsa" else f"{config.name}-{attention}")


def train(config: TrainConfig, folder: Path) -> Run:
    """Train to the end, from where the folder's last checkpoint stands; see `train.runs` for what the folder holds.

    Raises:
        ValueError: the text, the configuration or the folder do not fit; nothing is trained then.
        CheckpointError: a checkpoint of the folder cannot be read, or the last one could not be saved.
        Diverged: several steps in a row were not finite.
        Interrupted: by a signal, after the state was saved.
    """
    corpus = load_corpus(config.data.text)
    checkpoints_folder = checkpoints_in(folder)
    with Checkpoints(checkpoints_folder, read_only=True) as earlier:
        metadata = read_metadata(earlier) if earlier.steps() else None
    if metadata is None:
        tokenizer = make_tokenizer(config.data.tokenizer, lambda: (document.text for document in corpus.train))
    else:
        tokenizer = tokenizer_from_json(metadata["tokenizer"])
    stream, held_out = tokenize(corpus.train, tokenizer), tokenize(corpus.validation, tokenizer)
    text = Batches(
        stream,
        context=config.context,
        batch_size=config.batch_size,
        seed=config.seed,
        packing=config.data.packing,
    )
    batches = text if config.data.task == "none" else Mixture(text, corpus.train, tokenizer, config)
    prompt_tokens(tokenizer, config.prompt, config.context)  # else its error would come at the end
    network = Network(config.model, tokenizer.vocab_size)
    step_function, meter = make_train_step(network, config), LossMeter(network)
    jax.eval_shape(step_function, abstract_state(network, config), batches.at(0))  # raises all that tracing can

    def held_out_batches() -> Iterator[Batch]:
        return evaluation_batches(
            held_out,
            context=config.context,
            batch_size=config.batch_size // config.optimizer.accumulate,
            packing=config.data.packing,
        )

    def validate(state: TrainState, limit: int | None) -> Loss:
        batches = itertools.islice(held_out_batches(), limit)
        return meter(state.params, batches, bytes_per_token=held_out.bytes_per_token)

    held_out_batches()  # raises if there is too little of it
    claim_folder(folder, config)
    if metadata is not None:
        check_same_data(metadata["data_sha256"], corpus.sha256, folder)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(checkpoints_folder, keep_last=config.keep_checkpoints))
        if metadata is None:
            state, first = init_state(network, config), 0
        else:
            state, first = checkpoints.restore(abstract_state(network, config))
        report = Reporter(
            folder,
            first_step=first,
            steps=config.steps,
            tokens_per_step=config.batch_size * config.context,
            flops_per_token=network.flops_per_token(config.context),
            peak=peak_flops(jax.devices()[0].device_kind),
            bytes_per_token=stream.bytes_per_token,
        )
        stack.enter_context(report)
        for line in _introduction(
            config, network, folder, corpus.description, len(stream.tokens), tokenizer.vocab_size
        ):
            report.say(line)
        if first:
            report.say(f"going on from step {first} of {config.steps}")

        loop = stack.enter_context(contextlib.ExitStack())
        signals = loop.enter_context(_caught_signals())
        steps = loop.enter_context(contextlib.closing(prefetch(batches.at, first, config.steps)))
        saved = make_metadata(config, tokenizer, corpus.sha256)
        pending: tuple[int, Metrics] | None = None
        for index, batch in steps:
            if index == first:
                report.say("compiling...")
                started = time.perf_counter()
            state, metrics = step_function(state, batch)
            done = index + 1
            if index == first:
                jax.block_until_ready(metrics)
                report.say(f"compiled in {time.perf_counter() - started:.1f} s")
                report.restart_clock(done)
            # Read one step late, so that the device need not wait for the host.
            if pending:
                _check_finite(*pending, config)
            pending = (done, metrics)
            if done % config.log_every == 0 or done == config.steps:
                _check_finite(done, metrics, config)
                report.train(
                    done,
                    loss=float(metrics.loss),
                    grad_norm=float(metrics.grad_norm),
                    learning_rate=float(metrics.learning_rate),
                    skipped=int(metrics.skipped),
                )
            validation = None
            if done % config.eval_every == 0 and done != config.steps:
                measured = validate(state, config.eval_batches)
                validation = measured.loss
                report.validation(done, loss=measured.loss, bits_per_byte=measured.bits_per_byte)
            if done % config.checkpoint_every == 0 and done != config.steps:
                checkpoints.save(done, state, saved, validation_loss=validation)
            if problem := checkpoints.failure():
                report.say(f"warning: {problem}")
            if validation is not None or done % config.checkpoint_every == 0:
                report.restart_clock(done)
            if signals:
                _finish_save(checkpoints, report)
                checkpoints.save(done, state, saved, validation_loss=validation)
                checkpoints.wait()
                name = signal.Signals(signals[0]).name
                message = f"stopped by {name} at step {done}, which is saved: the same command goes on from there"
                raise Interrupted(signals[0], message)
        loop.close()
        if first < config.steps:
            # Saved before the long measurement, with a loss that is measured as those of the checkpoints before.
            validation = validate(state, config.eval_batches).loss
            _finish_save(checkpoints, report)
            checkpoints.save(config.steps, state, saved, validation_loss=validation)
            checkpoints.wait()
        else:
            report.say(f"{folder} is trained to its last step already")
        result = validate(state, None)
        if not any(row["step"] == config.steps and "validation_loss" in row for row in read_metrics(report.path)):
            report.validation(config.steps, loss=result.loss, bits_per_byte=result.bits_per_byte)
        run = Run(folder, config.steps, config, tokenizer, network, state.params, corpus.sha256)
        for line in _finish(run, result, corpus.validation[0].text):
            report.say(line)
        report.say(f"best checkpoint by validation loss: step {checkpoints.best_step()}")
    return run


def _introduction(
    config: TrainConfig, network: Network, folder: Path, text: str, num_tokens: int, vocab_size: int
) -> Iterator[str]:
    device = jax.devices()[0]
    yield f"run {folder}: {text}; {num_tokens} tokens to train on, {vocab_size} in the vocabulary"
    yield (
        f"model: {network.num_params() / 1e6:.2f}M parameters, attention {config.model.attention}, "
        f"context {config.context}, {config.batch_size * config.context} tokens a step, on {device.device_kind} "
        f"(jax {jax.__version__})"
    )


def _finish_save(checkpoints: Checkpoints, report: Reporter) -> None:
    """Wait for the save in flight; that it failed matters no more once a later state is saved."""
    try:
        checkpoints.wait()
    except CheckpointError as error:
        report.say(f"warning: {error}")


def _check_finite(step: int, metrics: Metrics, config: TrainConfig) -> None:
    count = int(metrics.bad_in_a_row)
    if count >= config.optimizer.max_bad_steps:
        raise Diverged(
            f"step {step}: loss {float(metrics.loss)}, gradient norm {float(metrics.grad_norm)}. With max_bad_steps={count} "
            "such steps in a row the run stopped; they changed no parameters. Try a lower learning_rate, more warmup_steps or "
            "a smaller clip_norm, with another --run"
        )


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C end up in this list, for the loop to act on between two steps; a second one acts at once."""
    caught: list[int] = []

    def handler(signum: int, _: object) -> None:
        caught.append(signum)
        signal.signal(signum, before[signum])

    before = {int(signum): signal.signal(signum, handler) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def _finish(run: Run, result: Loss, text: str) -> Iterator[str]:
    """Measure, sample, draw; yields the lines that say what came out and where it lies."""
    folder = run.folder
    prompt = run.config.prompt
    sample = generate(run, prompt, sampling=Sampling(temperature=0.7), max_tokens=None, seed=0)
    (folder / "sample.txt").write_text(prompt + sample + "\n", encoding="utf-8")
    rows = read_metrics(folder / "metrics.jsonl")
    figures = [plots.loss_curve({folder.name: rows}, folder / "loss.png")]
    if run.config.model.attention == "nsa":
        figures += draw_choices(run, text, folder)
    summary = dict(
        config=run.config.name,
        attention=run.config.model.attention,
        steps=run.step,
        seed=run.config.seed,
        validation=dataclasses.asdict(result),
        device=jax.devices()[0].device_kind,
        versions=versions(),
    )
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    yield f"validation: {result}"
    yield f"sample: {prompt}|{sample}"
    written = [*figures, folder / "summary.json", folder / "sample.txt", checkpoints_in(folder)]
    yield "written: " + ", ".join(map(str, written))

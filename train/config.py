"""What is trained, on what and how: frozen dataclasses, their presets and their rules. Imports neither jax nor flax.

The docstrings of the fields are the command line's help.
"""

import dataclasses
import json
import math
import typing
from typing import Any, Literal

from nsa_jax.config import NSAConfig

AttentionName = Literal["nsa", "full", "window"]
NeedleTask = Literal[
    "passkey",
    "single_1",
    "single_2",
    "single_3",
    "multikey_1",
    "multikey_2",
    "multikey_3",
    "multivalue",
    "multiquery",
]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model: RMSNorm, SwiGLU, grouped key/value heads, rotary position."""

    attention: AttentionName = "nsa"
    """The same model with Native Sparse Attention, full causal attention, or the sliding window alone."""
    num_layers: int = 12
    """Layers."""
    model_dim: int = 512
    """Size of a token's vector between layers."""
    num_heads: int = 8
    """Query heads."""
    num_kv_heads: int = 2
    """Key/value heads (of each branch, with nsa); must divide num_heads."""
    head_dim: int = 64
    """Size of a head's queries and keys; even."""
    value_head_dim: int = 64
    """Size of a head's values."""
    mlp_dim: int = 1408
    """Width of the SwiGLU layer."""
    compression: Literal["mean", "linear", "mlp", "gated_pool"] = "mlp"
    """The map from a block of tokens to a compressed token (nsa)."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths; a larger one for a longer context."""
    normalize_qk: bool = True
    """RMS-normalise queries and keys."""
    tie_embeddings: bool = True
    """Use the token embeddings as the output matrix too."""
    remat: Literal["none", "attention", "full"] = "none"
    """What the backward pass computes again: nothing; all of a layer but attention's outputs; all of a layer."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the computation; parameters are float32."""
    implementation: Literal["xla", "pallas", "pallas_interpret"] | None = None
    """How NSA is computed; None takes the best for the device."""
    nsa: NSAConfig = NSAConfig()
    """Sizes of Native Sparse Attention, in tokens unless said; `window` is that of --attention window too."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text and how it becomes batches."""

    text: str = "austen"
    """"austen" (six novels, bundled), "stdlib" (the running Python's own sources), or a file, folder or glob of yours."""
    tokenizer: str = "bytes"
    """"bytes", "bpe:4096" (a BPE of that many tokens, trained on the text), or the path of a tokenizer.json."""
    packing: Literal["running", "documents"] = "running"
    """Whether attention and loss cross from one document to the next ("running") or not ("documents")."""
    task: Literal["none", "niah", "mqar"] = "none"
    """What is mixed into the text: needles in a haystack of it (niah), or key-value pairs to recall (mqar)."""
    task_share: float = 0.5
    """Share of the sequences that are of the task."""
    task_weight: float = 1.0
    """Weight in the loss of a task sequence, which counts at its answers alone; that of a text sequence is 1."""
    task_lengths: tuple[int, ...] = ()
    """Tokens of an example, drawn from these; the context if not given. As many as fit share a sequence, with packing
    "documents" alone."""
    curriculum_steps: int = 0
    """Steps over which the longer task_lengths join the shortest, one by one; 0: all from the start."""
    needles: tuple[NeedleTask, ...] = ("single_2", "multikey_1")
    """niah: tasks that are drawn from; they say how many needles there are (see `eval niah`)."""
    pairs: tuple[int, ...] = (4,)
    """mqar: key-value pairs of an example, drawn from those of these that fit: at most a quarter of its length."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps from zero to the peak."""
    final_fraction: float = 0.1
    """Where the cosine ends, after the last step, as a fraction of the peak."""
    weight_decay: float = 0.1
    """Decay of matrices (kernels and embeddings); nothing else decays."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory; must divide the batch size."""
    max_bad_steps: int = 5
    """Steps in a row with a loss or gradient that is not finite (each is skipped) after which the run stops."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    name: str
    """The preset's name; runs/NAME is the default run folder."""
    context: int = 8192
    """Tokens per sequence."""
    batch_size: int = 8
    """Sequences per step."""
    steps: int = 2000
    """Optimizer steps."""
    seed: int = 0
    """Of the parameters and the order of the data."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 200
    """Steps between measurements of the validation loss."""
    eval_batches: int = 16
    """Batches of a measurement during training; the one at the end reads the whole validation text."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints kept: the last ones, and beside them the best by validation loss."""
    prompt: str = "It is a truth universally acknowledged, that "
    """Continued at the end as a sample."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        model, optimizer = self.model, self.optimizer
        for owner, fields in (
            (self, ("context", "batch_size", "steps", "log_every", "eval_every", "eval_batches")),
            (self, ("checkpoint_every", "keep_checkpoints")),
            (model, ("num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "value_head_dim", "mlp_dim")),
            (optimizer, ("accumulate", "max_bad_steps")),
        ):
            for field in fields:
                if getattr(owner, field) < 1:
                    raise ValueError(f"{field}={getattr(owner, field)} must be at least 1")
        for owner, field in ((optimizer, "learning_rate"), (optimizer, "clip_norm"), (model, "rope_theta")):
            value = getattr(owner, field)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field}={value} must be positive and finite")
        for field in ("beta1", "beta2", "final_fraction", "weight_decay"):
            value, below_one = getattr(optimizer, field), field.startswith("beta")
            if not (value >= 0 and (value < 1 if below_one else math.isfinite(value))):
                raise ValueError(f"{field}={value} must be at least 0 and {'below 1' if below_one else 'finite'}")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be at least 0")
        if model.num_heads % model.num_kv_heads:
            raise ValueError(f"num_heads={model.num_heads} must be a multiple of num_kv_heads={model.num_kv_heads}")
        if model.head_dim % 2:
            raise ValueError(f"head_dim={model.head_dim} must be even, for rotary position")
        if self.batch_size % optimizer.accumulate:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of accumulate={optimizer.accumulate}")
        if not 0 <= optimizer.warmup_steps < self.steps:
            raise ValueError(
                f"warmup_steps={optimizer.warmup_steps} must be at least 0 and below steps={self.steps}: "
                "give fewer of them, or more steps"
            )
        if self.data.task != "none":
            self._check_task()
        if self.data.packing == "documents" and model.attention != "nsa" and self.context > MAX_PACKED_DENSE:
            raise ValueError(
                f"packing='documents' with attention={model.attention!r} needs a mask of context x context: "
                f"context={self.context} must be at most {MAX_PACKED_DENSE}, or packing be 'running', or attention 'nsa'"
            )

    def _check_task(self) -> None:
        data = self.data
        if not 0 < data.task_share <= 1:
            raise ValueError(
                f"task_share={data.task_share} must be above 0 and at most 1 (--task none leaves the task out)"
            )
        if not (data.task_weight > 0 and math.isfinite(data.task_weight)):
            raise ValueError(f"task_weight={data.task_weight} must be positive and finite")
        if data.curriculum_steps < 0:
            raise ValueError(f"curriculum_steps={data.curriculum_steps} must be at least 0")
        for length in data.task_lengths:
            if not 1 <= length <= self.context:
                raise ValueError(f"task_lengths={data.task_lengths} must lie between 1 and context={self.context}")
        if data.task == "niah":
            known = typing.get_args(NeedleTask)
            if not data.needles or not set(data.needles) <= set(known):
                raise ValueError(f"needles={data.needles} must be one or more of {', '.join(known)}")
        elif not data.pairs:
            raise ValueError("pairs=() must have one number or more, as in --pairs 4 8")


MAX_PACKED_DENSE = 8192

PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "tiny": (
        "1 million parameters, 256 bytes of context: under 3 minutes on 2 CPU cores",
        TrainConfig(
            name="tiny",
            context=256,
            batch_size=4,
            steps=600,
            log_every=20,
            eval_every=200,
            eval_batches=32,
            checkpoint_every=200,
            prompt="She had been ",
            model=ModelConfig(
                num_layers=4,
                model_dim=128,
                num_heads=4,
                num_kv_heads=2,
                head_dim=32,
                value_head_dim=32,
                mlp_dim=352,
                remat="attention",
                dtype="float32",
                nsa=NSAConfig(
                    compress_block=8, compress_stride=4, select_block=16, num_selected=6, num_local=2, window=32
                ),
            ),
            optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=60, final_fraction=0.0),
        ),
    ),
    "small": (
        "34 million parameters, 8k tokens of context: one GPU",
        TrainConfig(
            name="small",
            context=8192,
            batch_size=8,
            steps=2000,
            data=DataConfig(tokenizer="bpe:4096"),
            model=ModelConfig(
                num_layers=8,
                model_dim=512,
                num_heads=16,
                num_kv_heads=1,
                head_dim=64,
                value_head_dim=64,
                mlp_dim=1408,
                rope_theta=100_000.0,
                remat="attention",
            ),
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100),
        ),
    ),
    "base": (
        "115 million parameters, 32k tokens of context: one GPU with 80 GB",
        TrainConfig(
            name="base",
            context=32768,
            batch_size=4,
            steps=5000,
            data=DataConfig(tokenizer="bpe:8192"),
            model=ModelConfig(
                num_layers=12,
                model_dim=768,
                num_heads=32,
                num_kv_heads=2,
                head_dim=64,
                value_head_dim=64,
                mlp_dim=2048,
                rope_theta=500_000.0,
                remat="attention",
            ),
            optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=200, accumulate=2),
        ),
    ),
    "mqar": (
        "0.1 million parameters that learn associative recall (eval mqar): about a minute on 2 CPU cores",
        TrainConfig(
            name="mqar",
            context=128,
            batch_size=16,
            steps=400,
            log_every=20,
            eval_every=100,
            eval_batches=16,
            checkpoint_every=100,
            prompt="She had been ",
            data=DataConfig(
                packing="documents",
                task="mqar",
                task_share=0.8,
                task_lengths=(16, 32, 64, 128),
                curriculum_steps=100,
                pairs=(2, 4, 8, 16, 32),
            ),
            model=ModelConfig(
                num_layers=2,
                model_dim=64,
                num_heads=2,
                num_kv_heads=1,
                head_dim=32,
                value_head_dim=32,
                mlp_dim=128,
                dtype="float32",
                # A compressed token stands for a pair, so that recall takes one look and not two.
                nsa=NSAConfig(
                    compress_block=2, compress_stride=2, select_block=8, num_selected=6, num_local=2, window=16
                ),
            ),
            optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=50, final_fraction=0.0),
        ),
    ),
    "needle": (
        "0.5 million parameters that are taught to find a needle (eval niah), 512 tokens: half an hour on 2 CPU cores",
        TrainConfig(
            name="needle",
            context=512,
            batch_size=8,
            steps=1500,
            log_every=25,
            eval_every=250,
            eval_batches=4,
            checkpoint_every=250,
            prompt="She had been ",
            data=DataConfig(
                tokenizer="bpe:512",
                packing="documents",
                task="niah",
                task_share=0.75,
                task_lengths=(192, 256, 512),
                curriculum_steps=500,
                needles=("passkey", "single_2"),
            ),
            model=ModelConfig(
                num_layers=3,
                model_dim=96,
                num_heads=4,
                num_kv_heads=1,
                head_dim=32,
                value_head_dim=32,
                mlp_dim=192,
                dtype="float32",
                nsa=NSAConfig(
                    compress_block=8,
                    compress_stride=4,
                    select_block=16,
                    num_selected=5,
                    num_initial=0,
                    num_local=2,
                    window=32,
                ),
            ),
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=60, final_fraction=0.0),
        ),
    ),
    "niah": (
        "7 million parameters that are taught to find needles (eval niah), 8k tokens of context: one GPU",
        TrainConfig(
            name="niah",
            context=8192,
            batch_size=4,
            steps=5000,
            log_every=20,
            eval_every=1000,
            checkpoint_every=1000,
            data=DataConfig(
                tokenizer="bpe:512",
                packing="documents",
                task="niah",
                task_share=0.75,
                task_lengths=(384, 512, 1024, 2048, 4096, 8192),
                curriculum_steps=3600,
                needles=("passkey", "single_1", "single_2", "multikey_1"),
            ),
            model=ModelConfig(
                num_layers=4,
                model_dim=256,
                num_heads=16,
                num_kv_heads=1,
                head_dim=64,
                value_head_dim=64,
                mlp_dim=704,
                rope_theta=100_000.0,
                remat="attention",
            ),
            optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, final_fraction=0.0),
        ),
    ),
}


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """The config that `to_dict` wrote.

    Raises:
        ValueError: a field that this version does not know, or a value that breaks a rule.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}: written by another version of nsa-jax?")
    return kind(
        **{
            name: from_dict(hints[name], value) if dataclasses.is_dataclass(hints[name]) else _freeze(value)
            for name, value in values.items()
        }
    )


def _freeze(value: Any) -> Any:
    """JSON knows lists alone."""
    return tuple(value) if isinstance(value, list) else value


def differences(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """One line for each field in which two configs, as dicts, differ."""
    lines = []
    for name in sorted(set(saved) | set(wanted)):
        old, new = saved.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: {json.dumps(old)} there, {json.dumps(new)} here")
    return lines

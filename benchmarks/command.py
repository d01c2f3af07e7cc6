"""What the programs' command lines share. It imports no jax: `--help` is to be quick."""

import sys
from collections.abc import Callable, Sequence
from typing import Any


class NoGPU(Exception):
    """There is nothing to measure on."""


class WrongResult(Exception):
    """The kernels disagree with the reference: they have no time."""


def command_line(prog: str, options: type, run: Callable[[Any], Any], argv: Sequence[str]) -> int:
    """Parse `options` and call `run` with them; returns the exit code."""
    import tyro

    try:
        run(tyro.cli(options, prog=prog, args=argv))
    except (NoGPU, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WrongResult as error:
        print(f"error: the kernels are wrong, so they have no time: {error}", file=sys.stderr)
        return 1
    return 0

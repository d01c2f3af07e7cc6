"""How a run ends early: errors that are written for the user, and shown without a traceback."""


class Diverged(RuntimeError):
    """Too many steps in a row were not finite."""


class Interrupted(Exception):
    """SIGTERM or Ctrl-C; the state is saved. `exit_code` is the shell's for that signal."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum

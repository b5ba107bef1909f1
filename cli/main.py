"""The console script `mimo`: finds the subcommand, calls it, turns errors into one line and an exit status."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version


# a subcommand is a module beside this one with `add_parser(subparsers)` and `run(args) -> int`; its heavy imports
# belong inside `run`, so that `mimo --help` stays quick
SUBCOMMANDS = (
    "bench",
    "chat",
    "convert",
    "demo",
    "doctor",
    "inspect",
    "plan",
    "serve",
    "verify",
)

# exit statuses: 0 fine, 1 the command found problems, 2 bad input
BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as one line."""

    def error(self, message: str):
        self.exit(BAD_INPUT, f"mimo: error: {message} (see `{self.prog} --help`)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mimo", description="Tools for MiMo-V2 checkpoints.")
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    parser.add_argument("--version", action="version", version=f"mimo {version('modeling-mimo')} ({versions})")
    subparsers = parser.add_subparsers(title="subcommands", metavar="COMMAND", required=True)
    for name in SUBCOMMANDS:
        module = import_module(f"{__package__}.{name}")
        module.add_parser(subparsers).set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of `mimo argv...`; a wrong command line leaves through SystemExit, as argparse does."""
    args = build_parser().parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # the reader, e.g. `head`, has what it wanted; the interpreter must not flush into it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, NotImplementedError) as error:
        # an error of several lines lists problems; the whole list stays on the one line
        print("mimo: error: " + "; ".join(str(error).splitlines()), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("mimo: error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

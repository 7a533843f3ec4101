"""The `fairway` command: audits any evaluator, resumes and watches a run, checks results.

    fairway audit --evaluator my_script:evaluate --tokens val_000000.bin --vocab-size 1024
    fairway resume
    fairway watch
    fairway check results/quickstart
    fairway compare quickstart/causal quickstart/leaky

Exit status: 0 where no check fails (those not run or undecided are listed), 1 where one does, 2 for
bad usage and where the evaluator itself stops or raises, so that nothing was audited. `resume`
becomes Snakemake, whose status it has.
"""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence

from fairway.errors import UserError

COMMANDS = {
    "audit": ("check that an evaluator's scores are causal", "fairway.referee"),
    "resume": ("go on with the last run, after it was killed", "fairway.resume"),
    "watch": ("show how far a run is, while it runs or afterwards", "fairway.watch"),
    "check": ("tell which files of a run are missing, unfinished or changed", "fairway.check"),
    "compare": (
        "hold two finished runs, or two variants, against each other",
        "fairway.report.compare",
    ),
}
"""Name → what it does, in a line, and its module. Only that of the command that is given is
imported: some take seconds to load PyTorch, and `resume` should not wait for them."""


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the command, return the exit status."""
    # A reader that closes the pipe early (`fairway compare … | head`) is no fault.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    arguments = sys.argv[1:] if arguments is None else arguments
    parsed = _parser(arguments[:1]).parse_args(arguments)
    try:
        return parsed.run(parsed)
    except UserError as error:
        print(f"fairway: {error}", file=sys.stderr)
        return 2


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fairway", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (help_text, module_name) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text)
        if name in given:
            module = importlib.import_module(module_name)
            command.description = module.__doc__
            module.add_options(command)
            command.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())

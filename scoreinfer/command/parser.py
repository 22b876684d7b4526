"""The arguments of the command line, and the way from an error to an exit code."""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from scoreinfer.command import actions
from scoreinfer.command.doctor import doctor
from scoreinfer.command.exits import Exit, terminated_as_interrupted
from scoreinfer.command.progress import told_progress

EPILOG = """exit codes: 0 done and, where there is a verdict, a good one; 1 unforeseen error; 2 command line, model,
data or file cannot be used: do not run it again unchanged; 3 everything is written, but the verdict is bad; 75
interrupted: run the same command again, it goes on where it stopped if it has a store or a checkpoint"""
"""What the exit codes mean (`Exit`)."""
MODEL = "module:name of a NumPyro model, or of an NPSE or SMDP with options of its own"
"""Help on the models that commands take."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments. None means those of the process.

    Returns:
        The exit code (`Exit`).
    """
    arguments = make_parser().parse_args(argv)
    with told_progress(arguments.progress_seconds), terminated_as_interrupted():
        _say(f"{arguments.command} begins")
        code = _run(arguments)
        _say(f"{arguments.command} ends: {code.name.lower()}")
    return int(code)


def _run(arguments: argparse.Namespace) -> Exit:
    try:
        return arguments.action(arguments)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except (ValueError, FileNotFoundError) as error:
        if arguments.traceback:
            traceback.print_exc()
        _say(f"error: {error}")
        return Exit.UNUSABLE
    except Exception:
        traceback.print_exc()
        return Exit.FAILED


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands."""
    description = "Simulate, learn, calibrate and report, for the queue of a cluster."
    parser = argparse.ArgumentParser(prog="python -m scoreinfer", description=description, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_simulate(_command(commands, actions.simulate, "run a foreign simulator on draws of a prior; resumable"))
    _add_fit(_command(commands, actions.fit, "learn a posterior from simulations, and save it; resumable"))
    calibrate = _command(commands, actions.calibrate, "test a saved posterior on data with known parameters")
    _add_tested(calibrate)
    calibrate.add_argument("--output", metavar="PAGE.html", help="page to write")
    report = _command(commands, actions.report, "draw for given data, certify, calibrate, and write one page")
    _add_tested(report)
    report.add_argument("--output", metavar="PAGE.html", required=True, help="page to write")
    report.add_argument("--num-draws", type=int, default=4000, help="draws for the data (default: %(default)s)")
    report.add_argument("--draws", metavar="FILE.nc", help="file for the draws, in ArviZ's form")
    _command(commands, doctor, "versions, devices, dtype, cache, and a short test with a known answer")
    return parser


def _command(commands: Any, action: Callable[[argparse.Namespace], Exit], text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(action.__name__, help=text, description=text, epilog=EPILOG)
    command.set_defaults(action=action)
    command.add_argument("--traceback", action="store_true", help="show where an error was raised")
    command.add_argument(
        "--progress-seconds", type=float, default=30.0, metavar="SECONDS",
        help="time between lines of progress in a log file (default: %(default)s)",
    )  # fmt: skip
    return command


def _add_simulate(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="PRIOR", help="module:name of a NumPyro model without arguments")
    command.add_argument("simulator", metavar="SIMULATOR", help="module:name of (parameters, seed) -> arrays by name")
    command.add_argument("--num", type=int, required=True, help="number of simulations")
    command.add_argument("--store", metavar="FOLDER", required=True, help="folder of the results")
    _add_seed(command)
    where = command.add_mutually_exclusive_group()
    where.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    where.add_argument("--executor", metavar="MODULE:NAME", help="function that returns an executor (dask, MPI)")
    command.add_argument("--timeout", type=float, metavar="SECONDS", help="limit of one simulation")
    command.add_argument("--retries", type=int, default=0, help="runs after a failure (default: %(default)s)")


def _add_fit(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("--output", metavar="FOLDER", required=True, help="folder of the posterior")
    _add_seed(command)
    _add_arguments(command)
    command.add_argument("--simulations", metavar="FOLDER", help="store that `simulate` wrote, if MODEL is a prior")
    command.add_argument("--checkpoint", metavar="FOLDER", help="folder that keeps the training, to go on after a kill")
    for name, kind in {"num-simulations": int, "num-steps": int, "target-share": float, "max-seconds": float}.items():
        command.add_argument(f"--{name}", type=kind, help="as for NPSE and SMDP")
    command.add_argument("--tune", action="store_true", default=None, help="as for NPSE")


def _add_tested(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help=MODEL)
    command.add_argument("posterior", metavar="POSTERIOR", help="folder that `fit` wrote")
    command.add_argument("--num", type=int, required=True, help="number of simulated data sets")
    _add_seed(command)
    _add_arguments(command)
    command.add_argument("--simulations", metavar="FOLDER", help="store of other runs, if the simulator is foreign")


def _add_seed(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, required=True, help="seed of all random numbers")


def _add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--arguments", nargs="+", default=(), metavar="FILE",
        help="the model's keyword arguments, data included: arrays in .npz, or .json",
    )  # fmt: skip

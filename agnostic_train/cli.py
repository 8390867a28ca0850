"""The command line: `agnostic-train STAGE RECIPE [--section.key=value ...]`."""

import argparse
import errno
import gc
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from safetensors import SafetensorError

from agnostic_train import __version__
from agnostic_train.errors import UserError
from agnostic_train.pipeline import COMMANDS, OutOfMemoryError
from agnostic_train.recipe_file import load_recipe
from agnostic_train.recipe_keys import OWN_KEYS, recipe_keys, suggestion, training_argument_types

_PROCESS_LOST = ("Connection closed by peer", "Connection reset by peer")
"""In gloo's errors on the processes that wait for one that has failed."""
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # raised by a write, these errors name no file


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        # The flags are those of a stage.
        help_of = self.prog if " " in self.prog else f"{self.prog} STAGE"
        self.exit(2, f"agnostic-train: error: {message} (see {help_of} --help)\n")


def make_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Makes the command-line parser, with a subcommand per stage and a flag per recipe key.

    Args:
        arguments: the arguments that it will parse. TrainingArguments keys become flags only if they occur there:
            listing all of them means importing transformers, which takes seconds.
    """
    parser = _Parser(
        prog="agnostic-train",
        description="Find the neurons that carry a language in a Hugging Face model, and train only those.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"agnostic-train {__version__}")
    named = {it.partition("=")[0].removeprefix("--training.") for it in arguments if it.startswith("--training.")}
    named -= {key.partition(".")[2] for key in recipe_keys() if key.startswith("training.")}
    training_keys = sorted(named & training_argument_types().keys()) if named else []
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True, parser_class=_Parser)
    for stage, text in COMMANDS.items():
        command = stages.add_parser(
            stage,
            help=text,
            description=text[0].upper() + text[1:] + ". Runs the stages that it needs first, skips unchanged ones.",
            epilog="Flags override the recipe, and the recipe overrides defaults. Values are parsed as YAML.",
            allow_abbrev=False,
        )
        command.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as recipes/quickstart.yaml")
        command.add_argument("--force", action="store_true", help="run again even if nothing has changed")
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="only print what the stage would take: loads no weights, writes nothing",
        )
        groups: dict[str, argparse._ArgumentGroup] = {}
        for key, help_text in recipe_keys().items():
            section = key.partition(".")[0]
            group = groups.setdefault(section, command.add_argument_group(section))
            group.add_argument(
                f"--{key}", default=argparse.SUPPRESS, metavar="VALUE", help=help_text.replace("%", "%%")
            )
        for key in training_keys:
            groups["training"].add_argument(f"--training.{key}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        note = "and most keys of transformers' TrainingArguments (recipes/REFERENCE.md names the exceptions)"
        groups["training"].description = note
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the stage that the command line names.

    Returns:
        The exit status: 0 if the stage's files are complete, 1 if the device ran out of memory or another process
        failed, 2 for a user's mistake, 130 if interrupted.
    """
    is_command = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    # PEFT still reads the deprecated attribute, and recipes set the keys that older versions of transformers know, too.
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing(_kwargs)?` is deprecated", FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)
    parser = make_parser(arguments)
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_explain_unknown(unknown[0]))
    flags = {key: value for key, value in vars(known).items() if key not in ("stage", "recipe", "force", "dry_run")}
    try:
        recipe = load_recipe(known.recipe, flags)
        # Imported only now: their libraries take seconds to import, and a mistake in the recipe should show at once.
        if known.dry_run:
            from agnostic_train.pipeline.dry_run import print_plan

            print_plan(recipe, known.stage)
            return 0
        from agnostic_train.pipeline.run import Pipeline

        if is_command:
            # The libraries stay until the end. Frozen, they don't slow the garbage collections that each Trainer does.
            gc.freeze()
        pipeline = Pipeline(recipe, known.force, say=lambda line: print(line, flush=True))
        pipeline.run(known.stage)
        if pipeline.processes.is_main_process:
            from agnostic_train.report.terminal import print_results

            print_results(pipeline.directory, known.stage, recipe.training.languages)
    except UserError as error:
        return _fail(str(error))
    except OutOfMemoryError as error:
        return _fail(str(error), 1)
    except SafetensorError as error:  # also raised when the disk is full
        return _fail(f"a weight file can't be read or written ({error}); is the disk of output_dir full?")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else "output_dir: " if error.errno in _FULL_DISK else ""
        return _fail(f"{where}{error.strerror or error}")
    except RuntimeError as error:
        if not any(it in str(error) for it in _PROCESS_LOST):
            raise
        return _fail("another process ended; its message says why", 1)
    except KeyboardInterrupt:
        print("agnostic-train: interrupted; the same command resumes", file=sys.stderr)
        return 130
    return 0


def _is_news(record: logging.LogRecord) -> bool:
    """A log filter that drops the message of bitsandbytes, which PEFT imports, about an optional CPU kernel."""
    return "from kernels-community" not in record.getMessage()


def _explain_unknown(argument: str) -> str:
    if not argument.startswith("-"):
        return f"unexpected argument {argument}; only the recipe has no flag"
    name = argument.partition("=")[0]
    own_key = OWN_KEYS.get(name.removeprefix("--training."))
    if own_key is not None:
        return f"unknown flag {name}; it comes from the recipe's own key, --{own_key}"
    keys = [f"--{key}" for key in (*recipe_keys(), *(f"training.{key}" for key in training_argument_types()))]
    return f"unknown flag {name}{suggestion(name, [*keys, '--force', '--dry-run'])}"


def _fail(message: str, status: int = 2) -> int:
    print(f"agnostic-train: error: {' '.join(message.split())}", file=sys.stderr)
    return status

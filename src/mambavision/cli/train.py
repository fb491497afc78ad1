"""`mambavision train`: train or fine-tune on a folder of pictures, by flags or by a YAML recipe with flags on top."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mambavision.cli.arguments import UsageError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from rich.console import Console

    from mambavision.engine.config import TrainConfig

SUMMARY = "Train or fine-tune on a folder of pictures."
SHORT_FLAGS = {
    "--data": "--data.dir",
    "--val-split": "--data.val_split",
    "--workers": "--data.workers",
    "--model": "--model.name",
    "--pretrained": "--model.pretrained=true",
    "--checkpoint": "--model.checkpoint",
    "--batch-size": "--batch_size",
    "--lr": "--optim.lr",
    "--device": "--runtime.device",
    "--precision": "--runtime.precision",
    "--compile": "--runtime.compile=true",
}
EXAMPLES = """examples:
  mambavision train --data pictures --val-split 0.1 --model mamba_vision_T --pretrained --epochs 20
  mambavision train --config recipes/cifar10_nano.yaml --data cifar10 --seed 1
  mambavision train --config recipes/cifar10_nano.yaml --data cifar10 --resume auto

short flags: """ + ", ".join(f"{short} = {full}" for short, full in SHORT_FLAGS.items())


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Returns:
        0 when training has finished, also when unreadable pictures were passed over; 1 when the loss was not finite.

    Raises:
        UsageError: for settings or data that cannot be used.
    """
    from rich.console import Console

    from mambavision.engine.nonfinite import NonFiniteError
    from mambavision.engine.train import TrainingRun

    console = Console(highlight=False, markup=False, soft_wrap=True)
    try:
        config, resumed = parse(argv, console)
        run = TrainingRun(config, console, resumed)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    try:
        result = run.run()
    except NonFiniteError as error:
        print(f"mambavision train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped; the same command with --resume auto continues {config.output}.", file=sys.stderr)
        raise
    for name, path, top1 in (("best", result.best, result.best_top1), ("final", result.final, result.final_top1)):
        console.print(f"{name} weights, {top1:.2f} % top-1: {path}")
    return 0


def parse(argv: Sequence[str], console: Console) -> tuple[TrainConfig, dict[str, Any] | None]:
    """The run that the command line describes, and the checkpoint it continues from or None.

    A continued run has the settings in its checkpoint, with those of the command line on top; what differs is said.

    Raises:
        SystemExit: with code 2 on an unknown key, and with 0 after --help.
        ValueError: when a value is out of range, or the output folder holds another run.
    """
    from mambavision.engine.checkpoint import LAST, load_run

    argv = [_full(argument) for argument in argv]
    parser = build_parser()
    given = parser.parse_args(argv)
    last = Path(given.output) / LAST
    if given.resume is None:
        if last.exists():
            raise ValueError(f"{given.output} holds a run: continue it with --resume auto, or name another --output.")
        return _config(parser, given), None
    if given.resume != "auto":
        last = Path(given.resume)
    elif not last.exists():
        return _config(parser, given), None
    state = load_run(last)
    before = _flat(state["config"]) | {"output": str(last.parent)}
    parser.set_defaults(before)
    config = _config(parser, parser.parse_args(argv))
    if Path(config.output).resolve() != last.parent.resolve():
        raise ValueError(f"{last} continues in its own folder: leave --output out, or copy the whole folder first.")
    for name, value in _flat(config.to_dict()).items():
        if value != before.get(name):
            if name.startswith("model.") or name == "optim.name":
                raise ValueError(f"A continued run keeps its {name}: {before.get(name)!r} cannot become {value!r}.")
            console.print(f"continuing with {name} = {value} (was {before.get(name)})")
    console.print(f"continuing {last} after step {state['step']}")
    return config, state


def build_parser() -> ArgumentParser:
    """Flags and YAML keys of the command: the fields of `TrainConfig`, and --config and --resume."""
    from jsonargparse import ArgumentParser

    from mambavision.engine.config import TrainConfig

    class Parser(ArgumentParser):
        """Tells a mistake in one sentence, without the long list of what there is."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UsageError(" ".join(message.split()).replace("Parser key", "setting") + "; see --help.") from ex

    parser = Parser(
        prog="mambavision train",
        description=SUMMARY,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML recipe; flags after it change its settings.")
    parser.add_argument("--resume", help="A run's last.pt to continue, or auto for that in the output folder, if any.")
    parser.add_class_arguments(TrainConfig)
    groups = [name for name, value in vars(TrainConfig()).items() if dataclasses.is_dataclass(value)]
    for action in parser._actions:  # each group would offer a file of its own, under a name that is a short flag here
        if action.option_strings and action.option_strings[0].lstrip("-") in groups:
            action.help = argparse.SUPPRESS
    return parser


def _full(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    full = SHORT_FLAGS.get(flag, flag)
    return full.partition("=")[0] + equals + value if equals else full


def _config(parser: ArgumentParser, given: Any) -> TrainConfig:
    from mambavision.engine.config import TrainConfig

    settings = vars(parser.instantiate(given))
    return TrainConfig(**{key: value for key, value in settings.items() if key not in ("config", "resume")})


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as {group.name: value}; free dictionaries (overrides, kwargs) stay whole."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": entry for key, entry in value.items()})
        else:
            flat[name] = value
    return flat

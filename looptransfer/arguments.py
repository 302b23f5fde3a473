"""What the words of a command line stand for."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from looptransfer.errors import InputError
from looptransfer.text import plain_lines

if TYPE_CHECKING:
    from looptransfer.trials.run import Trainable

MOST_SEEDS = 1000
T = TypeVar("T")


def columns_of(texts: Sequence[str]) -> dict[str, str]:
    """{"lr": "config.lr"} from "lr=config.lr"."""
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, (name, _, there) in zip(texts, pairs, strict=True) if not name or not there]
    if wrong:
        raise InputError(f"--columns {wrong[0]!r}; write NAME=THERE, such as lr=config.lr")
    names = [name for name, _, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"--columns names {twice[0]!r} twice; give each once")
    return {name: there for name, _, there in pairs}


def listed(option: str, text: str, number: Callable[[str], T], example: str) -> list[T]:
    """Numbers separated by commas."""
    try:
        return [number(part) for part in text.split(",")]
    except ValueError:
        kind = "whole numbers" if number is int else "numbers"
        raise InputError(f"{option} is {text!r}; write {kind} separated by commas, such as {example}") from None


def seeds_of(text: str) -> int | list[int]:
    """A count from "4"; seeds from "0-3" or "0,2,5"."""
    spans = [re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part) for part in text.split(",")]
    ends = [(int(span[1]), int(span[2] or span[1])) for span in spans if span]
    how_many = re.fullmatch(r"\d{1,9}", text)
    count = int(text) if how_many else sum(high - low + 1 for low, high in ends)
    if len(ends) < len(spans) or any(high < low for low, high in ends) or count > MOST_SEEDS:
        raise InputError(
            f"--seeds is {text!r}; write how many, up to {MOST_SEEDS}, or which ones: 4, 0-3, 0,2,5 or 7-7"
        )
    return count if how_many else [seed for low, high in ends for seed in range(low, high + 1)]


def trainable_of(arguments: argparse.Namespace) -> "Trainable":
    """What EXPERIMENT names, or --cmd with its options.

    Raises:
        InputError: neither or both are given, or one is wrong.
    """
    if (arguments.experiment is None) == (arguments.cmd is None):
        raise InputError("give either EXPERIMENT, such as experiment.py, or --cmd with --metric")
    if arguments.cmd is None:
        given = {"--metric": arguments.metric, "--cmd-version": arguments.cmd_version, "--env": arguments.env}
        given |= {"--time-limit": arguments.time_limit, "--retries": arguments.retries}
        for option in [option for option, value in given.items() if value]:
            raise InputError(f"{option} is for --cmd; an EXPERIMENT has no use for it")
        from looptransfer.targets import load_trainable  # noqa: PLC0415

        return load_trainable(arguments.experiment)
    if arguments.metric is None:
        raise InputError("--cmd needs --metric, where the loss is, such as '{dir}/log.jsonl:val_loss'")
    from looptransfer.trials.command import Command  # noqa: PLC0415

    return Command(
        arguments.cmd,
        arguments.metric,
        arguments.cmd_version,
        arguments.time_limit,
        arguments.retries,
        _variables(arguments.env),
    )


def training_words(arguments: argparse.Namespace) -> list[str]:
    """The words by which another command trains the same."""
    if arguments.cmd is None:
        return [arguments.experiment]
    words = ["--cmd", arguments.cmd, "--metric", arguments.metric]
    options = {"--cmd-version": arguments.cmd_version, "--time-limit": arguments.time_limit}
    options |= {"--retries": arguments.retries}
    words += [word for option, value in options.items() if value for word in (option, f"{value}")]
    return words + [word for variable in arguments.env for word in ("--env", variable)]


def _variables(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, (name, sign, _) in zip(texts, pairs, strict=True) if not name or not sign]
    if wrong:
        raise InputError(f"--env {wrong[0]!r}; write NAME=VALUE")
    return {name: value for name, _, value in pairs}


def learning_rates(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `sweep` that say which LRs; `around` is still a number or a file."""
    if arguments.lrs is not None:
        if arguments.octaves is not None:
            raise InputError("--octaves are distances from --around; with --lrs give the LRs alone")
        return {"lrs": listed("--lrs", arguments.lrs, float, "0.001,0.002,0.004")}
    where = {"around": arguments.around}
    if arguments.octaves is not None:
        where["octaves"] = listed("--octaves", arguments.octaves, float, "--octaves=-1,0,1")
    return where


def centre_of(text: str, identity: Mapping[str, Any], home: Path) -> float:
    """The LR of --around. A file of another experiment earns a warning: tuning on one and sweeping another is a use."""
    from looptransfer.trials.sweep import read_tuned  # noqa: PLC0415

    try:
        return float(text)
    except ValueError:
        tuned = read_tuned(home / text)
    there, here = tuned["experiment"], json.loads(json.dumps(identity))
    keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    if keys:
        what = ", ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in keys)
        print(plain_lines(f"looptransfer: warning: {text} was tuned on another experiment ({what})"), file=sys.stderr)
    return float(tuned["lr"])

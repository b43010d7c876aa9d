"""The command that tells how good policies are."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ppo_rlhf.arguments import settings_in
from ppo_rlhf.errors import UserError
from ppo_rlhf.evaluation_settings import EvaluationSettings


def add_evaluate(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of runs, of pipelines, or of saved policies")
    parser.add_argument("--policy", nargs="+", default=[], metavar="NAME", help="others: names on the Hub, or folders")


def evaluate(given: Namespace) -> None:
    """Prints what is found of each policy, side by side."""
    settings, names = settings_in(given, EvaluationSettings), [*given.runs, *given.policy]
    if not names:
        raise UserError("name a RUN, or a --policy: whose responses are to be evaluated.")
    for run in given.runs:
        if not Path(run).is_dir():
            raise UserError(f"there is no run in {run}: no such folder; a name on the Hub is given as --policy.")
    if settings.output is not None and not Path(settings.output).absolute().parent.is_dir():
        raise UserError(f"--output {settings.output}: there is no folder {Path(settings.output).parent}.")
    if settings.output is not None and Path(settings.output).is_dir():
        raise UserError(f"--output {settings.output} is a folder; name a file in it.")

    from rich.console import Console

    from ppo_rlhf import evaluate as evaluation
    from ppo_rlhf.run import strict_json, write_text

    found = evaluation.evaluate(names, settings)
    if settings.output is not None:
        lines = [strict_json(row) + "\n" for each in found for row in each.rows]
        try:
            write_text(Path(settings.output), "".join(lines))
        except OSError as error:
            raise UserError(f"--output {settings.output} cannot be written: {error.strerror}.") from error
    if given.json:
        print(strict_json({"policies": [each.as_dict() for each in found]}))
        return
    evaluation.show(found, Console(highlight=False))

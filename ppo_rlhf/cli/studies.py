"""`ppo-rlhf study`: experiments of our own, each with its tables and a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ppo_rlhf.cli.outcome import Outcome
from ppo_rlhf.errors import UserError

GRID_OPTIONS = {"workers", "quick", "resume"}
OPTIONS = {  # of each study, besides --output-dir
    "kl-estimators": {"seed"},
    "overoptimization": GRID_OPTIONS | {"seed"},
    "ablations": GRID_OPTIONS | {"num_seeds"},
}


def add_study(parser: ArgumentParser) -> None:
    """The options of all studies."""
    parser.add_argument("name", choices=list(OPTIONS), help="which one")
    parser.add_argument("--output_dir", type=str, help="folder for its runs, tables and pictures")
    parser.add_argument("--seed", type=int, help="of kl-estimators and overoptimization: 0 without it")
    parser.add_argument("--num_seeds", type=int, help="of ablations: 5 without it")
    parser.add_argument("--workers", type=int, help="runs side by side, a core each; without it one for each core")
    parser.add_argument("--quick", action="store_true", help="runs that are too short to show anything, to try it out")
    parser.add_argument(
        "--resume", action="store_true", help="run what is not finished in --output-dir, whose settings stay"
    )


def study(given: Namespace) -> Outcome:
    """Runs a study; → what it found, and where its tables and pictures are."""
    for name in ("seed", "num_seeds", "workers", "quick", "resume"):
        if given[name] is not None and given[name] is not False and name not in OPTIONS[given.name]:
            raise UserError(f"study {given.name} has no option --{name.replace('_', '-')}.")
    for name in ("num_seeds", "workers"):
        if given[name] is not None and given[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} {given[name]} must be at least 1.")
    if given.seed is not None and not 0 <= given.seed < 2**31:
        raise UserError(f"--seed {given.seed} must lie between 0 and 2**31 - 1.")

    from ppo_rlhf.run import new_folder

    folder = new_folder(given.output_dir, f"study-{given.name}", resume=given.resume)
    studies: dict[str, Callable[[Namespace, Path], Outcome]] = {
        "kl-estimators": _kl_estimators,
        "overoptimization": _overoptimization,
        "ablations": _ablations,
    }
    return studies[given.name](given, folder)


def _kl_estimators(given: Namespace, folder: Path) -> Outcome:
    from ppo_rlhf.study import kl_estimators
    from ppo_rlhf.study.claims import lines_of
    from ppo_rlhf.study.toy_runs import begin, write_findings

    plan = kl_estimators.Plan(given.seed or 0)
    results = kl_estimators.run(plan.seed)
    begin(folder, plan)
    write_findings(folder, results, kl_estimators.document_of(results))
    summary, lines = _page(folder)
    return {"claims": [asdict(claim) for claim in results.claims], **summary}, [*lines_of(results.claims), *lines]


def _overoptimization(given: Namespace, folder: Path) -> Outcome:
    from ppo_rlhf.study import overoptimization
    from ppo_rlhf.study.claims import lines_of
    from ppo_rlhf.study.toy_runs import begun_plan

    plan = overoptimization.QUICK if given.quick else overoptimization.Plan()
    begun = begun_plan(folder, plan)
    plan = replace(plan if given.quick else begun, seed=begun.seed if given.seed is None else given.seed)
    claims = overoptimization.run(folder, plan, workers=_workers(given))
    summary, lines = _page(folder)
    return {"claims": [asdict(claim) for claim in claims], **summary}, [*lines_of(claims), *lines]


def _ablations(given: Namespace, folder: Path) -> Outcome:
    from ppo_rlhf.study import ablations
    from ppo_rlhf.study.toy_runs import begun_plan

    plan = ablations.QUICK if given.quick else ablations.Plan()
    begun = begun_plan(folder, plan)
    plan = replace(plan if given.quick else begun, num_seeds=given.num_seeds or begun.num_seeds)
    results = ablations.run(folder, plan, workers=_workers(given))
    summary, lines = _page(folder)
    return {**asdict(results), **summary}, [*ablations.lines_of(results), *lines]


def _workers(given: Namespace) -> int:
    from ppo_rlhf.run.grid import available_cores

    return given.workers or available_cores()


def _page(folder: Path) -> Outcome:
    """Draws the page of a study; → its files."""
    from ppo_rlhf.report import write_study

    files = [str(folder / "README.md"), str(folder / "results.json"), str(write_study(folder))]
    return {"output_dir": str(folder), "files": files}, [f"wrote {', '.join(files)}"]

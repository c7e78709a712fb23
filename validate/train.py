"""Trains a student on stored soft labels and on hard labels, by a schedule that alternates them.

python validate/train.py --data-dir D --label-dir L --val-dir V --output-dir O
    --dataset imagenet1k --model ResNet18
"""

import sys
from pathlib import Path

if not __package__:  # run as a plain script: imports start at the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib

from utils import cli, loggers, runlog
from utils.cli import UserError
from validate.plan import Plan, make_plan, parse_arguments
from validate.session import Session


def train(plan: Plan, run: runlog.RunFolder, workers: int, compiled: bool, val_cache: str) -> None:
    """Trains from the run's checkpoint, or from scratch, to the end of the schedule.

    SIGTERM and Ctrl-C end it after the optimiser step under way, with a checkpoint written.
    """
    if plan.machine.world > 1:
        accumulated = plan.machine.world * plan.settings["grad_accum"]
        print(
            f"{plan.machine.world} processes: an optimiser step takes {accumulated} batches of "
            f"{plan.spec.batch_size} = {accumulated * plan.spec.batch_size} views"
        )
    if run.started and not run.has_checkpoint:
        print(f"{run.path}: stopped before its first checkpoint; starting over")
    session = Session(plan, run, workers, compiled, val_cache)
    if plan.machine.rank == 0:
        run.begin(session.reached.epochs)
    with cli.delayed_signals() as session.noted:
        while session.reached.epochs < len(plan.kinds):
            session.train_epoch()
    session.bar.close()
    if plan.machine.rank == 0:
        run.finish(session.result())
        print(f"{run.path}: {describe_result(session.result())}")


def describe_result(result: dict) -> str:
    """One line: best and last top-1, label bytes, seconds."""
    best, last = result["best"], result["last"]
    return (
        f"top-1 best {best['top1']:.2f} % (epoch {best['epoch']}), last {last['top1']:.2f} %; "
        f"{result['label_bytes']:,} label bytes, {result['seconds']:.0f} s"
    )


def main() -> None:
    args = parse_arguments()
    plan = make_plan(args)
    others = {name: str(value) for name, value in vars(args).items() if name not in plan.settings}
    run = runlog.RunFolder(args.output_dir, plan.settings, others)
    run.openers = loggers.from_arguments(args)
    if run.started and args.resume == "off":
        raise UserError(f"{args.output_dir} holds a run already; --resume auto continues it")
    if result := run.result():
        print(f"{args.output_dir} is done: {describe_result(result)}")
        return
    with run.locked() if plan.machine.rank == 0 else contextlib.nullcontext():
        train(plan, run, args.workers, args.compile, args.val_cache)


if __name__ == "__main__":
    cli.run(main)

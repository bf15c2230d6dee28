"""Are the rows of the paper's tables, made at small scale, in the paper's order?

    python bench/paper_small.py --table 3|5|9|10|photos|all --base FOLDER --data FOLDER [--start RUN]

    orderings        how many orderings the paper states in the tables that were run
    orderings_held   how many of them hold here; each is also a figure, 1 or 0
    orderings_held_in_pairs    the same, when each subject is compared with itself

Table 3: a larger λ gives less likeness and follows the prompt better; without λ the prompt is followed least.
Tables 9 and 10: a larger κ of HM-CFG does the opposite.  Table 5: HM-CFG against CFG, for the hypernetwork
and for DreamBooth.  photos: one, two and four photos of a subject.  bench/paper_tables.py defines the rows,
bench/paper_rows.py when an ordering holds, bench/scoring.py how pictures are scored.

All rows are drawn with the same unseen subjects and the same noise.  A table is written to --output, as JSON
and as a plot.  Table 3 trains a hypernetwork for each λ with `hyperrt train`.  These hypernetworks,
DreamBooth's subjects and the exported bundle are kept in --work and reused.

The hypernetworks of table 3 are trained as in the paper's closed category, where they overfit: the picture
that is denoised is the one photo that they see (photos 1, cross_view 0), and its caption, "a [V] robot", does
not name its scene.  So the LoRA learns the scene and draws it whatever the prompt says.  With the defaults of
training/run/config.py, the targets are other views and the captions name the scene; there is little to
overfit, and scenes are right at any κ.  Training from scratch takes hours to learn what subjects look like;
--start continues a run that has learnt it.  The other tables use the hypernetwork of --lambda, unless
--hypernet names another run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import paper_plots
import paper_subjects
import paper_tables
import report
import scoring
import small_drawing
import small_world
from paper_rows import Row, Table
from paper_subjects import Lab

from hyperrt import Runtime, files
from hyperrt.bundle.bundle import Bundle
from hyperrt.training.finetune import DreamBoothConfig
from hyperrt.training.model import base_model as bases
from hyperrt.training.run import device
from hyperrt.training.run.config import TrainConfig

OUTPUT = report.ROOT / "docs" / "results"
TABLES: dict[str, Callable[[Lab], Table]] = {
    "3": paper_tables.table3,
    "5": paper_tables.table5,
    "9": lambda lab: paper_tables.kappas(lab, "table9"),
    "10": lambda lab: paper_tables.kappas(lab, "table10"),
    "photos": paper_tables.photos,
}
OVERFIT = {"photos": 1, "cross_view": 0.0}  # as the paper trains
# What a quick run trains with: enough to write a checkpoint.
QUICK = {"batch_size": 4, "holdout": 2, "dim": 16, "layers": 1, "iterations": 1}


def main() -> None:
    parser = small_world.options(__doc__)
    parser.add_argument("--table", choices=[*TABLES, "all"], default="all")
    parser.add_argument(
        "--hypernet", type=Path, metavar="RUN", help="run of `hyperrt train`; not for table 3"
    )
    parser.add_argument("--start", type=Path, metavar="RUN", help="run that the hypernetworks continue")
    parser.add_argument("--output", "-o", type=Path, help=f"default: {OUTPUT.relative_to(report.ROOT)}")
    parser.add_argument("--work", type=Path, help="reused files (default: beside the base model)")
    parser.add_argument("--subjects", type=int, default=100)
    parser.add_argument("--scenes", type=int, default=1, help="scenes of a subject, besides white")
    parser.add_argument("--steps", type=int, default=15, help="steps of the solver")
    parser.add_argument("--train-steps", type=int, default=300, help="steps of each hypernetwork")
    parser.add_argument("--train-batch-size", type=int, default=64, dest="train_batch")
    parser.add_argument("--lambdas", type=float, nargs="+", default=paper_tables.LAMBDAS)
    parser.add_argument(
        "--lambda", type=float, default=TrainConfig.lambda_, dest="usual", help="λ of the other tables"
    )
    parser.add_argument("--dreambooth-steps", type=int, default=DreamBoothConfig.steps)
    parser.add_argument("--lr", type=float, default=DreamBoothConfig.lr, help="learning rate of DreamBooth")
    parser.add_argument("--seed", type=int, default=2, help="chooses the subjects")
    args = parser.parse_args()
    if args.quick:
        args.subjects, args.steps, args.train_steps, args.dreambooth_steps = 1, 2, 1, 1
        args.lambdas = args.lambdas[:2]
    with (
        small_world.refusals(),
        small_world.opened(args, random=args.quick) as world,
        opened_lab(args, world) as lab,
    ):
        write(args, lab)


@contextlib.contextmanager
def opened_lab(args: argparse.Namespace, world: small_world.World) -> Iterator[Lab]:
    """The lab of the options, with an open runtime."""
    device.prepare(args.threads)
    work = args.work or world.base.parent / "bench"
    base = bases.opened(world.base)
    training = {"steps": args.train_steps, "batch_size": args.train_batch, "threads": args.threads} | OVERFIT
    if args.quick:
        training |= QUICK
        bundle = Bundle.open(args.bundle)  # of another base model; an export would take too long
    else:
        run = args.hypernet or paper_subjects.trained(world, training, args.usual, work, args.start)
        bundle = Bundle.open(small_drawing.exported(world, run, work))
    training |= {"rank": bundle.layout.rank}
    tuning = DreamBoothConfig(steps=args.dreambooth_steps, lr=args.lr, token=bundle.prompts.token)
    with Runtime.open(bundle.path, "onnxruntime", threads=args.threads) as runtime:
        cases = scoring.cases(args.seed, args.subjects)
        scorer = scoring.Scorer(scoring.encoder(bundle, args.quick), cases, args.scenes)
        studio = small_drawing.Studio(runtime, scorer, args.steps, 1000 * args.seed)
        yield Lab(world, base, studio, training, tuple(args.lambdas), tuning, work, args.start)


def write(args: argparse.Namespace, lab: Lab) -> None:
    """Makes and writes each table; reports the orderings."""
    ceiling = Row("real pictures", {}, lab.studio.scorer.real())
    orderings = []
    with contextlib.ExitStack() as stack:
        if args.quick and not args.output:
            args.output = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in TABLES if args.table == "all" else [args.table]:
            table = TABLES[name](lab)
            show(table, ceiling)
            keep(args, table, ceiling)
            orderings += table.orderings
    figures = {
        "orderings_held": sum(ordering.held for ordering in orderings),
        "orderings_held_in_pairs": sum(ordering.in_pairs for ordering in orderings),
        "orderings": len(orderings),
    }
    report.finish(__file__, figures | {ordering.name: int(ordering.held) for ordering in orderings})


def show(table: Table, ceiling: Row) -> None:
    """Prints a table for people."""
    print(f"{table.title}; {len(ceiling.scores[scoring.SUBJECT])} subjects\n")
    head = scoring.NAMES
    rows = [(row.label, *(str(row.interval(name)) for name in head)) for row in [*table.rows, ceiling]]
    report.table(rows, ("", *head))


def keep(args: argparse.Namespace, table: Table, ceiling: Row) -> None:
    """Writes a table as JSON and as a plot."""
    output = args.output or OUTPUT
    output.mkdir(parents=True, exist_ok=True)
    hypernet = args.hypernet.name if args.hypernet else f"as in table 3, lambda {args.usual:g}"
    about = {
        **table.to_json(), "real": ceiling.to_json()["scores"],
        "hypernet": "one for each lambda" if table.name == "table3" else hypernet,
        "subjects": args.subjects, "scenes": args.scenes, "seed": args.seed, "solver_steps": args.steps,
        "commit": report.commit(), "machine": report.machine(),
    }  # fmt: skip
    content = json.dumps(about, indent=1, ensure_ascii=False).encode() + b"\n"
    files.publish(output / f"{table.name}.json", lambda file: file.write(content), force=True)
    paper_plots.write(table, output / f"{table.name}.png")


if __name__ == "__main__":
    main()

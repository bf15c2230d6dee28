"""The tables of the paper at small scale: are the rows in the order in which the paper has them?

    python bench/paper_small.py --table 3|5|9|10|photos|all --model BASE --data CACHE [--start RUN]

    orderings        things that the paper's tables say, of the tables that were run
    orderings_held   how many of them hold here; each is a figure of its own, 1 or 0
    orderings_held_in_pairs    the same, each subject being compared with itself

Table 3: λ trades likeness for the prompt, and without it the prompt is followed least.  Tables 9 and 10: so
does κ of HM-CFG, the other way.  Table 5: HM-CFG against CFG, for the hypernetwork and for DreamBooth.
photos: one, two and four photos of a subject.  What each row is, is said in bench/paper_tables.py, when an
ordering holds in bench/paper_rows.py, how pictures are scored in bench/scoring.py.

Every point is drawn of the same unseen subjects with the same noise.  A table goes to --output, as JSON and
as a plot.  Table 3 trains a hypernetwork for each λ by `hyperrt train`; these, DreamBooth's subjects and the
exported bundle are kept in --work and used again.

The hypernetworks of table 3 are trained as the paper's of the closed category, which is what makes them
overfit: the picture that is denoised is the one photo that they see (photos 1, cross_view 0), and its
caption, "a [V] robot", says nothing of its scene.  So the LoRA has to hold the scene, and draws it whatever
the prompt says.  With the defaults of training/run/config.py, other views as targets and captions that name
the scene, there is little to overfit, and scenes come right at any κ.  Such training from nothing takes hours
to find what a subject looks like; with --start it goes on from a run that knows.  The other tables take the
hypernetwork of --lambda, unless --hypernet names another run.
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
        "--hypernet", type=Path, metavar="RUN", help="a run of `hyperrt train` for tables but 3"
    )
    parser.add_argument("--start", type=Path, metavar="RUN", help="a run that the hypernetworks go on from")
    parser.add_argument("--output", type=Path, help=f"folder (default: {OUTPUT.relative_to(report.ROOT)})")
    parser.add_argument("--work", type=Path, help="what is kept (default: a folder beside the model)")
    parser.add_argument("--subjects", type=int, default=100)
    parser.add_argument("--scenes", type=int, default=1, help="scenes of a subject beside the white one")
    parser.add_argument("--steps", type=int, default=15, help="of the solver")
    parser.add_argument("--train-steps", type=int, default=300, help="of a hypernetwork of these tables")
    parser.add_argument("--train-batch", type=int, default=64)
    parser.add_argument("--lambdas", type=float, nargs="+", default=paper_tables.LAMBDAS)
    parser.add_argument(
        "--lambda", type=float, default=TrainConfig.lambda_, dest="usual", help="of the other tables"
    )
    parser.add_argument("--dreambooth-steps", type=int, default=DreamBoothConfig.steps)
    parser.add_argument("--lr", type=float, default=DreamBoothConfig.lr, help="of DreamBooth")
    parser.add_argument("--seed", type=int, default=2, help="other subjects")
    args = parser.parse_args()
    if args.quick:
        args.subjects, args.steps, args.train_steps, args.dreambooth_steps = 1, 2, 1, 1
        args.lambdas = args.lambdas[:2]
    with (
        small_world.refusals(),
        small_world.opened(args, random=args.quick) as world,
        lab(args, world) as found,
    ):
        write(args, found)


@contextlib.contextmanager
def lab(args: argparse.Namespace, world: small_world.World) -> Iterator[Lab]:
    """The lab of a run, with its runtime open."""
    device.prepare(args.threads)
    work = args.work or world.base.parent / "bench"
    base = bases.opened(world.base)
    training = {"steps": args.train_steps, "batch_size": args.train_batch, "threads": args.threads} | OVERFIT
    if args.quick:
        training |= QUICK
        bundle = Bundle.open(args.bundle)  # of another base model; an export takes longer than all the rest
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


def write(args: argparse.Namespace, found: Lab) -> None:
    """Make the tables, write each, and report the orderings."""
    ceiling = Row("real pictures", {}, found.studio.scorer.real())
    orderings = []
    with contextlib.ExitStack() as stack:
        if args.quick and not args.output:
            args.output = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in TABLES if args.table == "all" else [args.table]:
            table = TABLES[name](found)
            show(table, ceiling)
            keep(args, table, ceiling)
            orderings += table.orderings
    figures = {
        "orderings_held": sum(one.held for one in orderings),
        "orderings_held_in_pairs": sum(one.in_pairs for one in orderings),
        "orderings": len(orderings),
    }
    report.finish(__file__, figures | {one.name: int(one.held) for one in orderings})


def show(table: Table, ceiling: Row) -> None:
    """Print a table for people."""
    print(f"{table.title}; {len(ceiling.scores[scoring.SUBJECT])} subjects\n")
    head = scoring.NAMES
    rows = [(row.label, *(str(row.interval(name)) for name in head)) for row in [*table.rows, ceiling]]
    report.table(rows, ("", *head))


def keep(args: argparse.Namespace, table: Table, ceiling: Row) -> None:
    """Write a table as JSON and as a plot."""
    output = args.output or OUTPUT
    output.mkdir(parents=True, exist_ok=True)
    one = args.hypernet.name if args.hypernet else f"as in table 3, lambda {args.usual:g}"
    about = {
        **table.to_json(), "real": ceiling.to_json()["scores"],
        "hypernet": "one for each lambda" if table.name == "table3" else one,
        "subjects": args.subjects, "scenes": args.scenes, "seed": args.seed, "solver_steps": args.steps,
        "commit": report.commit(), "machine": report.machine(),
    }  # fmt: skip
    content = json.dumps(about, indent=1, ensure_ascii=False).encode() + b"\n"
    files.publish(output / f"{table.name}.json", lambda file: file.write(content), force=True)
    paper_plots.write(table, output / f"{table.name}.png")


if __name__ == "__main__":
    main()

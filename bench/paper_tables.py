"""Defines the tables of bench/paper_small.py: the settings of their rows, and the orderings to test.

Every function takes the lab and returns a `Table`.  How the paper's settings are translated:

* Scales: HM-CFG of scale s guides as strongly as CFG of 2 s if both prompts agree, so CFG has twice the scale
  of the bundle.  HM-CFG has the scale of the bundle in table 5, and 0.7 of it in tables 9 and 10, so that
  colours do not saturate before the last κ.  (The paper has 0.93 and 0.7 of CFG's scale, which is stronger;
  here the colours would saturate, and the comparison would show that instead of the guidance.)
* Photos: tables 3 and 9 have one photo of a subject, as in the paper's closed category; tables 5 and 10 have
  all four, as in DreamBooth and DreamBench.
"""

from __future__ import annotations

import paper_rows
import paper_subjects
from paper_rows import Row, Table
from paper_subjects import Lab, Made
from scoring import COLOURS, PROMPT, SUBJECT
from small_drawing import Guidance

# The default of training/run/config.py, 0.05, adds 0.0003 to a loss of 0.17: no difference from 0 is visible.
LAMBDAS = (0.0, 2.0, 5.0, 20.0)
KAPPAS = {"table9": (0.4, 0.6, 0.8, 1.0, 1.2, 1.6), "table10": (0.4, 0.8, 1.0, 1.2, 1.4, 1.6)}
SCALES = {"table5": 1.0, "table9": 0.7, "table10": 0.7}  # of HM-CFG, as a multiple of the bundle's scale
PULL = 2.0  # scale of CFG, as a multiple of the bundle's scale
TABLE_PHOTOS = {"table3": 1, "table9": 1, "table10": 4}
PHOTOS = (1, 2, 4)


def cfg(lab: Lab) -> Guidance:
    """Plain CFG of the personalised model, as strong as the bundle's HM-CFG."""
    return Guidance(PULL * lab.studio.runtime.bundle.defaults.guidance_scale, None)


def hm_cfg(lab: Lab, table: str, kappa: float) -> Guidance:
    """HM-CFG at the scale of a table."""
    return Guidance(SCALES[table] * lab.studio.runtime.bundle.defaults.guidance_scale, kappa)


def table3(lab: Lab) -> Table:
    """λ: hypernetworks trained with increasing regularisation, drawn with plain CFG."""
    rows = []
    photos = TABLE_PHOTOS["table3"]
    for lambda_ in lab.lambdas:
        subjects = lab.predicted_by(lab.hypernetwork(lambda_), photos)
        scores = lab.studio.scores(subjects, cfg(lab))
        rows.append(Row(f"λ {lambda_:g}", {"lambda": lambda_}, scores))
    others = rows[1:]
    orderings = [
        paper_rows.falls("table3_likeness_falls_with_lambda", rows, SUBJECT),
        paper_rows.rises("table3_prompt_rises_with_lambda", rows, PROMPT),
        paper_rows.all_above(
            "table3_without_lambda_most_like_the_subject", [(rows[0], other) for other in others], SUBJECT
        ),
        paper_rows.all_above(
            "table3_without_lambda_least_as_the_prompt_says", [(other, rows[0]) for other in others], PROMPT
        ),
    ]
    training, origin = paper_subjects.going_on(lab.training, lab.start)
    settings = {
        "guidance_scale": cfg(lab).scale, "photos": photos, "steps_of_each": lab.training["steps"],
        "went_on_from": origin, **training,
    }  # fmt: skip
    return Table("table3", "Table 3: weight λ of R(h), plain CFG", rows, orderings, settings)


def kappas(lab: Lab, name: str) -> Table:
    """κ, for tables 9 and 10; the last row is plain CFG."""
    photos = TABLE_PHOTOS[name]
    predicted = lab.predicted(photos)
    sweep = []
    for kappa in KAPPAS[name]:
        scores = lab.studio.scores(predicted.subjects, hm_cfg(lab, name, kappa))
        sweep.append(Row(f"κ {kappa:g}", {"kappa": kappa}, scores))
    plain = Row("CFG", {"kappa": None}, lab.studio.scores(predicted.subjects, cfg(lab)))
    orderings = [
        paper_rows.rises(f"{name}_likeness_rises_with_kappa", sweep, SUBJECT),
        paper_rows.rises(f"{name}_colours_rise_with_kappa", sweep, COLOURS),
        paper_rows.falls(f"{name}_prompt_falls_with_kappa", sweep, PROMPT),
    ]
    if name == "table9":
        pairs = [(row, plain) for row in sweep]
        orderings.append(paper_rows.all_above(f"{name}_prompt_of_every_kappa_above_cfg", pairs, PROMPT))
    settings = {
        "guidance_scale": hm_cfg(lab, name, 1.0).scale, "cfg_scale": cfg(lab).scale, "photos": photos
    }  # fmt: skip
    title = f"Table {name.removeprefix('table')}: κ of HM-CFG, {photos} photo{'s' * (photos > 1)}"
    return Table(name, title, [*sweep, plain], orderings, settings)


def table5(lab: Lab) -> Table:
    """HM-CFG against CFG, for the hypernetwork and for DreamBooth."""
    made = {"hypernet": lab.predicted(), "dreambooth": lab.fine_tuned()}
    ways = {"CFG": cfg(lab), "HM-CFG": hm_cfg(lab, "table5", 1.0)}
    rows = {
        (method, way): _row(lab, f"{method}, {way}", subjects, guidance)
        for method, subjects in made.items()
        for way, guidance in ways.items()
    }
    orderings = []
    for method in made:
        pair = rows[method, "HM-CFG"], rows[method, "CFG"]
        orderings += [
            paper_rows.above(f"table5_hm_cfg_raises_prompt_of_{method}", *pair, PROMPT),
            paper_rows.not_below(f"table5_hm_cfg_keeps_likeness_of_{method}", *pair, SUBJECT),
        ]
    for way in ways:
        pair = rows["hypernet", way], rows["dreambooth", way]
        word = way.lower().replace("-", "_")
        orderings.append(paper_rows.above(f"table5_hypernet_above_dreambooth_by_{word}", *pair, SUBJECT))
    faster = made["hypernet"].seconds < made["dreambooth"].seconds
    orderings.append(paper_rows.compared("table5_hypernet_takes_less_time", faster))
    settings = {
        "guidance_scale": ways["HM-CFG"].scale, "kappa": 1.0, "cfg_scale": ways["CFG"].scale,
        "dreambooth_steps": lab.fine_tuning.steps, "dreambooth_lr": lab.fine_tuning.lr,
    }  # fmt: skip
    return Table("table5", "Table 5: HM-CFG and CFG", [*rows.values()], orderings, settings)


def photos(lab: Lab) -> Table:
    """Number of photos that are averaged, as in section 5.2; drawn with HM-CFG as in table 10."""
    guidance = hm_cfg(lab, "table10", 1.0)
    rows = []
    for count in PHOTOS:
        scores = lab.studio.scores(lab.predicted(count).subjects, guidance)
        rows.append(Row(f"{count} photo{'s' * (count > 1)}", {"photos": count}, scores))
    orderings = [
        paper_rows.rises("photos_likeness_rises", rows, SUBJECT),
        paper_rows.rises("photos_colours_rise", rows, COLOURS),
    ]
    settings = {"guidance_scale": guidance.scale, "kappa": guidance.kappa}
    return Table("photos", "Photos of a subject", rows, orderings, settings)


def _row(lab: Lab, label: str, made: Made, guidance: Guidance) -> Row:
    scores = lab.studio.scores(made.subjects, guidance)
    point = {"method": label, "guidance_scale": guidance.scale, "kappa": guidance.kappa}
    return Row(label, point, scores, {"seconds_per_subject": made.seconds})

"""What was not measured, and the commands that measure it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from fpq_analysis.choices import DATASETS
from fpq_analysis.measures import MEASURES
from fpq_analysis.plots import Drawing
from fpq_analysis.report.study import Study
from fpq_analysis.runs.run import FOREIGN_OPTIONS

# Of networks whose weights other code rounds, which have no other definition: what their commands need.
LATENT = {
    "hessian": " --definition latent",
    "gradnorm": " --definition latent",
    "landscape": " --weights requantized",
}


@dataclass(frozen=True)
class Missing:
    """What has no records.

    Attributes:
        names: figures, or what a measurement without one is called; each with the command that measures it.
        undrawn: figures whose records hold nothing to draw, each with the reason and the command that measures it.
        together: one command for the shell that measures all of it and makes the page again; empty if nothing is.
    """

    names: list[tuple[str, str]]
    undrawn: list[tuple[str, str, str]]
    together: str

    @property
    def by_command(self) -> list[tuple[str, str]]:
        """What each command measures, with commas, and the command."""
        found: dict[str, list[str]] = {}
        for name, command in self.names:
            found.setdefault(command, []).append(name)
        return [(", ".join(names), command) for command, names in found.items()]


def not_measured(study: Study, undrawn: Mapping[Drawing, str]) -> Missing:
    """What there is no record of: figures, as far as these networks have them, and sharpness, which has none.

    Args:
        undrawn: figures with the reason that there is none, empty where there are no records.
    """
    wanted = [one for one, why in undrawn.items() if not why and (study.quantized or not MEASURES[one.probe].quantized)]
    found = {drawing.title: drawing.command for drawing in wanted}
    if "sharpness" not in study.probes:
        found["Sharpness"] = "hessian --sharpness"
    folder = f"--ckpt-dir {shlex.quote(str(study.root))}"
    if study.kept != study.root:
        folder += f" --records {shlex.quote(str(study.kept))}"
    foreign = _foreign(study)
    only = LATENT if study.definition == "latent" else {}
    if only:
        found.pop("Sharpness", None)  # it has no meaning there
    options: dict[str, str] = {}  # commands of one name are one, with the options of all
    for name, _, own in (command.partition(" ") for command in found.values()):
        if own not in options.setdefault(name, ""):
            options[name] += f" {own}"
    behind = {name: f"{folder}{foreign}{only.get(name, '')}" for name in options}
    together = [f"fpq-analyze {name}{own} {behind[name]}" for name, own in options.items()]
    return Missing(
        [(name, f"fpq-analyze {command} {behind[command.partition(' ')[0]]}") for name, command in found.items()],
        [(drawing.title, why, f"fpq-analyze {drawing.command}") for drawing, why in undrawn.items() if why],
        "; \\\n".join([*together, f"fpq-analyze report {folder}"]) if together else "",
    )


def _foreign(study: Study) -> str:
    """The options that name network and data of another program's runs, as far as the records say them."""
    theirs = [run for run in study.runs if run.described]
    if not theirs:
        return ""
    models, data = ({getattr(run, what) for run in theirs} for what in ("model", "dataset"))
    if len(models) > 1 or len(data) > 1:
        return f" {FOREIGN_OPTIONS}"
    model, name = models.pop(), data.pop()
    known = name in DATASETS or ":" in name or name.endswith(".npz")
    return f" --model {shlex.quote(model)} --data {shlex.quote(name) if known else 'NAME'}"

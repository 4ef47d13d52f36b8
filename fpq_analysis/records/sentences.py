"""What a figure shows, in sentences computed from its records, each with its interval."""

from __future__ import annotations

import pandas as pd

from fpq_analysis.methods import BASELINE, method_label
from fpq_analysis.records.comparison import Difference, SeedsDifference, against_baseline, difference
from fpq_analysis.records.queries import half_widths, last_epochs, norms, ordered, trained_in_noise
from fpq_analysis.text import number

ONE_RUN = (
    "Intervals are over the samples, for these training runs; how the methods differ, rather than these runs of them, "
    "takes several training seeds."
)
OF_PROBES = ONE_RUN.replace("the samples, for these", "the random probes, for these samples and")
Seeds = dict[object, list[Difference]]  # the differences of each training seed


def in_words(rows: pd.DataFrame, what: str = "trace", baseline: str = BASELINE) -> list[str]:
    """Every quantized run against the baseline's beside it, over training seeds where there are several.

    Args:
        rows: a quantity of whole networks, one row for each run and epoch, such as `queries.totals` gives.
        what: what the quantity is called.

    Returns:
        Sentences; where there is nothing to compare, one for each run alone.
    """
    rows = ordered(rows[rows["value"].notna()])
    of_run = rows.drop_duplicates("run", keep="last").set_index("run")
    groups: dict[tuple[str, ...], Seeds] = {}
    for found in against_baseline(rows, baseline):
        run = of_run.loc[found.run]
        alike = tuple(str(run[name]) for name in ("model", "data", "method", "bits", "definition"))
        groups.setdefault(alike, {}).setdefault(run["train_seed"], []).append(found)
    if groups:
        return _over_seeds(
            {(method_label(key[2], key[3]), method_label(baseline, key[3]), *key): x for key, x in groups.items()}, what
        )
    ends = last_epochs(rows)
    alone = [
        f"The {what} of {row['run']} is {number(row['value'], 3)} ± {number(half, 2)} at epoch {row['epoch']}."
        for (_, row), half in zip(ends.iterrows(), half_widths(ends), strict=True)
    ]
    of_probes = bool((ends["sem_data"].isna() & (ends["sem"] > 0)).any())
    return [*alone, OF_PROBES if of_probes else ONE_RUN] if alone else []


def noise_in_words(records: pd.DataFrame, quantity: str = "grad_norm_minibatch") -> list[str]:
    """The gradient norm with noise in the features against that with noise in the weights, at each run's last epoch.

    Where runs were trained in noise, these, of equal network, data, bits and seed; otherwise within each run.

    Args:
        records: of the probe `gradnorm`.
        quantity: as for `plots.figure2`.
    """
    rows = ordered(last_epochs(norms(records, quantity)))
    trained = trained_in_noise(rows)
    own = [] if len(trained) else ["run"]
    groups: dict[tuple[str, ...], Seeds] = {}
    for key, pair in (trained if len(trained) else rows).groupby(
        ["model", "data", "bits", "definition", "train_seed", *own], sort=False, dropna=False
    ):
        arms = {str(arm): one.iloc[-1].copy() for arm, one in pair.groupby("arm")}
        if {"features", "weights"} <= arms.keys():
            for arm, row in arms.items():
                row["run"] = f"{row['run']} with noise in the {arm}"
            method = "" if len(trained) else f"{method_label(arms['features']['method'], arms['features']['bits'])} "
            names = (f"{method}noise in the features", "noise in the weights")
            found = difference(arms["features"], arms["weights"])
            groups.setdefault((*names, *map(str, key[:4])), {}).setdefault(key[4], []).append(found)
    return _over_seeds(groups, "gradient norm")


def _over_seeds(groups: dict[tuple[str, ...], Seeds], what: str) -> list[str]:
    """Of groups by the names of both sides and whatever else tells them apart."""
    sentences, several = [], True
    for (ours, theirs, *_), seeds in groups.items():
        each = [found for same in seeds.values() for found in same]
        if len(seeds) == len(each) > 1:
            sentences.append(SeedsDifference.of(each).sentence(ours, theirs, what))
        else:
            sentences += [found.sentence(what) for found in each]
            several = False
    of_probes = any(found.over_probes for seeds in groups.values() for same in seeds.values() for found in same)
    return sentences if several else [*sentences, OF_PROBES if of_probes else ONE_RUN]

"""What figures show, in sentences: the numbers are those of the records, over seeds where there are several."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fpq_analysis.records.comparison import SeedsDifference, against_baseline
from fpq_analysis.records.queries import totals
from fpq_analysis.records.sentences import OF_PROBES, ONE_RUN, in_words, noise_in_words
from fpq_analysis.text import number
from tests.test_records_and_plots import row

N = 40


def traces(seeds, methods=("lsq", "fpq"), bits="W4A4"):
    rng = np.random.default_rng(0)
    rows = []
    for seed in seeds:
        for method, mean in zip(methods, (100.0, 80.0), strict=False):
            samples = list(rng.normal(mean, 5, N))
            name = f"{method}-s{seed}"
            rows.append(
                row(name, method, bits=bits, train_seed=seed, value=float(np.mean(samples)), samples=samples, epoch=3)
            )
    return pd.DataFrame(rows)


def test_one_run_each():
    rows = traces([0])
    (difference,) = against_baseline(rows)
    said, caveat = in_words(rows)
    assert caveat == ONE_RUN
    assert said == difference.sentence()
    assert f"{number(-difference.value, 3)} ± {number(difference.ci95, 2)} lower" in said


def test_several_seeds_make_one_sentence():
    rows = traces([0, 1, 2])
    several = SeedsDifference.of(against_baseline(rows))
    (said,) = in_words(rows, "loss")
    assert said == several.sentence("FPQ W4A4", "LSQ W4A4", "loss")
    assert said.startswith("FPQ W4A4 against LSQ W4A4, over 3 training seeds: the loss is lower by")


def test_two_runs_of_one_seed_stand_alone():
    rows = traces([0, 1])
    again = traces([1]).replace({"fpq-s1": "fpq-other"})
    both = pd.concat([rows, again[again["method"] == "fpq"]], ignore_index=True)
    *said, caveat = in_words(both)
    assert len(said) == 3
    assert caveat == ONE_RUN


def test_errors_of_random_probes_are_called_so():
    one = traces([0], methods=("fpq",)).assign(sem=1.0, sem_data=np.nan, samples=None)
    assert in_words(one)[-1] == OF_PROBES
    two = traces([0]).assign(sem=1.0, sem_data=np.nan, samples=None, estimator="deflated")
    assert in_words(two)[-1] == OF_PROBES
    assert "over the random probes, for these samples and training runs;" in OF_PROBES


def test_a_run_without_another_is_described():
    rows = traces([0], methods=("fpq",))
    said, _ = in_words(totals(rows))
    assert said == f"The trace of fpq-s0 is {number(rows['value'].iloc[0], 3)} ± {number(1.96, 2)} at epoch 3."
    assert in_words(rows[:0]) == []


@pytest.mark.parametrize("trained", [False, True])
def test_noise_in_features_against_weights(trained):
    rows = [
        row(
            f"noise-{arm}-s{seed}" if trained else f"lsq-s{seed}",
            f"noise-{arm}" if trained else "lsq",
            bits="W4A4", train_seed=seed, quantity=f"grad_norm_minibatch@{arm}", samples=None, value=value + seed,
            ci95=0.3,
        )
        for seed in (0, 1, 2) for arm, value in (("features", 1.0), ("weights", 2.0))
    ]  # fmt: skip
    (said,) = noise_in_words(pd.DataFrame(rows))
    start = "noise in the features" if trained else "LSQ W4A4 noise in the features"
    assert said.startswith(
        f"{start} against noise in the weights, over 3 training seeds: the gradient norm is lower by 1"
    )
    alone, caveat = noise_in_words(pd.DataFrame(rows[:2]))
    assert "with noise in the features is 1 ± 0.42 lower than that of" in alone
    assert caveat == ONE_RUN


def test_a_baseline_of_zero_and_a_value_that_is_none():
    rows = [row("lsq", "lsq", value=0.0, samples=[0.0] * 4), row("fpq", "fpq", value=1.0, samples=[1.0, 1.0, 1.0, 1.0])]
    said, _ = in_words(pd.DataFrame(rows))
    assert said == "The trace of fpq is 1 ± 0 higher than that of lsq at epoch 0 (of 0)."
    rows.append(row("other", "kd", value=np.nan))
    assert in_words(pd.DataFrame(rows)) == [said, ONE_RUN]

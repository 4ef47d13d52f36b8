# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Figure 2: gradient norm with noise in the features and in the weights
#
# The norm of the gradient with respect to the weights, epoch by epoch, with noise of one quantization step in the input of
# every convolution, or on its weights. The paper's argument for perturbing features rests on the former being smaller. It
# trains with either noise; where there are no such runs, both noises are tried on the LSQ runs.

# %%
# %matplotlib inline
from pathlib import Path

import pandas as pd

from fpq_analysis import measure
from fpq_analysis.plots import caption2, figure2
from fpq_analysis.probes import GradNorm
from fpq_analysis.records.sentences import noise_in_words

CKPT_DIR = "../checkpoints/demo"  # `fpq-analyze demo` makes it; or a run, or a folder of runs, of your own

# %%
runs = [path.parent for path in sorted(Path(CKPT_DIR).rglob("run.json"))]
drawn = [run for run in runs if "noise-" in run.name] or [run for run in runs if "lsq-" in run.name]
records = pd.concat([measure(run, GradNorm()) for run in drawn], ignore_index=True)
figure2(records)

# %%
print(caption2(records))

# %% [markdown]
# At the last epoch, the norm in either noise:

# %%
print(*noise_in_words(records), sep="\n")

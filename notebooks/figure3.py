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
# # Figure 3: the range of every channel, float above and quantized below
#
# One ReLU layer: the range of each output channel over images, its middle half as a box, and its *mean* as an orange line,
# for the float network and a quantized one; below, by how much each mean differs, with its error.

# %%
# %matplotlib inline
from fpq_analysis import measure
from fpq_analysis.plots import caption3, figure3
from fpq_analysis.probes import Drift, Features
from fpq_analysis.records.sentences import in_words

CKPT_DIR = "../checkpoints/demo"  # `fpq-analyze demo` makes it; or a run, or a folder of runs, of your own

# %%
records = measure(CKPT_DIR, Features(), epochs="last")
figure3(records)

# %%
print(caption3(records))

# %% [markdown]
# How far the means have moved is measured for the channels of every convolution: the mean shift is the distance between a
# channel's mean and that in the float network the run started from, in standard deviations of the latter, averaged over all
# channels. Two runs are compared on the same images:

# %%
drift = measure(CKPT_DIR, Drift(), epochs="last")
whole = drift[drift["layer"] == "all"]
print(*in_words(whole[whole["quantity"] == "mean_shift"], "mean shift"), sep="\n")

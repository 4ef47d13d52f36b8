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
# for the float network and a quantized one.

# %%
# %matplotlib inline
from fpq_analysis import measure
from fpq_analysis.plots import caption3, figure3
from fpq_analysis.probes import Features

CKPT_DIR = "../checkpoints/demo"  # `fpq-analyze demo` makes it; or a run, or a folder of runs, of your own

# %%
records = measure(CKPT_DIR, Features(), epochs="last")
figure3(records)

# %%
print(caption3(records))

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
# # Figure 4: the density of one layer's features, for three images
#
# Float, LSQ and FPQ on the same three images, drawn by the seed: does distillation of standardised features keep the
# quantized network's features where the float network's are?

# %%
# %matplotlib inline
from fpq_analysis import measure
from fpq_analysis.plots import caption4, figure4
from fpq_analysis.probes import Drift, Features
from fpq_analysis.records.sentences import in_words

CKPT_DIR = "../checkpoints/demo"  # `fpq-analyze demo` makes it; or a run, or a folder of runs, of your own

# %%
records = measure(CKPT_DIR, Features(), epochs="last")
figure4(records)

# %%
print(caption4(records))

# %% [markdown]
# Three images of one layer are an illustration. Over all images and convolutions, the Wasserstein distance says how far each
# channel's distribution is from that in the float network the run started from, in standard deviations of the latter:

# %%
drift = measure(CKPT_DIR, Drift(), epochs="last")
whole = drift[drift["layer"] == "all"]
print(*in_words(whole[whole["quantity"] == "wasserstein"], "Wasserstein distance"), sep="\n")

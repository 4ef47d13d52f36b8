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
# # Figure 1: how much the prediction varies under noise in the image
#
# Gaussian noise of standard deviation `sd` (in units of the normalised image) is added to each image several times; the
# variance of the logits over these draws, averaged over classes and images, is what the paper's Figure 1 calls the
# *variation of prediction output*. The paper states neither the noise's size nor of what the variance is taken.

# %%
# %matplotlib inline
from fpq_analysis import measure
from fpq_analysis.plots import caption1, figure1
from fpq_analysis.probes import OutputVariance
from fpq_analysis.records.queries import nearest, variances
from fpq_analysis.records.sentences import in_words

CKPT_DIR = "../checkpoints/demo"  # `fpq-analyze demo` makes it; or a run, or a folder of runs, of your own

# %%
records = measure(CKPT_DIR, OutputVariance(), epochs="last")
figure1(records)

# %%
print(caption1(records))

# %% [markdown]
# The numbers, and the share of predictions that the noise turns:

# %%
rows = records[records["quantity"].str.endswith("@0.1")]
rows.pivot(index="run", columns="quantity", values=["value", "ci95"]).round(4)

# %% [markdown]
# All networks see the same images in the same noise, so that the variances of two are compared image by image:

# %%
rows = variances(records)
print(*in_words(rows[rows["sd"] == nearest(rows, 0.1)], "variance of the logits"), sep="\n")

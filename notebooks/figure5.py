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
# # Figure 5: the trace of the Hessian against the epoch
#
# The claim of the paper: training with FPQ ends in flatter minima, that is, its trace lies below LSQ's throughout.
# The trace here is exact, no random probes; the band is its error over the images.

# %%
# %matplotlib inline
from fpq_analysis import measure
from fpq_analysis.plots import caption5, figure5
from fpq_analysis.probes import HessianTrace
from fpq_analysis.records.queries import totals
from fpq_analysis.records.sentences import in_words

CKPT_DIR = "../checkpoints/demo"  # `fpq-analyze demo` makes it; or a run, or a folder of runs, of your own

# %%
records = measure(CKPT_DIR, HessianTrace())
figure5(records)

# %%
print(caption5(records))

# %% [markdown]
# Two networks share most of their error over the images, so that their difference, taken image by image, is known better than the
# bands suggest:

# %%
print(*in_words(totals(records)), sep="\n")

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
# # Quickstart
#
# From a folder of checkpoints, one an epoch, to curvature with error bars. `fpq-analyze demo` makes such a folder in a few
# minutes; `fpq-analyze train` makes your own.

# %%
# %matplotlib inline
from pathlib import Path

import fpq_analysis
from fpq_analysis.data import load_dataset, training_sample
from fpq_analysis.records.queries import totals
from fpq_analysis.records.sentences import in_words

CKPT_DIR = "../checkpoints/demo"  # `fpq-analyze demo` makes it; or a folder of runs that `fpq-analyze train` made

# %% [markdown]
# ## One network
#
# `load` gives a checkpoint's network back; every measurement takes any `nn.Module` and pairs of inputs and targets.

# %%
runs = sorted(path.parent for path in Path(CKPT_DIR).rglob("run.json"))
last = sorted(runs[-1].glob("epoch_*.pt"))[-1]
model = fpq_analysis.load(last)
images, labels = training_sample(load_dataset("digits"), 256, seed=0)
trace = fpq_analysis.hessian_trace(model, (images, labels))
print(
    f"{last.parent.name}: trace {trace.value:.1f} ± {trace.ci95:.1f} (95 % over the images), by the method '{trace.method}'"
)

# %%
largest = sorted(trace.per_layer.items(), key=lambda item: -item[1])[:5]
for layer, value in largest:
    print(f"{layer:30} {value:8.2f}")

# %%
eigenvalues = fpq_analysis.hessian_eigs(model, (images, labels), k=3)
for value, residual in zip(eigenvalues.values, eigenvalues.residuals, strict=True):
    print(f"{value:.3f}, residual {residual:.1e}")

# %% [markdown]
# ## Every checkpoint of every run
#
# `measure` gives a table, and keeps it beside the checkpoints: what was measured is not measured again.

# %%
records = fpq_analysis.measure(CKPT_DIR, fpq_analysis.HessianTrace(), n_data=256, epochs="last")
traces = totals(records)
traces[["run", "epoch", "value", "ci95", "n_data", "estimator", "definition"]].round(2)

# %% [markdown]
# ## Figures
#
# Every figure is a function from such a table to a matplotlib `Figure`; `draw_figures` measures what is missing and writes all
# of them. The paper's are in `figure1.ipynb` to `figure5.ipynb`.

# %% [markdown]
# ## What it says
#
# Two networks share most of their error over the images, so that their difference, taken image by image, is known better than the
# intervals in the table suggest:

# %%
print(*in_words(traces), sep="\n")

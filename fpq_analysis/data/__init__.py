"""Data: the sets known by a name, those of the user's own, and the seeded sample that everything is measured on."""

from fpq_analysis.data.batches import epoch_generator as epoch_generator
from fpq_analysis.data.batches import evaluation_batches as evaluation_batches
from fpq_analysis.data.batches import training_batches as training_batches
from fpq_analysis.data.batches import training_sample as training_sample
from fpq_analysis.data.dataset import Dataset as Dataset
from fpq_analysis.data.dataset import Split as Split
from fpq_analysis.data.dataset import parse_normalization as parse_normalization
from fpq_analysis.data.named import load_dataset as load_dataset
from fpq_analysis.data.named import load_run_data as load_run_data
from fpq_analysis.data.own import OwnData as OwnData
from fpq_analysis.data.own import own_data as own_data

"""What is minimised: a mean over samples of a function of the outputs and targets."""

from fpq_analysis.losses.mean import Loss, check_mean, check_targets, resolve_loss

__all__ = ["Loss", "check_mean", "check_targets", "resolve_loss"]

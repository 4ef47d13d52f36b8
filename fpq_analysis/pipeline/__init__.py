"""From checkpoints to records: what is to be measured, the measuring, and the figures drawn from it."""

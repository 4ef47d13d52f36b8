"""`python -m fpq_analysis`, the same as `fpq-analyze`; what torchrun starts: `torchrun -m fpq_analysis`."""

from fpq_analysis.cli import main

if __name__ == "__main__":
    main()

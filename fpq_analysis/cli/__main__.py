"""`python -m fpq_analysis.cli`, the same as `fpq-analyze`."""

from fpq_analysis.cli import main

if __name__ == "__main__":
    main()

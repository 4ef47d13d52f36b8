"""Other packages' interfaces, with this package's numbers behind them."""

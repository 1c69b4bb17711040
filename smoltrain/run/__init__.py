"""What a run writes down: its folder, ledger, console, metrics, W&B, plots; and whether what stands there is true."""

"""What a minute and a large release cost, as ratios measured side by side: `python -m tests.bench`."""

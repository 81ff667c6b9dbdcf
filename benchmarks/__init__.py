"""Speed and memory, always as ratios between things timed in one run on one machine."""

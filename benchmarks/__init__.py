"""What we measure ourselves against: scripts for anyone to run, outside of the package."""

"""Speed beside peers, and torture. Run as `python -m benchmarks` or `python -m benchmarks.NAME`; the package does not ship."""

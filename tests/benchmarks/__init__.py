"""Side by side with the peers, in one run: ``python -m tests.benchmarks``. Not collected by pytest."""

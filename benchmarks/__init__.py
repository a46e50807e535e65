"""Benchmarks of the operators, a module in ``ops/`` for each; ``python -m benchmarks.bench OP`` runs one on the CPU."""

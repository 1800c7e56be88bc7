"""What the benchmarks share: command line, data, models, training, result files, tables."""

"""The benchmarks: the paper's questions, the accuracy board, architectures pruned, and speed."""

"""What is measured on a GPU machine: `python -m benchmarks.gpu STAGE`; see benchmarks/README.md."""

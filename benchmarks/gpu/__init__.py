"""What a GPU session measures: `python -m benchmarks.gpu STAGE`; see benchmarks/README.md."""

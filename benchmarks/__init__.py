"""What the parts of a run cost, one script a claim; from the project's root: python -m benchmarks.NAME"""

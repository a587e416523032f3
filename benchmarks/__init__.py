"""Speed, side by side with other programs: `python -m benchmarks` measures, results/ keeps."""

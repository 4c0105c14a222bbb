"""Applications behind the commands: jobs, pictures, comparisons, the bundled model."""

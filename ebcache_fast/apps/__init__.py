"""What the commands are made of: jobs, pictures, comparisons, the bundled model."""

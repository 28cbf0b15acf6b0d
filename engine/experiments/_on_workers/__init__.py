"""What the experiments run that build on torch's classes: only workers import these modules, inside `run`."""

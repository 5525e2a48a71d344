"""From requests to tokens: schedule, build inputs, run, sample, commit."""

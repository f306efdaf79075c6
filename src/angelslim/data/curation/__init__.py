"""From raw files to a curated training set: a chain of stages, each with its reasons, streamed and resumable."""

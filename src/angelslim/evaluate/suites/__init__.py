"""Suites of long prompts: RULER from own generators, LongBench from local files, with any attention."""

"""Layer 6: studies on small budgets, before a large one is spent: hyper-parameters and the volume of data.

`space` reads what is searched, `study` searches it with optuna (`workers` in several processes), `run` then trains the winner on several shares of the
data and writes the chosen recipe and the page.
"""

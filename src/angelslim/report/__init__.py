"""Layer 5: from the records of a run to a table, a self-contained HTML page and a model card.

Everything here is drawn from `record.RunRecord` alone: no figure is computed from a model, and what was not
measured says so. Equal records give equal bytes.
"""

"""Figures, tables, pages, how objects show themselves in a notebook, the explorer and its widgets."""

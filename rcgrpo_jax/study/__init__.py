"""Blind preference studies: a page that asks people which edit is best, and what their votes say (Fig. 4)."""

"""Commands that measure one thing each and print a table of ratios."""

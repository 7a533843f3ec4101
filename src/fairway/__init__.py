"""Fairway: Parameter Golf as a staged, cached and audited workflow."""

__version__ = "0.1.0"

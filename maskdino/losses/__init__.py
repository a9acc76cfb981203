"""Matching and losses (sections 3.5, 3.6, appendix B)."""

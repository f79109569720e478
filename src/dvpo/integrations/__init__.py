"""Engines of others that DVPO runs in."""

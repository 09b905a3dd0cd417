"""Tune a geospatial foundation model, export it, and map satellite scenes of any size."""

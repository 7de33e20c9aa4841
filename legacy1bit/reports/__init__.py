"""Figures and pages about runs and studies."""

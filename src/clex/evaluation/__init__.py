"""Measuring extended models."""

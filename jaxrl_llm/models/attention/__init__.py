"""Softmax attention over packed rows and over a cache made of pages."""

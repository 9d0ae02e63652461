"""Estimators: from activations to a direction. One function a method, its formula and paper in its
docstring."""

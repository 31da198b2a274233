"""Gradient formulas of the ops that have one, in differentiable operations so that they can be differentiated again."""

"""What runs and evaluations found, for people to look at."""

from mlxpref.report.pictures import Curve, Line, Point, control_alt_text, draw_control_curve

__all__ = ["Curve", "Line", "Point", "control_alt_text", "draw_control_curve"]

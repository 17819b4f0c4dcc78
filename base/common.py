"""stub"""
from data import Suite


def load(split, limit):
    return Suite([], [], {}, {}, {}, {})

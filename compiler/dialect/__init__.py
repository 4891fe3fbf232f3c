"""Relax operators of our own, one file each: what several Relax operators say together, as one, so that passes can move it and a target can give it one kernel.

Each file registers its operator when it is imported, and offers a function that makes a call, one that reads its attributes, and a numpy reference.
"""

"""Other people's evaluation programs on the live model, with its experts: no second copy of its parameters.

Nothing is imported here: each harness is an extra (`pip install alula[eval]`).
"""

"""Other people's evaluation programs on the live model, with its experts: no second copy of its parameters.

Nothing is imported here: the packages of lm-eval are the extra `eval`, those of lmms-eval are installed apart.
"""

"""`python -m compiled_fa`: where am I, which engine serves me, is it right, and is it fast?

cases.py          what is checked, and SDPA to compare with
environment.py    what this machine has
report.py         the command
"""

"""`python -m compiled_fa`: where am I, which engine serves me, is it right, and is it fast?

naive.py          attention as one would write it down: the reference
budget.py         how large an error may be
cases.py          what is checked
environment.py    what this machine has
report.py         the command
"""

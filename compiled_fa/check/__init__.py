"""`python -m compiled_fa`: where am I, which engine serves me, is it right, and is it fast?

cases.py          what is checked, and SDPA to compare with
environment.py    what this machine has
report.py         the command
owner.py          `python -m compiled_fa report`: the same, measured, in a file to share; picture.py: as a picture
speed.py          what is measured for it; flex.py: in a process of its own
"""

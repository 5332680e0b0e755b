"""This package inside other people's: a module each, named as they are, which imports them when it is asked to; and
parts of those modules, whose names begin with theirs.
"""

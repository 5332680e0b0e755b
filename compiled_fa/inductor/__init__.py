"""Everything that asks Inductor for something.

graphs.py     graphs traced by make_fx, compiled by Inductor and called without guards
steps.py      steps of engines on a CPU as machine code, or eagerly where that cannot be
fast_math.py  tanh in compiled steps
lowering.py   what Inductor makes of our ops in other people's graphs
"""

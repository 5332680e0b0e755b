"""Speed and memory, ours and everybody else's, side by side: `python -m bench`.

Data goes down once: a suite names cases, a case becomes tensors, every peer that can do the case is held against
float64, those that are right are timed in turns, and what comes out is a record.

    suites.py      which cases, in which directions, against whom
    cases.py       a case, and its tensors
    peers/         who computes: ours, naive, SDPA, flex_attention, nested tensors, packages where installed
    parity.py      is what a peer computes attention? Only then is it timed
    timing.py      in turns, median and interquartile range
    race.py        one case: parity, then time
    choice.py      how good is the choice of engines? Random calls, each by all that could serve it
    processes.py   measurements that need a process of their own: peak memory (peak.py), first use (first_use.py)
    records.py     JSON lines, and what identifies a measurement
    table.py       the same for the eye: ours, and ours / peer
    plot.py        figures of records

Shape letters are the package's: B batch, Sq and Sk lengths, H and Hk query and key heads, D head_dim.
"""

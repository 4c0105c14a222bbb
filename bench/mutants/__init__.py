"""Mutation tests of the kernels and the engine: break them one small edit at a time, and see that a test notices.

    python -m bench.mutants [--only kernels/x.py] [--sample 8 --seed 0] [--launchers] [--jobs 2] [--list] [--out x.json]

Mutants are made of the kernels' functions under @triton.jit, and of all of the engine. Each is written into a copy of
the tree and run against its file's tests alone, in a process forked from one that has imported torch, Triton and
pytest. What survives is killed by a better test or explained in bench/mutants_equivalent.txt; the exit status is 1 as
long as it is neither.

    edits       syntax nodes changed, and source text with them
    operators   what may stand in a node's place, in any Python; triton_operators: in Triton's own calls
    find        all mutants of a source file
    tree        copies of the tree, and which tests a file has
    warm        the process that forks the test runs; worker: its other end
    campaign    a run of each mutant, and of each test that kills one without it
    explained   the explanations of equivalent mutants
    report      the table and the JSON
"""

"""Every figure that is stated about Sluice, as a command: a file in this folder is a benchmark, and none imports another.

shared/    what several of them use
peers/     sides that have a process of their own, some in an environment of their own
probe/     loaded into measured processes
results/   what was measured last; docs/benchmarks.md shows it
"""
